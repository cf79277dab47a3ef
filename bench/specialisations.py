"""Every specialisation of the kernels that can be launched, compiled for GPUs that need not be there.

    python -m bench.specialisations [--all] [--target sm_90] [--shard 1/8] [--list]

The launchers themselves choose what is compiled: they are called with tensors that have a shape, strides
and a dtype but no memory, and each launch is compiled instead of run. The interpreter accepts programs
that the compiler refuses; this is the test that it does not refuse ours.

``--all`` is the full product of the axes below and takes hours on a few cores (``--shard`` divides it);
without it, a subset in which every pair of values of two axes meets (of dtypes, the common combinations). Of
the subset ptxas sees what is for sm_90 alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from stn_triton.kernels import coefficients, derivatives, gather, grid, sample
from stn_triton.kernels.host import launch
from stn_triton.kernels.modes import NAMED_PADDINGS, Interpolation, Padding, Source
from stn_triton.kernels.sort import sorted_backward
from stn_triton.kernels.spec import Spec

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F16, BF16, F32, F64)
INTEGERS = (torch.uint8, torch.int16)
# Of the image and the parameters: for the subset, alike or the ones used together.
COMMON_DTYPES = ((F32, F32), (F64, F64), (BF16, BF16), (F16, F32), (F32, F64))


class Layout(NamedTuple):
    """Channels, and whether the input and the output have them innermost."""

    channels: int
    input_last: bool
    output_last: bool


# One for each pattern that ``configs.choose`` and the launchers tell apart: unrolled channels, even and
# uneven blocks, vectors of every width, and layouts that differ between input and output.
LAYOUTS = (
    Layout(1, False, False),
    Layout(2, False, False),
    Layout(3, False, False),
    Layout(4, False, False),
    Layout(5, False, False),
    Layout(64, False, False),
    Layout(3, True, True),
    Layout(4, True, False),
    Layout(8, True, True),
    Layout(9, True, True),
    Layout(12, True, True),
    Layout(20, True, True),
    Layout(64, True, True),
    Layout(64, True, False),
    Layout(64, False, True),
    Layout(72, True, True),
)
MODES: dict[str, tuple] = {
    "interpolation": tuple(code for code in Interpolation if code != Interpolation.AVERAGED),
    "padding": NAMED_PADDINGS,
    "align_corners": (False, True),
    "dims": (2, 3),
}
WIDTHS: dict[str, tuple] = {
    "layout": LAYOUTS,
    "columns": (1, 2, 4, 8, 16, 32),
    "batch": (2, 4),  # 4 outputs share a spline's basis
    "wide": (False, True),  # offsets of 64 bits
    "aligned": (True, False),  # pointers at multiples of 16 bytes
}
# Of the kernels that make averages.
AVERAGES: dict[str, tuple] = {"interpolation": tuple(Interpolation), "padding": tuple(Padding)}
AXES: dict[str, dict[str, tuple]] = {
    "forward": {
        "source": tuple(Source),
        "dtypes": tuple(itertools.product((*DTYPES, *INTEGERS), DTYPES)),
        **MODES,
        **AVERAGES,
        **WIDTHS,
        "fill": (False, True),
    },
    "backward": {
        "gradients": ("input", "params", "both", "control"),
        "source": tuple(Source),
        "dtypes": tuple(itertools.product(DTYPES, DTYPES)),
        **MODES,
        **AVERAGES,
        **WIDTHS,
    },
    "gather": {
        "source": (Source.AFFINE, Source.PROJECTIVE),
        "dtypes": tuple(itertools.product(DTYPES, DTYPES)),
        **MODES,
        **AVERAGES,
        **WIDTHS,
    },
    "derivatives": {
        # of the samples along a tangent of the image, of the coordinates, or both; of both gradients, either
        # or both
        "wanted": (
            "along_tangent",
            "along_coord_tangent",
            "along_both",
            "input",
            "coordinates_tangent",
            "coordinates_coord_tangent",
            "both",
        ),
        "source": tuple(Source),
        "dtypes": tuple(itertools.product(DTYPES, DTYPES)),
        **MODES,
        **WIDTHS,
    },
    "sort": {
        "coord_tangent": (False, True),
        "source": tuple(Source),
        "dtypes": tuple(itertools.product(DTYPES, DTYPES)),
        **MODES,
        **WIDTHS,
        "transforms": (1, 2),
        "even": (True, False),  # rows that follow each other in memory without a gap
    },
    "grid": {
        "direction": ("forward", "backward", "control"),
        "source": (Source.AFFINE, Source.PROJECTIVE, Source.TPS),
        "dtype": DTYPES,
        "align_corners": (False, True),
        "dims": (2, 3),
        "columns": WIDTHS["columns"],
        "wide": (False, True),
    },
    # from points to coefficients, or transposed back
    "product": {"points": DTYPES, "coefficients": (F32, F64), "transposed": (False, True)},
}
SUBSET_AXES = {
    kernel: {**axes, "dtypes": COMMON_DTYPES} if "dtypes" in axes else axes for kernel, axes in AXES.items()
}
SUBSET_AXES["forward"]["dtypes"] = (*COMMON_DTYPES, *((dtype, F32) for dtype in INTEGERS))
# What a layout decides, vectors and even blocks, is alike in all kernels: each meets a part of the layouts.
# The compiler takes long for a gather of 64 channels innermost; the budget's test has one.
SUBSET_AXES["forward"]["layout"] = (
    Layout(1, False, False),
    Layout(4, False, False),
    Layout(3, True, True),
    Layout(9, True, True),
    Layout(12, True, True),
    Layout(64, True, False),
)
SUBSET_AXES["backward"]["layout"] = (
    Layout(2, False, False),
    Layout(4, True, False),
    Layout(8, True, True),
    Layout(20, True, True),
    Layout(64, False, True),
)
SUBSET_AXES["gather"]["layout"] = (
    Layout(2, False, False),
    Layout(9, True, True),
    Layout(64, True, False),
)
SUBSET_AXES["derivatives"]["layout"] = (
    Layout(5, False, False),
    Layout(4, True, False),
    Layout(64, True, True),
)
SUBSET_AXES["sort"]["layout"] = (
    Layout(3, False, False),
    Layout(4, True, False),
    Layout(9, True, True),
    Layout(64, False, False),
)
# Widths of columns differ in the same lines of all kernels: forward ones meet them all.
SUBSET_AXES["backward"]["columns"] = (1, 8, 32)
for kernel in ("gather", "derivatives", "sort"):
    SUBSET_AXES[kernel]["columns"] = (1, 32)
SUBSET_AXES["grid"] = {**AXES["grid"], "columns": (1, 4, 32)}
Case = dict[str, Any]


def possible(case: Case) -> bool:
    """Homographies and splines are planar, only splines have control points, a grid has the image's dtype.

    Grids and flows have no transforms. A fill goes with zeros and border padding.
    """
    source = case.get("source")
    by_controls = "control" in (case.get("gradients"), case.get("direction"))
    if by_controls and source not in (None, Source.TPS):
        return False
    if case.get("dims") == 3 and (by_controls or source in (Source.PROJECTIVE, Source.TPS)):
        return False
    if source in (Source.GRID, Source.FLOW) and case.get("transforms", 1) > 1:
        return False
    if case.get("coord_tangent") and case.get("interpolation") == Interpolation.NEAREST:
        return False
    if case.get("fill") and case.get("padding", Padding.ZEROS) not in (Padding.ZEROS, Padding.BORDER):
        return False
    framed = case.get("padding") == Padding.FRAMED  # of averages alone
    if framed and case.get("interpolation") not in (None, Interpolation.AVERAGED):
        return False
    if framed or case.get("interpolation") == Interpolation.AVERAGED:
        # of matrices, whose image has the gather
        if source not in (None, Source.AFFINE, Source.PROJECTIVE):
            return False
        if case.get("gradients") not in (None, "params"):
            return False
    dtypes = case.get("dtypes")
    if source == Source.GRID and dtypes is not None and dtypes[0] != dtypes[1]:
        return False
    # nearest samples have no gradient by the parameters
    return case.get("interpolation") != Interpolation.NEAREST or case.get("gradients") in (None, "input")


def affordable(case: Case) -> bool:
    """Whether a case is for the subset: the others take the compiler much longer.

    Those have many loads in one loop: four outputs' of a cubic or channels-last spline, 64 taps of many
    channels or of second derivatives. No two options alone make a case unaffordable.
    """
    cubic, layout = case.get("interpolation") == Interpolation.BICUBIC, case.get("layout")
    if case.get("source") == Source.TPS and case.get("batch") == 4 and layout is not None:
        return not (cubic or layout.input_last)
    if not (cubic and case.get("dims") == 3):
        return True
    twice = case.get("wanted", "").startswith(("both", "coordinates"))
    return not twice and (layout is None or layout.channels <= 5)


def all_cases() -> Iterator[Case]:
    """The full product."""
    for kernel, axes in AXES.items():
        for values in itertools.product(*axes.values()):
            case = {"kernel": kernel, **dict(zip(axes, values))}
            if possible(case):
                yield case


def pairwise_cases() -> Iterator[Case]:
    """A subset in which every possible pair of values of two axes of a kernel meets (greedy, repeatable)."""
    for kernel, axes in SUBSET_AXES.items():
        names = list(axes)
        missing = {
            (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]
        }
        order = sorted(missing, key=repr)
        while order:
            order = [pair for pair in order if pair in missing]
            found = None
            for a, x, b, y in order:
                found = _extend({a: x, b: y}, axes, missing)
                if found is not None:
                    break
            if found is None:  # what is left meets in no possible case
                break
            missing -= {(a, found[a], b, found[b]) for a, b in itertools.combinations(names, 2)}
            yield {"kernel": kernel, **found}


def _extend(start: Case, axes: dict[str, tuple], missing: set) -> Case | None:
    """A possible case that contains ``start`` and, chosen axis by axis, as many missing pairs as it can."""
    names = list(axes)
    partial = dict(start)
    for name in sorted((n for n in names if n not in start), key=lambda n: -len(axes[n])):

        def gain(value: Any, name: str = name) -> int:
            pairs = (
                (name, value, other, partial[other])
                if names.index(name) < names.index(other)
                else (other, partial[other], name, value)
                for other in partial
            )
            return sum(pair in missing for pair in pairs)

        for value in sorted(axes[name], key=gain, reverse=True):
            if possible({**partial, name: value}) and affordable({**partial, name: value}):
                partial[name] = value
                break
        else:
            return None
    if not (possible(partial) and affordable(partial)):
        return None
    return {name: partial[name] for name in names}


# ------------------------------------------------------------------------------------------- launching
PLAIN = {"last": False, "wide": False, "aligned": True}


def _tensor(
    shape: tuple[int, ...], dtype: torch.dtype, *, last: bool, wide: bool, aligned: bool
) -> torch.Tensor:
    """A tensor without memory: (N, C, ...), channels innermost if ``last``, offsets past 2^31 if ``wide``."""
    order = [0, *range(2, len(shape)), 1] if last else list(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
        if wide and dim == order[-1]:
            step = 2**31
    span = 2 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    return torch.empty(span, dtype=dtype, device="meta").as_strided(shape, strides, 0 if aligned else 1)


def _parameters(case: Case, dtype: torch.dtype, size: tuple[int, ...], batch: int) -> tuple[Any, Any]:
    """The parameters of a source, and a spline's control points."""
    dims, source = case["dims"], case["source"]
    shapes = {
        Source.GRID: (batch, *size, dims),
        Source.AFFINE: (batch, dims, dims + 1),
        Source.PROJECTIVE: (batch, 3, 3),
        Source.TPS: (batch, 9 + 3, 2),
        Source.FLOW: (batch, dims, *size),
    }
    control_points = _tensor((9, 2), dtype, **PLAIN) if source == Source.TPS else None
    return _tensor(shapes[source], dtype, **PLAIN), control_points


def _sort(case: Case, size: tuple[int, ...]) -> None:
    """Calls the launcher of the sorted backward; both images have the size ``size``."""
    layout, (dtype, params_dtype) = case["layout"], case["dtypes"]
    batch, transforms = case["batch"], case["transforms"]
    params, control_points = _parameters(case, params_dtype, size, batch * transforms)
    gap = 0 if case["even"] else 1
    rows = (*size[:-1], size[-1] + gap)
    memory = {"wide": case["wide"], "aligned": case["aligned"]}
    output = _tensor((batch * transforms, layout.channels, *rows), dtype, last=layout.output_last, **memory)
    output = output[..., : size[-1]]
    if transforms > 1:
        output, params = (tensor.unflatten(0, (batch, transforms)) for tensor in (output, params))
    coord_tangent, total = None, dtype
    if case["coord_tangent"]:
        total = launch.compute_dtypes(output, params)[1]
        coord_tangent = _tensor((batch, transforms, *size, len(size)), total, **PLAIN)
    input = _tensor((batch, layout.channels, *size), total, last=layout.input_last, **memory)
    modes = case["source"], case["interpolation"], case["padding"], case["align_corners"]
    sorted_backward(output, params, control_points, input, *modes, coord_tangent)


def compile_case(case: Case) -> list[Any]:
    """Calls the launcher of a case inside ``compiling``; returns the compiled kernels."""
    start = len(_compiled)
    if case["kernel"] == "product":
        pair = _tensor((2, 9, 2), case["points"], **PLAIN), _tensor((2, 12, 2), case["coefficients"], **PLAIN)
        given, found = reversed(pair) if case["transposed"] else pair
        matrix = _tensor((12, 9), F64, **PLAIN)
        coefficients.spline_product(matrix.mT if case["transposed"] else matrix, given, found)
        return _compiled[start:]

    dims, align_corners, columns = case["dims"], case["align_corners"], case["columns"]
    size = (9,) * (dims - 1) + (columns,)
    if case["kernel"] == "grid":
        params, control_points = _parameters(case, case["dtype"], size, 2)
        target = _tensor((2, *size, dims), case["dtype"], last=False, wide=case["wide"], aligned=True)
        if case["direction"] == "forward":
            grid.grid_forward(params, control_points, target, case["source"], align_corners)
        else:
            control = case["direction"] == "control"
            grid.grid_backward(target, params, control_points, case["source"], align_corners, control)
        return _compiled[start:]

    if case["kernel"] == "sort":
        _sort(case, size)
        return _compiled[start:]

    layout, (dtype, params_dtype) = case["layout"], case["dtypes"]
    modes = case["source"], case["interpolation"], case["padding"], align_corners
    memory = {"wide": case["wide"], "aligned": case["aligned"]}
    batch, channels = case["batch"], layout.channels
    input = _tensor((batch, channels, *(9,) * dims), dtype, last=layout.input_last, **memory)
    output = _tensor((batch, channels, *size), dtype, last=layout.output_last, **memory)
    params, control_points = _parameters(case, params_dtype, size, batch)
    if case["kernel"] == "gather":
        gather.gather_backward(output, params, input, *modes)
    elif case["kernel"] == "forward":
        fill = None
        if case["fill"]:
            fill = _tensor((batch, channels), launch.compute_dtypes(input, params)[1], **PLAIN)
        sample.sample_forward(input, params, control_points, output, *modes, fill)
    elif case["kernel"] == "derivatives":
        _compile_derivatives(case["wanted"], input, output, params, control_points, modes, layout, memory)
    else:
        total = None
        wanted = case["gradients"]
        if wanted in ("input", "both"):
            compute = launch.compute_dtypes(input, params)[1]
            total = _tensor(tuple(input.shape), compute, last=layout.input_last, **memory)
        sample.sample_backward(
            output, input, params, control_points, total, *modes, wanted != "input", wanted == "control"
        )
    return _compiled[start:]


def _compile_derivatives(
    wanted: str,
    input: torch.Tensor,
    output: torch.Tensor,
    params: torch.Tensor,
    control_points: torch.Tensor | None,
    modes: tuple[Source, Interpolation, Padding, bool],
    layout: Layout,
    memory: dict[str, bool],
) -> None:
    """The tangent has the output's layout; that of the coordinates is dense."""
    dims, compute = input.dim() - 2, launch.compute_dtypes(input, params)[1]
    shape, dtype = tuple(input.shape), input.dtype
    tangent = coord_tangent = total = None
    if wanted not in ("along_coord_tangent", "input", "coordinates_coord_tangent"):
        tangent = _tensor(shape, dtype, last=layout.output_last, **memory)
    if wanted not in ("along_tangent", "coordinates_tangent"):
        rows = (shape[0], 1, *output.shape[2:], dims)
        coord_tangent = _tensor(rows, compute, last=False, wide=False, aligned=True)
    if wanted in ("input", "both"):
        total = _tensor(shape, compute, last=layout.input_last, **memory)
    image = None if coord_tangent is None or wanted == "input" else input
    if wanted.startswith("along"):
        derivatives.sample_jvp(image, tangent, params, control_points, coord_tangent, output, *modes)
    else:
        by_coordinates = wanted != "input"
        derivatives.sample_hvp(
            output, image, tangent, params, control_points, coord_tangent, total, *modes, by_coordinates
        )


_compiled: list[Any] = []


class Launch(NamedTuple):
    """What a launcher asked for: a kernel, how many programs of it, and its arguments by name."""

    compiled: Any
    programs: int
    arguments: dict[str, Any]


def field_of(spec: Spec, name: str) -> Any:
    """The value of a ``Spec``'s field, compiled or interpreted."""
    value = getattr(spec, name)
    return value.value if isinstance(value, tl.constexpr) else value


class _Driver:
    """As much of a Triton driver as compiling needs."""

    first_device = 1000

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        # Triton caches kernels by device: each target is one
        return self.first_device + list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(target: str, launches: list[Launch] | None = None) -> Iterator[list[Any]]:
    """Inside, every launch is compiled for ``target`` instead of run; yields the list of compiled kernels.

    ``launches``: to which the launches are added, with their arguments.
    """

    def compile_only(kernel: Any, programs: int, device: torch.device, *args: Any, **kwargs: Any) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), **kwargs)
        _compiled.append(compiled)
        if launches is not None:
            arguments = {**dict(zip(kernel.arg_names, args)), **kwargs}
            launches.append(Launch(compiled, programs, arguments))

    active = triton.runtime.driver
    before = active._active
    active.set_active(_Driver(target))
    launch.runner = compile_only
    try:
        yield _compiled
    finally:
        launch.runner = launch.run
        active._active = before


@contextmanager
def without_machine_code() -> Iterator[None]:
    """Inside, Triton stops at PTX: ptxas takes a third of the time.

    What is compiled has names of its own in Triton's caches, where a launch finds no kernel without its code.
    """
    name = CUDABackend.hash
    with (
        mock.patch.object(CUDABackend, "make_cubin", return_value=b"none"),
        mock.patch.object(CUDABackend, "hash", lambda self: f"{name(self)}-ptx"),
        mock.patch.object(_Driver, "first_device", 2000),
    ):
        yield


def describe(case: Case) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Layout):
            kinds = {False: "planar", True: "last"}
            return f"{value.channels}:{kinds[value.input_last]}->{kinds[value.output_last]}"
        if isinstance(value, tuple):
            return "/".join(map(text, value))
        return str(getattr(value, "name", value)).removeprefix("torch.").lower()

    return " ".join(f"{name}={text(value)}" for name, value in case.items())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--all", action="store_true", help="the full product, not only a subset with all pairs"
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all in turn")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every Nth case, from the Ith on")
    parser.add_argument("--list", action="store_true", help="print the cases and compile nothing")
    options = parser.parse_args()
    index, count = map(int, options.shard.split("/"))
    if not 1 <= index <= count:
        parser.error(f"--shard: 1 <= I <= N must hold, got {options.shard}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")

    targets = options.target or list(TARGETS)
    if options.all:
        work = ((target, case) for case in all_cases() for target in targets)
    else:  # the targets take turns
        work = ((targets[i % len(targets)], case) for i, case in enumerate(pairwise_cases()))
    failures = done = 0
    start = time.monotonic()
    for target, case in itertools.islice(work, index - 1, None, count):
        done += 1
        if options.list:
            print(target, describe(case))
            continue
        try:
            with ExitStack() as stack:
                if target.startswith("sm_") and target != "sm_90" and not options.all:
                    stack.enter_context(without_machine_code())
                stack.enter_context(compiling(target))
                kernels = compile_case(case)
            if not kernels:
                raise RuntimeError("nothing was launched")
        except Exception as error:
            failures += 1
            cause: BaseException = error
            while cause.__cause__ is not None:  # the compiler wraps an error once for each call
                cause = cause.__cause__
            print(f"FAILED {target} {describe(case)}: {type(cause).__name__}: {cause}", flush=True)
        if sys.stderr.isatty() and done % 20 == 0:
            print(f"\r{done} compiled, {failures} failed", end="", file=sys.stderr, flush=True)
    if not options.list:
        print(
            f"{done} specialisations compiled by Triton {triton.__version__} "
            f"in {time.monotonic() - start:.0f} s, {failures} failed"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
