"""Offsets past 2^31: which width is chosen, that the wide one compiles, and that nothing else overflows.

What a GPU with memory for it runs at full size, the interpreter runs with the limit lowered, and with tensors
of few elements that lie far apart in memory that is never touched.
"""

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl
from common import assert_close, random_grid, random_theta

import stn_triton as stn
from bench import specialisations
from stn_triton import backend, patch
from stn_triton.kernels import derivatives, gather, grid, sample
from stn_triton.kernels.device.arithmetic import divided
from stn_triton.kernels.device.tiles import first_row, pixels_from, row_by_row
from stn_triton.kernels.host import launch
from stn_triton.kernels.modes import Interpolation, Padding, Source
from stn_triton.kernels.spec import Spec, kernel

ROOT = Path(__file__).resolve().parent.parent
MODES = Interpolation.BILINEAR, Padding.ZEROS, False
# Planes with just fewer than 2^31 elements, and with 2^31; and with half as many.
PLANES = (2**16, 2**15 - 1), (2**16, 2**15)
HALF_PLANES = (2**15, 2**15 - 1), (2**15, 2**15)


# ------------------------------------------------------------------------------ which width is chosen
def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def index_of(monkeypatch):
    """The width of offsets that a launcher chooses; nothing runs."""
    found = []

    def record(kernel, programs, device, *args, **kwargs):
        found.append(specialisations.field_of(kwargs["SPEC"], "index"))

    def index_of(launcher, *args):
        found.clear()
        launcher(*args)
        assert len(found) == 1
        return found[0]

    with specialisations.compiling("sm_90"), monkeypatch.context() as patch:
        patch.setattr(launch, "runner", record)
        yield index_of


def test_index_width_follows_the_largest_image():
    """int32 up to 2^31 - 1 elements from an image's first to its last, strides counted, not the batch."""

    def image(*shape):
        return torch.empty(shape, device="meta")

    assert launch.index_dtype(image(100, 1, 2**15, 2**15)) == tl.int32
    assert launch.index_dtype(image(1, 1, 2**16, 2**15 - 1)) == tl.int32
    assert launch.index_dtype(image(1, 1, 2**16, 2**15 + 1)) == tl.int64
    far = image(2**33).as_strided((1, 2, 4, 4), (0, 2**32, 4, 1))
    assert launch.index_dtype(far) == tl.int64
    assert launch.index_dtype(image(1, 1, 4, 4), image(1, 3, 2**16, 2**15 - 1)) == tl.int64
    assert launch.index_dtype(image(1, 1, 2**15, 2**15).expand(1, 64, -1, -1)) == tl.int32


def every_launcher(image, output, params, source, control_points=None, coord_tangent=None):
    """(name, launcher, arguments) of all kernels that sample; the scatter's d image is float32."""
    total = torch.empty_like(image, dtype=torch.float32)
    yield "forward", sample.sample_forward, (image, params, control_points, output, source, *MODES)
    yield (
        "backward",
        sample.sample_backward,
        (output, image, params, control_points, total, source, *MODES, True),
    )
    if source in (Source.AFFINE, Source.PROJECTIVE):
        yield "gather", gather.gather_backward, (output, params, image, source, *MODES)
    if coord_tangent is None:
        arguments = (None, image, params, control_points, None, output, source, *MODES)
        yield "jvp", derivatives.sample_jvp, arguments
        arguments = (output, None, image, params, control_points, None, None, source, *MODES, True)
        yield "hvp", derivatives.sample_hvp, arguments
    else:
        arguments = (image, image, params, control_points, coord_tangent, output, source, *MODES)
        yield "jvp", derivatives.sample_jvp, arguments
        arguments = (output, image, image, params, control_points, coord_tangent, total, source, *MODES, True)
        yield "hvp", derivatives.sample_hvp, arguments


def parameters(source, size):
    """Parameters of one image and, for a spline, control points."""
    dims = len(size)
    if source == Source.GRID:
        return meta(1, *size, dims), None
    if source == Source.FLOW:
        return meta(1, dims, *size), None
    if source == Source.TPS:
        return meta(1, 12, 2, dtype=torch.float32), meta(9, 2, dtype=torch.float32)
    rows = dims if source == Source.AFFINE else 3
    return meta(1, rows, dims + 1, dtype=torch.float32), None


@pytest.mark.parametrize("source", list(Source))
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 4)], ids=["pixels", "channels"])
def test_index_width_of_a_large_image(index_of, source, last, shape):
    """Of every kernel, whether the elements are pixels or channels."""
    params, control_points = parameters(source, (4, 4))
    channels, shrink = shape
    for (height, width), index in zip(PLANES, (tl.int32, tl.int64)):
        image = meta(1, channels, height // shrink, width)
        image = image.to(memory_format=torch.channels_last) if last else image
        output = meta(1, channels, 4, 4)
        for name, launcher, args in every_launcher(image, output, params, source, control_points):
            assert index_of(launcher, *args) == index, name


@pytest.mark.parametrize("source", [Source.AFFINE, Source.PROJECTIVE, Source.TPS])
def test_index_width_of_a_large_output(index_of, source):
    """Of every kernel whose output, or gradient of the output, is the largest."""
    image = meta(1, 1, 4, 4)
    for size, index in zip(PLANES, (tl.int32, tl.int64)):
        params, control_points = parameters(source, size)
        calls = every_launcher(image, meta(1, 1, *size), params, source, control_points)
        for name, launcher, args in calls:
            if name != "hvp":  # it writes two numbers for each pixel
                assert index_of(launcher, *args) == index, name
    for size, index in zip(HALF_PLANES, (tl.int32, tl.int64)):
        params, control_points = parameters(source, size)
        for coord_tangent in (None, meta(1, 1, *size, 2, dtype=torch.float32)):
            calls = every_launcher(image, meta(1, 1, *size), params, source, control_points, coord_tangent)
            hvp = next(call for call in calls if call[0] == "hvp")
            assert index_of(hvp[1], *hvp[2]) == index


@pytest.mark.parametrize("source", [Source.GRID, Source.FLOW])
@pytest.mark.parametrize("expanded", [False, True], ids=["dense", "expanded"])
def test_index_width_of_a_large_grid(index_of, source, expanded):
    """A grid has two numbers for each pixel; where it is expanded in memory, its gradient is not."""
    for size, index in zip(HALF_PLANES, (tl.int32, tl.int64)):
        params, _ = parameters(source, size)
        output = meta(1, 1, *size)
        if expanded:
            shape = params.shape
            params = meta(*(n if n == 2 else 1 for n in shape)).expand(shape)
            output = meta(1, 1, 1, 1).expand(output.shape)
        for name, launcher, args in every_launcher(meta(1, 1, 4, 4), output, params, source):
            assert index_of(launcher, *args) == index, name


@pytest.mark.parametrize("source", [Source.AFFINE, Source.PROJECTIVE, Source.TPS])
def test_index_width_of_a_large_written_grid(index_of, source):
    """``affine_grid`` and its like."""
    for size, index in zip(HALF_PLANES, (tl.int32, tl.int64)):
        params, control_points = parameters(source, size)
        target = meta(1, *size, 2)
        assert index_of(grid.grid_forward, params, control_points, target, source, False) == index
        assert index_of(grid.grid_backward, target, params, control_points, source, False) == index


def test_index_width_of_many_rows(index_of):
    """A volume of 2^31 rows is counted in 64 bits, also where its gradient spans one element."""
    params = meta(1, 3, 4, dtype=torch.float32)
    for size, index in zip(PLANES, (tl.int32, tl.int64)):
        output = meta(1, 1, 1, 1, 1).expand(1, 1, *size, 1)
        image = meta(1, 1, 4, 4, 4)
        arguments = (output, image, params, None, None, Source.AFFINE, *MODES, True)
        assert index_of(sample.sample_backward, *arguments) == index
        target = meta(1, 1, 1, 1, 1).expand(1, *size, 1, 3)
        assert index_of(grid.grid_backward, target, params, None, Source.AFFINE, False) == index


@pytest.mark.parametrize("hip, most", [(None, 2**31 - 1), ("7.2", 2**26 - 1)])
def test_too_many_tiles_are_refused(monkeypatch, hip, most):
    """A launch has 2^31 - 1 programs at most, and on AMD's GPUs fewer than 2^32 lanes."""
    monkeypatch.setattr(torch.version, "hip", hip)
    params, image = meta(most + 1, 2, 3), meta(most + 1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{most + 1} tiles of pixels are more than the {most} "):
        sample.sample_forward(image, params, None, image, Source.AFFINE, *MODES)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_too_long_an_axis_is_refused(axis):
    """Twice its pixels are counted in 32 bits. PyTorch's samplers, patched, keep theirs."""
    long, short = torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 2**30), torch.zeros(1, 1, 1, 4)
    image, output = (long, short) if axis == "input" else (short, long)
    params = torch.eye(2, 3)[None]
    with pytest.raises(ValueError, match=rf"{axis} must have 2\^30 - 1 pixels at most along each axis"):
        sample.sample_forward(image, params, None, output, Source.AFFINE, *MODES)
    with pytest.raises(ValueError, match=f"{axis} must have"):
        gather.gather_backward(output, params, image, Source.AFFINE, *MODES)
    grids = torch.zeros(1, 1, 1, 2).expand(*output.shape[:1], *output.shape[2:], 2)
    with backend.use("triton"):
        assert not patch._fits(2, image, grids, 0, 0)
        assert patch._fits(2, short, torch.zeros(1, 1, 4, 2), 0, 0)


COMPILE = """
import sys
import torch
from triton import language as tl
sys.path.insert(0, "tests")
import test_large as large
from bench import specialisations
from stn_triton.kernels import gather, grid, sample
from stn_triton.kernels.host import launch
from stn_triton.kernels.modes import Interpolation, Padding, Source

done = []
averaged = Interpolation.AVERAGED, Padding.CIRCULAR, False
for source, size, modes in (
    (Source.AFFINE, large.PLANES[1], large.MODES),
    (Source.GRID, large.HALF_PLANES[1], large.MODES),
    (Source.PROJECTIVE, large.PLANES[1], averaged),
):
    params, _ = large.parameters(source, size)
    image = output = large.meta(1, 1, *size)
    coord_tangent = large.meta(1, 1, *size, 2, dtype=torch.float32)
    calls = list(large.every_launcher(image, output, params, source, None, coord_tangent))
    if modes is averaged:
        calls = [
            ("forward", sample.sample_forward, (image, params, None, output, source, *modes)),
            ("backward", sample.sample_backward, (output, image, params, None, None, source, *modes, True)),
            ("gather", gather.gather_backward, (output, params, image, source, *modes)),
        ]
    if source == Source.AFFINE:
        target = large.meta(1, *size, 2)
        calls.append(("grid", grid.grid_forward, (params, None, target, source, False)))
        calls.append(("grid backward", grid.grid_backward, (target, params, None, source, False)))
    for name, launcher, args in calls:
        with specialisations.compiling("sm_90") as compiled:
            compile_only = launch.runner
            found = []

            def note(*args, **kwargs):
                found.append(specialisations.field_of(kwargs["SPEC"], "index"))
                compile_only(*args, **kwargs)

            launch.runner = note
            launcher(*args)
        assert found == [tl.int64], (name, found)
        assert compiled[-1].asm["cubin"]
        done.append(name)
print(len(done), sorted(set(done)))
"""


def test_wide_offsets_compile():
    """Each kernel for sm_90, with tensors whose strides fit 32 bits where their offsets do not.

    Narrow offsets are compiled, and executed, by ``test_compiled.py``.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("14 "), result.stdout


# ----------------------------------------------------------------------------------- far apart in memory
FAR = 2**30 + 8


def far_apart(tensor, dim):
    """The same values, more than 2^30 elements apart along ``dim``: no stride passes 2^31, but its double.

    A GPU has all the memory between, a CPU only its addresses.
    """
    assert tensor.shape[dim] >= 3
    strides = list(torch.empty(tensor.shape, device="meta").stride())
    strides[dim] = FAR
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides))
    gc.collect()
    try:
        memory = torch.empty(span, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError:
        pytest.skip(f"needs {span * tensor.element_size() / 2**30:.0f} GiB of address space")
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def far_cases():
    """(launcher, which of its tensors, dimension)."""
    cases = []
    for which, kinds, dims in (
        ("image", ("forward", "backward", "jvp", "hvp"), (0, 1, 2)),
        ("output", ("forward", "backward", "gather", "jvp", "hvp"), (0, 1, 3)),
        ("grad_input", ("backward", "gather", "hvp"), (1, 4)),
        ("grid", ("forward", "backward"), (0, 1, 4)),
        ("flow", ("forward", "backward"), (0, 1, 3)),
        ("theta", ("forward", "backward", "gather", "grid", "grid_backward"), (1, 2)),
        ("coord_tangent", ("jvp", "hvp"), (0, 3, 5)),
        ("written", ("grid", "grid_backward"), (0, 2, 4)),
    ):
        cases += [(kind, which, dim) for kind in kinds for dim in dims]
    return cases


@pytest.mark.parametrize("kind, which, dim", far_cases())
def test_tensors_far_apart(device, kind, which, dim):
    """In a volume: each kernel, with one of its tensors spread out along one dimension."""
    batch = 3 if dim == 0 else 1
    channels = 3 if dim == 1 else 1
    size, in_size = (3, 3, 3), (3, 3, 3)
    source = {"grid": Source.GRID, "flow": Source.FLOW}.get(which, Source.AFFINE)
    params = random_theta(batch, 3, torch.float32, device)
    if source == Source.GRID:
        params = random_grid(batch, size, torch.float16, device)
    elif source == Source.FLOW:
        params = torch.randn(batch, 3, *size, device=device).half()
    tensors = {
        "image": torch.randn(batch, channels, *in_size, device=device).half(),
        "output": torch.randn(batch, channels, *size, device=device).half(),
        "coord_tangent": torch.randn(batch, 1, *size, 3, device=device),
        "written": torch.randn(batch, *size, 3, device=device).half(),
        "params": params,
    }
    dtype = torch.float16 if kind == "gather" else torch.float32
    tensors["grad_input"] = torch.zeros(batch, channels, *in_size, dtype=dtype, device=device)

    def run(image, output, coord_tangent, written, params, grad_input):
        """All that is written."""
        results = []
        if kind == "forward":
            sample.sample_forward(image, params, None, output, source, *MODES)
            results = [output]
        elif kind == "backward":
            found = sample.sample_backward(output, image, params, None, grad_input, source, *MODES, True)
            results = [grad_input, found[0]]
        elif kind == "gather":
            gather.gather_backward(output, params, grad_input, source, *MODES)
            results = [grad_input]
        elif kind == "jvp":
            derivatives.sample_jvp(image, None, params, None, coord_tangent, output, source, *MODES)
            results = [output]
        elif kind == "hvp":
            by_coordinates = derivatives.sample_hvp(
                output, image, None, params, None, coord_tangent, grad_input, source, *MODES, True
            )
            results = [grad_input, by_coordinates]
        elif kind == "grid":
            grid.grid_forward(params, None, written, source, False)
            results = [written]
        else:
            results = [grid.grid_backward(written, params, None, source, False)[0]]
        return [result.clone() for result in results]

    wanted = run(**{name: tensor.clone() for name, tensor in tensors.items()})
    name = "params" if which in ("grid", "flow", "theta") else which
    for found, result in zip(run(**tensors | {name: far_apart(tensors[name], dim)}), wanted):
        assert_close(found, result)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("what", ["forward", "backward", "control"])
def test_splines_far_apart(device, what, batch):
    """The rows of a spline's coefficients, for a group of outputs and for one."""
    spline = torch.randn(batch, 6, 2, device=device).half()
    control_points = torch.rand(3, 2, device=device)
    image = torch.randn(batch, 1, 4, 4, device=device)
    output = torch.randn(batch, 1, 3, 3, device=device)

    def run(spline):
        arguments = spline, control_points
        if what == "forward":
            sample.sample_forward(image, *arguments, output, Source.TPS, *MODES)
            return [output.clone()]
        by_controls = what == "control"
        found = sample.sample_backward(output, image, *arguments, None, Source.TPS, *MODES, True, by_controls)
        return found if by_controls else found[:1]

    wanted = run(spline)
    for found, result in zip(run(far_apart(spline, 1)), wanted):
        assert_close(found, result)


@kernel()
def pixels_kernel(result_ptr, tile, column_tiles, out_width, out_height, out_depth, SPEC: tl.constexpr):
    row_tile, column_tile = divided(tile, column_tiles)
    row = first_row(row_tile, SPEC.rows, SPEC)
    size = (out_width, out_height, out_depth)
    numbers = row_by_row(SPEC.rows * SPEC.columns)
    out, mask = pixels_from(column_tile * SPEC.columns, row, size, numbers, SPEC.columns, SPEC)
    target = result_ptr + 4 * tl.arange(0, SPEC.rows)[:, None]
    for axis in tl.static_range(3):
        tl.store(target + axis, out[axis].to(tl.int64))
    tl.store(target + 3, mask.to(tl.int64))


@pytest.mark.parametrize("height, depth", [(2**16 - 1, 2**16 + 3), (2**30, 5), (3, 2**30 - 1)])
def test_rows_of_a_tall_volume(device, height, depth):
    """Tiles know their rows, depth * height of them, past 2^31."""
    rows, width, columns = 8, 2, 2
    spec = Spec(
        source=int(Source.AFFINE),
        interpolation=int(Interpolation.BILINEAR),
        padding=(0, 0, 0),
        align_corners=0,
        dims=3,
        compute=tl.float32,
        index=tl.int64,
        rows=rows,
    )
    for row in (0, 2**31 - rows, 2**31, height * depth // rows * rows):
        result = torch.empty(rows, 4, dtype=torch.int64, device=device)
        tile = row // rows * columns + 1
        pixels_kernel[(1,)](result, tile, columns, width, height, depth, SPEC=spec)
        for place, (x, y, z, exists) in enumerate(result.tolist(), start=row):
            assert (x, y, z) == (1, place % height, place // height)
            assert exists == (place < height * depth)


# ------------------------------------------------------------------------------------------- at full size
class Scale:
    """Sizes past 2^31 elements on a GPU; on the CPU small ones, with offsets of 64 bits all the same."""

    def __init__(self, device, monkeypatch):
        self.full = device.type != "cpu"
        self.device = device
        self.monkeypatch = monkeypatch
        if self.full:
            gc.collect()
            module = torch.get_device_module(device)
            module.empty_cache()
            free = module.mem_get_info()[0]
            if free < 48 * 2**30:
                pytest.skip(f"needs 48 GiB of the GPU's memory, {free / 2**30:.0f} are free")

    def pick(self, full, small):
        return full if self.full else small

    @contextlib.contextmanager
    def wide(self):
        """Around what is large."""
        with self.monkeypatch.context() as patch:
            if not self.full:
                patch.setattr(launch, "INT32_MAX", 0)
                assert launch.index_dtype(self.zeros(1, 1, 2, 2)) == tl.int64
            yield

    def run(self, function, tensors, grad_output):
        """The output and the gradient by each tensor, all of it large."""
        with self.wide():
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            output = function(*leaves)
            return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))

    def zeros(self, *shape):
        return torch.zeros(shape, dtype=torch.float16, device=self.device)


@pytest.fixture
def scale(device, monkeypatch):
    yield Scale(device, monkeypatch)
    gc.collect()


def corner(tensor, size):
    """The last ``size`` of the pixels of (N, C, ...), as a tensor of its own."""
    return tensor[(..., *(slice(-n, None) for n in size))].clone()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("source", ["affine", "grid"])
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
def test_large_by_channels(scale, device, dims, source, last):
    """Image, output and their gradients: the last channels are those of an image that has only these."""
    size = scale.pick({2: (256, 256), 3: (32, 32, 64)}, {2: (5, 6), 3: (3, 4, 5)})[dims]
    channels, few = scale.pick(2**15 + 4, 20), 4
    layout = torch.contiguous_format
    if last:
        layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    image = torch.empty(
        (1, channels, *size), dtype=torch.float16, device=device, memory_format=layout
    ).normal_()
    grad_output = torch.zeros_like(image)
    grad_output[:, -few:].normal_()
    if source == "affine":
        params = random_theta(1, dims, torch.float32, device)
        function = stn.affine_grid_sample
    else:
        params = random_grid(1, size, torch.float16, device)

        def function(image, grid):
            return stn.grid_sample(image, grid, align_corners=False)

    found = scale.run(function, (image, params), grad_output)
    image, grad_output = (
        tensor[:, -few:].contiguous(memory_format=layout) for tensor in (image, grad_output)
    )
    leaves = image.requires_grad_(), params.requires_grad_()
    output = function(*leaves)
    wanted = (output, *torch.autograd.grad(output, leaves, grad_output))
    assert_close(found[0][:, -few:], wanted[0])
    assert_close(found[1][:, -few:], wanted[1])
    assert not found[1][:, :few].any()
    assert_close(found[2], wanted[2])


def small_map(device):
    """theta (1, 2, 3) of few bits: coordinates are exact where sizes are powers of two."""
    return torch.tensor([[[0.5, 0.125, 0.0625], [-0.125, 0.5, -0.03125]]], device=device)


def test_large_image_is_read_to_its_end(scale, device):
    """The last pixels of a plane of 2^31, with the coordinates of a small image that has only these."""
    size, window = scale.pick((2**17, 2**14), (64, 32)), scale.pick((128, 128), (16, 16))
    image = scale.zeros(1, 1, *size)
    image[..., -window[0] :, -window[1] :].normal_()
    ratio = torch.tensor([[n / m] for n, m in zip(reversed(size), reversed(window))], device=device)
    offset = (ratio - 1) * torch.tensor([0.0, 0.0, 1.0], device=device)

    def in_window(theta):
        """A map into the image as one into the window."""
        return theta * ratio - offset

    theta = (small_map(device) + offset) / ratio
    grad_output = torch.randn(1, 1, *window, device=device).half()

    def function(image, theta):
        return stn.affine_grid_sample(image, theta, window)

    found = scale.run(function, (image, theta), grad_output)
    leaves = corner(image, window).requires_grad_(), theta.requires_grad_()
    output = function(leaves[0], in_window(leaves[1]))
    wanted = (output, *torch.autograd.grad(output, leaves, grad_output))
    assert_close(found[0], wanted[0])
    assert_close(corner(found[1], window), wanted[1])
    assert_close(found[2], wanted[2])


def of_corner(theta, size, window):
    """What ``theta`` makes of the last ``window`` of ``size`` output pixels, as a map of its own."""
    ratio = torch.tensor([m / n for n, m in zip(reversed(size), reversed(window))], device=theta.device)
    linear = theta[..., :2]
    return torch.cat([linear * ratio, theta[..., 2:] + (linear * (1 - ratio)).sum(-1, keepdim=True)], -1)


def test_large_output_is_written_to_its_end(scale, device):
    """The last pixels of a plane of 2^31, beside an output of these alone; and their gradients."""
    size, window = scale.pick((2**17, 2**14), (64, 32)), (16, 16)
    image, theta = torch.randn(1, 1, 32, 32, device=device).half(), small_map(device)
    grad_output = scale.zeros(1, 1, *size)
    grad_output[..., -window[0] :, -window[1] :].normal_()
    found = scale.run(
        lambda image, theta: stn.affine_grid_sample(image, theta, size), (image, theta), grad_output
    )
    leaves = image.requires_grad_(), theta.requires_grad_()
    output = stn.affine_grid_sample(image, of_corner(theta, size, window), window)
    wanted = (output, *torch.autograd.grad(output, leaves, corner(grad_output, window)))
    assert_close(corner(found[0], window), wanted[0])
    assert_close(found[1], wanted[1])
    assert_close(found[2], wanted[2])


def test_large_grid_is_written_to_its_end(scale, device):
    """``affine_grid`` of 2^30 pixels, two numbers each."""
    size, window = scale.pick((2**16, 2**14), (64, 32)), (16, 16)
    theta = small_map(device)
    grad_grid = torch.zeros(1, *size, 2, device=device)
    grad_grid[:, -window[0] :, -window[1] :].normal_()

    def function(theta):
        return stn.affine_grid(theta, (1, 1, *size), align_corners=False)

    found = scale.run(function, (theta,), grad_grid)
    theta.requires_grad_()
    output = stn.affine_grid(of_corner(theta, size, window), (1, 1, *window), align_corners=False)
    (wanted,) = torch.autograd.grad(output, theta, grad_grid[:, -window[0] :, -window[1] :].clone())
    assert_close(found[0][:, -window[0] :, -window[1] :], output)
    assert_close(found[1], wanted)


def test_large_grid_is_read_to_its_end(scale, device):
    """A grid of 2^30 pixels, and its gradient."""
    size, window = scale.pick((2**15, 2**15), (64, 32)), (16, 16)
    image = torch.randn(1, 1, 32, 32, device=device).half()
    grid = scale.zeros(1, *size, 2)
    grid[:, -window[0] :, -window[1] :].uniform_(-1.2, 1.2)
    grad_output = scale.zeros(1, 1, *size)
    grad_output[..., -window[0] :, -window[1] :].normal_()

    def function(image, grid):
        return stn.grid_sample(image, grid, align_corners=False)

    found = scale.run(function, (image, grid), grad_output)
    leaves = image.requires_grad_(), grid[:, -window[0] :, -window[1] :].clone().requires_grad_()
    output = function(*leaves)
    wanted = (output, *torch.autograd.grad(output, leaves, corner(grad_output, window)))
    assert_close(corner(found[0], window), wanted[0])
    assert_close(found[1], wanted[1])
    assert_close(found[2][:, -window[0] :, -window[1] :], wanted[2])
