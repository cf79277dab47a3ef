"""The launches that ``bench.report`` reports on, each at a realistic size, by name: ``CASES``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stn_triton.kernels import derivatives, gather, grid, sample, sort
from stn_triton.kernels.modes import Interpolation, Padding, Source

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPE_NAMES = {F16: "f16", BF16: "bf16", F32: "f32", torch.uint8: "u8"}
CONTROLS = 16


class Case(NamedTuple):
    """One launch. ``vectors``: the image has channels innermost, to be read 16 bytes at a time.

    ``launch(theta, memory)`` calls the launcher. Without ``memory`` the tensors have none; with it they are
    zeros on the CPU, but for coordinates, which are those of the matrix ``theta``, (2, 3).
    """

    name: str
    kernel: str
    launch: Callable[..., None]
    pixels: int
    channels: int
    interpolation: Interpolation
    vectors: bool


def _empty(shape: tuple[int, ...], dtype: torch.dtype, memory: bool, last: bool = False) -> Tensor:
    """A tensor without memory, or of zeros that take none until they are touched."""
    order = (0, *range(2, len(shape)), 1) if last else tuple(range(len(shape)))
    dense = tuple(shape[dim] for dim in order)
    if memory:
        tensor = (
            torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(dense)
        )
    else:
        tensor = torch.empty(dense, dtype=dtype, device="meta")
    return tensor.permute(*(order.index(dim) for dim in range(len(shape))))


def _parameters(source: str, n: int, size: tuple[int, ...], dtype: torch.dtype, theta: Tensor) -> Tensor:
    """The parameters of a matrix, a grid of its coordinates, or the coefficients of a spline that is it.

    In a volume the matrix turns about z, along which it zooms likewise.
    """
    if len(size) == 3:
        zoom = float(theta[:, :2].det().abs().sqrt())
        turned = torch.cat([F.pad(theta[:, :2], (0, 1)), theta[:, 2:]], 1)
        theta = torch.cat([turned, theta.new_tensor([[0.0, 0.0, zoom, 0.017]])])
    if source == "grid":
        return F.affine_grid(theta[None], [1, 1, *size], False).to(dtype).expand(n, *size, 2).contiguous()
    if source == "tps":
        return F.pad(theta.mT, (0, 0, CONTROLS, 0)).to(dtype).expand(n, CONTROLS + 3, 2).contiguous()
    return theta.to(dtype).expand(n, *theta.shape).contiguous()


def _shape(direction: str, channels: int, dims: int) -> tuple[int, tuple[int, ...]]:
    """Images and their size: more than the L2 cache holds."""
    if dims == 3:
        return 2, (160, 160, 160)
    if direction.startswith("sorted"):
        return (2, (1080, 1920)) if channels <= 4 else (16, (128, 128))
    if channels <= 4:
        return 8, (1080, 1920)
    return (8, (540, 960)) if channels == 8 else (16, (128, 128))


KERNEL_OF = {
    "forward": "sample_forward_kernel",
    "gather": "gather_backward_kernel",
    "scatter": "sample_backward_kernel",
    "params": "sample_backward_kernel",
    "both": "sample_backward_kernel",
    "sorted-keys": "sort_keys_kernel",
    "sorted-sums": "sort_sums_kernel",
    "grid": "grid_kernel",
    "grid-backward": "grid_kernel",
    "jvp": "sample_jvp_kernel",
    "hvp": "sample_hvp_kernel",
}


def _case(
    direction: str,
    source: str = "affine",
    interpolation: str = "bilinear",
    layout: str = "nchw",
    channels: int = 3,
    dtype: torch.dtype = F32,
    params_dtype: torch.dtype | None = None,
    padding: str = "zeros",
    dims: int = 2,
    fill: bool = False,
) -> Case:
    """A same-size warp. ``direction``: a key of ``KERNEL_OF``."""
    kinds = Source[source.upper()], Interpolation[interpolation.upper()], Padding[padding.upper()], False
    params_dtype, last = params_dtype or dtype, layout == "nhwc"
    n, size = _shape(direction, channels, dims)
    names = [direction, source, *([] if padding == "zeros" else [padding]), *(["fill"] if fill else [])]
    if not direction.startswith("grid"):
        names += [interpolation, layout if dims == 2 else layout.replace("hw", "dhw"), f"c{channels}"]
    elif dims == 3:
        names.append("3d")
    types = [DTYPE_NAMES[dtype]] + ([DTYPE_NAMES[params_dtype]] if params_dtype != dtype else [])

    def launch(theta: Tensor | None = None, memory: bool = False) -> None:
        shapes = {
            Source.GRID: (n, *size, dims),
            Source.AFFINE: (n, dims, dims + 1),
            Source.PROJECTIVE: (n, 3, 3),
            Source.TPS: (n, CONTROLS + 3, 2),
            Source.FLOW: (n, dims, *size),
        }

        def empty(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
            return _empty(shape, dtype, memory)

        def image_like(dtype: torch.dtype) -> Tensor:
            return _empty((n, channels, *size), dtype, memory, last)

        params = empty(shapes[kinds[0]], params_dtype)
        if theta is not None:
            params = _parameters(source, n, size, params_dtype, theta)
        controls = empty((CONTROLS, 2), params_dtype) if source == "tps" else None
        image, output = image_like(dtype), image_like(dtype)
        total = image if dtype == F32 else image_like(F32)
        coord_tangent = empty((n, 1, *size, dims))
        if direction == "forward":
            filling = empty((n, channels)) if fill else None
            sample.sample_forward(image, params, controls, output, *kinds, filling)
        elif direction == "gather":
            gather.gather_backward(output, params, image, *kinds)
        elif direction == "scatter":
            sample.sample_backward(output, image, params, controls, total, *kinds, False)
        elif direction == "params":
            sample.sample_backward(output, image, params, controls, None, *kinds, True)
        elif direction == "both":
            total = image_like(F32)
            sample.sample_backward(output, image, params, controls, total, *kinds, True)
        elif direction.startswith("sorted"):
            sort.sorted_backward(output, params, controls, image, *kinds)
        elif direction == "grid":
            points = empty((n, *size, dims), dtype)
            grid.grid_forward(params, controls, points, kinds[0], False)
        elif direction == "grid-backward":
            points = empty((n, *size, dims), dtype)
            grid.grid_backward(points, params, controls, kinds[0], False)
        elif direction == "jvp":
            tangents = image_like(dtype), params, controls, coord_tangent
            derivatives.sample_jvp(image, *tangents, output, *kinds)
        else:
            tangents = image_like(dtype), params, controls, coord_tangent
            total = image_like(F32)
            derivatives.sample_hvp(output, image, *tangents, total, *kinds, True)

    return Case(
        "-".join([*names, "+".join(types)]),
        KERNEL_OF[direction],
        launch,
        n * math.prod(size),
        1 if direction.startswith("grid") or direction == "sorted-keys" else channels,
        kinds[1],
        last and channels * dtype.itemsize % 16 == 0,
    )


def _cases() -> Iterator[Case]:
    for channels in (1, 3, 4, 64):
        yield _case("forward", channels=channels)
        yield _case("forward", channels=channels, dtype=BF16, params_dtype=F32)
    yield _case("forward", dtype=F16, params_dtype=F32)
    yield _case("forward", padding="border")
    yield _case("forward", padding="reflection")
    for channels in (3, 8, 64, 256):
        yield _case("forward", layout="nhwc", channels=channels)
    for channels in (64, 256):
        yield _case("forward", layout="nhwc", channels=channels, dtype=BF16, params_dtype=F32)
    yield _case("forward", dtype=torch.uint8, params_dtype=F32)
    yield _case("forward", layout="nhwc", channels=16, dtype=torch.uint8, params_dtype=F32)
    yield _case("forward", fill=True)
    yield _case("forward", padding="border", fill=True)
    yield _case("forward", interpolation="averaged")
    yield _case("forward", "projective", interpolation="averaged")
    for interpolation in ("nearest", "bicubic"):
        yield _case("forward", interpolation=interpolation)
        yield _case("forward", interpolation=interpolation, dtype=BF16, params_dtype=F32)
        yield _case("forward", interpolation=interpolation, layout="nhwc", channels=64)
    for source in ("projective", "tps", "flow", "grid"):
        yield _case("forward", source)
        yield _case("forward", source, layout="nhwc", channels=64)
    yield _case("forward", "tps", channels=1)
    yield _case("forward", "grid", channels=1)
    yield _case("forward", "grid", channels=64)
    yield _case("forward", "grid", dtype=BF16)
    yield _case("forward", "grid", "bicubic")
    for source in ("affine", "grid"):
        yield _case("forward", source, channels=1, dims=3)
    yield _case("forward", channels=16, layout="nhwc", dims=3)
    yield _case("forward", interpolation="bicubic", channels=1, dims=3)

    for channels in (1, 3, 4, 64):
        yield _case("gather", channels=channels)
    yield _case("gather", dtype=BF16, params_dtype=F32)
    for channels in (8, 64, 256):
        yield _case("gather", layout="nhwc", channels=channels)
    yield _case("gather", layout="nhwc", channels=64, dtype=BF16, params_dtype=F32)
    yield _case("gather", interpolation="nearest")
    yield _case("gather", interpolation="bicubic")
    yield _case("gather", interpolation="averaged")
    yield _case("gather", padding="border")
    yield _case("gather", "projective")
    yield _case("gather", "projective", layout="nhwc", channels=64)
    yield _case("gather", channels=1, dims=3)

    for source in ("grid", "flow", "tps"):
        yield _case("scatter", source)
        yield _case("both", source)
    for source in ("grid", "flow"):
        yield _case("scatter", source, layout="nhwc", channels=64)
        yield _case("both", source, layout="nhwc", channels=64)
    yield _case("scatter", "grid", channels=64)
    yield _case("scatter", "grid", layout="nhwc", channels=64, dtype=BF16)
    yield _case("scatter", "grid", channels=1, dims=3)
    yield _case("both", "grid", "bicubic")

    for channels in (1, 3, 64):
        yield _case("params", channels=channels)
    yield _case("params", dtype=BF16, params_dtype=F32)
    yield _case("params", layout="nhwc", channels=64)
    yield _case("params", interpolation="bicubic")
    yield _case("params", interpolation="averaged")
    yield _case("params", channels=1, dims=3)
    for source in ("projective", "tps", "flow", "grid"):
        yield _case("params", source)

    yield _case("sorted-keys", "grid")
    yield _case("sorted-sums", "grid")
    yield _case("sorted-sums", "grid", channels=64)
    yield _case("sorted-sums", "grid", layout="nhwc", channels=64)
    for source in ("affine", "projective", "tps"):
        yield _case("grid", source)
        yield _case("grid-backward", source)
    yield _case("grid", dims=3)
    yield _case("jvp")
    yield _case("jvp", layout="nhwc", channels=64)
    yield _case("jvp", "grid")
    yield _case("hvp", "grid")
    yield _case("hvp", "grid", layout="nhwc", channels=64)


CASES = {case.name: case for case in _cases()}
# The hot ones, which are executed: what a training step of images, feature maps and volumes launches.
HOT = (
    *(f"{way}-affine-bilinear-nchw-c{c}-f32" for way in ("forward", "gather", "params") for c in (1, 3, 64)),
    *(f"{way}-affine-bilinear-ncdhw-c1-f32" for way in ("forward", "gather", "params")),
    "forward-affine-bilinear-nchw-c3-bf16+f32",
    *(
        f"{way}-affine-bilinear-nhwc-c64-{dtype}"
        for way in ("forward", "gather")
        for dtype in ("f32", "bf16+f32")
    ),
    "forward-affine-bicubic-nchw-c3-f32",
    "forward-grid-bilinear-nchw-c3-f32",
    "scatter-grid-bilinear-nchw-c3-f32",
    "forward-tps-bilinear-nchw-c3-f32",
    "both-tps-bilinear-nchw-c3-f32",
)
# Of these the test holds the budget: each kernel, and each way to lie in memory.
TOLD = (
    "forward-affine-bilinear-nchw-c3-f32",
    "forward-affine-bilinear-nhwc-c64-bf16+f32",
    "gather-affine-bilinear-nchw-c3-f32",
    "gather-affine-bilinear-nhwc-c64-f32",
    "gather-affine-bilinear-ncdhw-c1-f32",
    "params-affine-bilinear-nchw-c3-f32",
    "params-affine-bilinear-nchw-c64-f32",
    "scatter-grid-bilinear-nchw-c3-f32",
    # not executed: a sort lies between its kernels
    "sorted-sums-grid-bilinear-nhwc-c64-f32",
)
