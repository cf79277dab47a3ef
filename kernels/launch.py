"""What every launcher needs: the compute type, the index width, vector widths, and the launch."""

import contextlib

import torch
import triton
import triton.language as tl

INT32_MAX = 2**31 - 1
MOST_PROGRAMS = 2**31 - 1  # of a launch, along the first axis of its grid


def compute_dtypes(*tensors: torch.Tensor) -> tuple[tl.dtype, torch.dtype]:
    """Coordinates, weights and sums: float64 where any argument is, else float32; never half."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return tl.float64, torch.float64
    return tl.float32, torch.float32


def index_dtype(*tensors: torch.Tensor, rows: int = 0) -> tl.dtype:
    """The width of an offset within one image, for which the largest of all images decides.

    ``rows``: those of an output, depth * height, which tiles count; an expanded output may have more of them
    than it spans.
    """
    spans = (rows, *map(image_span, tensors))
    return tl.int32 if max(spans) <= INT32_MAX else tl.int64


def image_span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last of one image (of every dimension but the first), both included."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )


def channel_dim(tensor: torch.Tensor, dims: int) -> int:
    return tensor.dim() - dims - 1


def vector_width(tensor: torch.Tensor, dims: int) -> int:
    """Channels that are read or written by one lane: 16 bytes of them where memory allows, else 1.

    They must be neighbours, and every pixel's offset a multiple of the vector. (The pointer's own
    alignment is Triton's to check.)
    """
    channel = channel_dim(tensor, dims)
    if tensor.stride(channel) != 1:
        return 1
    vector = max(16 // tensor.element_size(), 1)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        while dim != channel and size > 1 and stride % vector:
            vector //= 2
    return vector


def has_fast_log(device: torch.device, compute: tl.dtype) -> bool:
    """Whether the target has a logarithm in hardware that Triton can be told to use: NVIDIA's, in float32."""
    if compute != tl.float32 or device.type == "cpu":
        return False
    return triton.runtime.driver.active.get_current_target().backend == "cuda"


# A product and the sum it goes into are rounded once: more accurate, and faster.
OPTIONS = {"enable_fp_fusion": True}


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensors'."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return (
        contextlib.nullcontext() if device.index == module.current_device() else module.device(device.index)
    )


def run(kernel, programs: int, device: torch.device, *args, **kwargs) -> None:
    with on_device(device):
        kernel[(programs,)](*args, **kwargs)


# What a launch does. ``specialisations`` compiles here instead, for GPUs that are not there.
runner = run


def launch(kernel, programs: int, device: torch.device, *args, **kwargs) -> None:
    """Runs ``programs`` programs of a kernel. Every launch of the package goes through here."""
    if programs > MOST_PROGRAMS:
        raise ValueError(f"{programs} tiles of pixels are more than the 2^31 - 1 that can be done at once")
    runner(kernel, programs, device, *args, **OPTIONS, **kwargs)
