"""Thin-plate splines: their control points, coefficients and values."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import calls, distributed
from ..calls import elsewhere, has_torch_function, is_taken, plain, public, tracing_state
from ..checks import check_device, check_int, check_regularization, check_tensor, refuse
from ..hints import nearest_points
from .arguments import check_dtype, check_leading, dtypes

__all__ = ["control_lattice", "tps_coefficients", "tps_evaluate"]


def control_lattice(
    k: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The square lattice of k by k control points over [-1, 1]^2, corners included.

    Convention: x first; row by row, so the second point is the first one's right neighbour.

    Args:
        k: points along a side, 2 or more.
        device, dtype: the result's; a floating dtype, by default PyTorch's default.

    Returns:
        (k * k, 2), symmetric about 0 to the bit.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.control_lattice(2)
        tensor([[-1., -1.],
                [ 1., -1.],
                [-1.,  1.],
                [ 1.,  1.]])
    """
    k = check_int("k", k, 2)
    dtype = check_dtype(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    axis = (2 * torch.arange(k, device=device, dtype=compute) - (k - 1)) / (k - 1)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    return distributed.stack([x, y], -1).flatten(0, 1).to(dtype)


# ------------------------------------------------------------------------------- thin-plate splines
def tps_coefficients(
    points: Tensor, control_points: Tensor | None = None, regularization: float = 0.0
) -> Tensor:
    """The coefficients of the thin-plate splines that take each control point to its point.

    Convention: ``control_points[k]`` lies in the output, ``points[k]`` is where it is read in the input;
    both normalised, x first. The map is ::

        f(p) = sum_k w_k U(|p - c_k|) + a_x x + a_y y + a_1,    U(r) = r^2 log r^2

    with ``sum_k w_k = 0`` and ``sum_k w_k c_k = 0``, from the system ::

        [ K + regularization I   P ] [w]   [points]
        [ P^T                    0 ] [a] = [  0   ],    K_jk = U(|c_j - c_k|),  P_k = (x_k, y_k, 1)

    (Bookstein, Principal Warps, 1989; smoothing as by Wahba, Spline Models for Observational Data, 1990).
    Without regularization f passes through the points. With it f minimises ``sum_k |f(c_k) - points_k|^2
    + regularization w^T K w``, the last term being the bending energy over 16 pi; as it grows, f tends to
    the affine map nearest the points. SciPy's ``RBFInterpolator``, with r^2 log r for U, calls
    ``regularization / 2`` its smoothing.

    Args:
        points: (..., K, 2), K from 3 up.
        control_points: (K, 2), distinct and not all on a line. Default: :func:`control_lattice`, for
            which K must be a square.
        regularization: a finite number, not negative.

    Returns:
        (..., K + 3, 2): w, then a_x, a_y and a_1, so that the last three rows are the transpose of an
        affine theta. float64 where an argument is, else float32, half-precision points included.

    The system is solved in float64. Its inverse depends on the control points alone and is remembered: for
    lattices by k, for others on a CPU by their values, the last 64 of them. A tensor of control points on
    an accelerator has its system solved there in each call, some dozen small launches: the host never
    waits to read it.

    Control points that require gradients get them. Their system is solved anew each time, as it is within
    ``torch.compile``, ``torch.func`` transforms, dispatch modes and CUDA graph capture (except that of a
    lattice, a constant to the compiler). There, and on accelerators, duplicate, collinear and non-finite
    control points may give no error, but coefficients that are NaN, infinite or huge.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.tps_coefficients(stn.transforms.identity(8, "tps")).shape
        torch.Size([8, 19, 2])
    """
    if (has_torch_function(points, control_points) or tracing_state()) and is_taken():
        return elsewhere(tps_coefficients, points, control_points, regularization)
    matrix, dtype = system_of(points, control_points, regularization)
    return product(matrix, points, dtype)


def system_of(
    points: Tensor, control_points: Tensor | None, regularization: float
) -> tuple[Tensor, torch.dtype]:
    """Of checked arguments, what the points are multiplied by (``_solve``), and the coefficients' dtype."""
    check_tensor("points", points)
    if points.dim() < 2 or points.shape[-1] != 2 or points.shape[-2] < 3:
        hint = nearest_points("points", points) if points.shape[-1:] != (2,) else ""
        refuse(ValueError, "points", "(..., K, 2) with K of 3 or more", f"shape {tuple(points.shape)}", hint)
    regularization = check_regularization(regularization)
    if control_points is None:
        result, _ = dtypes(points)
        matrix = _lattice_matrix(lattice_side("points", points.shape[-2]), regularization, points.device)
    else:
        _check_control_points(control_points, points.shape[-2], "points", points)
        result, _ = dtypes(points, control_points)
        matrix = _control_matrix(plain(distributed.whole(control_points)), regularization)
    return matrix, result


def product(matrix: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix @ points``, in float64, which knows neither TF32 nor autocast; returned in ``dtype``."""
    return (distributed.replicated(matrix, points) @ points.double()).to(dtype)


@public
def tps_evaluate(coefficients: Tensor, control_points: Tensor | None, xy: Tensor) -> Tensor:
    """Thin-plate splines at given places, in plain PyTorch.

    Convention: ``xy`` are places in the output, the result is where they are read in the input; both
    normalised, x first.

    Args:
        coefficients: (..., K + 3, 2), from :func:`tps_coefficients`.
        control_points: (K, 2); None for the square lattice.
        xy: (..., P, 2). Leading dimensions broadcast with those of the coefficients.

    Returns:
        (..., P, 2); float64 where an argument is, else float32. Holds (..., P, K) values.

    At a control point the kernel r^2 log r^2 is 0, and so are its derivatives here, of every order.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> lattice = stn.transforms.control_lattice(4)
        >>> coefficients = stn.transforms.tps_coefficients(0.5 * lattice)
        >>> found = stn.transforms.tps_evaluate(coefficients, None, torch.tensor([[1.0, -1.0]]))
        >>> torch.allclose(found, torch.tensor([[0.5, -0.5]]), atol=1e-6)
        True
    """
    check_tensor("coefficients", coefficients)
    if coefficients.dim() < 2 or coefficients.shape[-1] != 2 or coefficients.shape[-2] < 6:
        expected = "(..., K + 3, 2) with K of 3 or more"
        refuse(ValueError, "coefficients", expected, f"shape {tuple(coefficients.shape)}")
    check_tensor("xy", xy)
    if xy.dim() < 2 or xy.shape[-1] != 2:
        refuse(ValueError, "xy", "(..., P, 2)", f"shape {tuple(xy.shape)}")
    check_device("xy", xy, "coefficients", coefficients)
    check_leading("xy", xy.shape[:-2], "coefficients", coefficients.shape[:-2])
    count = coefficients.shape[-2] - 3
    compute, _ = dtypes(coefficients, xy)
    if control_points is None:
        side = lattice_side("coefficients", count)
        control_points = control_lattice(side, device=xy.device, dtype=compute)
    else:
        _check_control_points(control_points, count, "coefficients", coefficients)
        compute = torch.promote_types(compute, control_points.dtype)
    coefficients, control_points, xy = (t.to(compute) for t in (coefficients, control_points, xy))
    basis = _kernel(xy, control_points)
    weights = coefficients[..., :count, :]
    bent = [(basis * weights[..., component].unsqueeze(-2)).sum(-1) for component in (0, 1)]
    a_x, a_y, a_1 = coefficients[..., count:, :].unsqueeze(-3).unbind(-2)
    return distributed.stack(bent, -1) + a_x * xy[..., :1] + a_y * xy[..., 1:] + a_1


def _kernel(xy: Tensor, control_points: Tensor) -> Tensor:
    """U = r^2 log r^2 between (..., P, 2) and (K, 2), shape (..., P, K)."""
    difference_x = xy[..., :1] - control_points[:, 0]
    difference_y = xy[..., 1:] - control_points[:, 1]
    squared = difference_x * difference_x + difference_y * difference_y
    # At and next to r = 0 the logarithm of 1 stands in: every derivative stays finite.
    return squared * torch.where(squared > torch.finfo(squared.dtype).tiny, squared, 1).log()


def _solve(control_points: Tensor, regularization: float) -> Tensor:
    """(K + 3, K) in float64, to be multiplied by the points: K columns of the system's inverse."""
    control_points = control_points.double()
    count = control_points.shape[0]
    unit = torch.eye(count + 3, count, dtype=torch.float64, device=control_points.device)
    kernel = _kernel(control_points, control_points) + regularization * unit[:count]
    affine = torch.cat([control_points, torch.ones_like(control_points[:, :1])], 1)
    corner = torch.zeros(3, 3, dtype=torch.float64, device=control_points.device)
    system = torch.cat([torch.cat([kernel, affine], 1), torch.cat([affine.transpose(0, 1), corner], 1)], 0)
    # not solve_ex, whose second derivatives PyTorch takes for 0 where one of the two is in forward mode
    inverse = invert_by_elimination if calls.exports_onnx() else torch.linalg.inv_ex
    return inverse(system)[0][:, :count]


def invert_by_elimination(A: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """``torch.linalg.inv_ex`` of (..., n, n) in operators that ONNX has.

    Gauss-Jordan elimination with partial pivoting, unrolled. A singular matrix gives NaN or infinities.
    """
    a, b = A, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    size = A.shape[-1]
    rows = torch.arange(size, device=A.device)
    unused = torch.ones_like(a[..., 0])
    chosen = []
    for column in range(size):
        entries = a[..., column]
        # -1 for rows that have had their turn, so that a column of zeros chooses another
        largest = (entries.abs() * unused + (unused - 1)).argmax(-1, keepdim=True)
        pivot = (rows == largest).to(a.dtype)  # of each row whether it is the pivot's, 0 or 1
        chosen.append(pivot)
        unused = unused - pivot
        value = (entries * pivot).sum(-1, keepdim=True).unsqueeze(-1)
        row = pivot.unsqueeze(-2)
        others = (entries * (1 - pivot)).unsqueeze(-1)
        is_pivot = pivot.unsqueeze(-1) > 0
        a, b = (torch.where(is_pivot, m / value, m - others * ((row @ m) / value)) for m in (a, b))
    return distributed.stack(chosen, -2) @ b, torch.zeros_like(A[..., 0, 0], dtype=torch.int32)


# ------------------------------------------------------------------- the systems that are remembered
# Unregularised lattices are few and small, and compiled code and captured graphs refer to them and to their
# matrices: these are kept for good.
_lattices: dict[tuple[int, torch.device], Tensor] = {}
_places: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def kept_lattice(k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``control_lattice``, made once: not to be written to."""
    if torch.compiler.is_dynamo_compiling():  # which folds it into what it compiles
        return control_lattice(k, device=device, dtype=dtype)
    key = k, device, dtype
    if key in _places and not is_in_torch_dispatch_mode():
        return _places[key]
    if not _is_eager(device):
        return control_lattice(k, device=device, dtype=dtype)
    with torch.inference_mode(False), torch.no_grad():
        return _places.setdefault(key, control_lattice(k, device=device, dtype=dtype))


def _lattice_matrix(k: int, regularization: float, device: torch.device) -> Tensor:
    if regularization == 0:
        if torch.compiler.is_dynamo_compiling():
            return _plain_lattice_matrix(k, device)
        if (k, device) in _lattices and not is_in_torch_dispatch_mode():
            return _lattices[k, device]
        if _is_eager(device):
            return _plain_lattice_matrix(k, device)
    elif _is_eager(device):
        return _system_matrix(k, torch.float64, float(regularization), device)
    return _solve(control_lattice(k, device=device, dtype=torch.float64), regularization)


def _control_matrix(control_points: Tensor, regularization: float) -> Tensor:
    if _is_eager(control_points.device) and _is_readable(control_points):
        dtype, device = control_points.dtype, control_points.device
        if not control_points.requires_grad:
            values = tuple(control_points.detach().flatten().tolist())
            return _system_matrix(values, dtype, float(regularization), device)
        _check_positions(control_points.detach().double(), dtype)
    return _solve(control_points, regularization)


def _plain_lattice_matrix(k: int, device: torch.device) -> Tensor:
    """Without regularization."""
    if (k, device) not in _lattices:
        with torch.inference_mode(False), torch.no_grad():
            lattice = control_lattice(k, device="cpu", dtype=torch.float64)
            matrix = _solve(lattice, 0.0).to(device)
            # The compiler takes its sizes for constants, with dynamic=True as well. If they were symbols,
            # training compiled code would mark them as dynamic on this very tensor. A later
            # torch.export(strict=True) would guard on them, by a name that the exported program lacks.
            # (This is all that torch._dynamo.mark_static does, but for importing the compiler.)
            matrix._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
            _lattices.setdefault((k, device), matrix)  # another thread's, if that was first, is in use
    return _lattices[k, device]


# The compiler calls it once, while it traces, and holds the result for a constant. This is all that
# torch.compiler.assume_constant_result does, but for importing the compiler, and Triton with it.
_plain_lattice_matrix._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _system_matrix(
    control_points: int | tuple[float, ...],
    dtype: torch.dtype,
    regularization: float,
    device: torch.device,
) -> Tensor:
    """For a lattice of k by k, or for control points of these values, x and y by turns."""
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(control_points, int):
            positions = control_lattice(control_points, device="cpu", dtype=torch.float64)
        else:
            positions = torch.tensor(control_points, device="cpu", dtype=torch.float64).view(-1, 2)
            _check_positions(positions, dtype)
        matrix = _solve(positions, regularization)
        if not matrix.isfinite().all():
            largest = positions.abs().max().item()
            refuse(ValueError, "control_points", "of moderate size", f"coordinates up to {largest:.3g}")
        return matrix.to(device)


def _is_eager(device: torch.device) -> bool:
    """Whether values can be read here, and results kept for elsewhere."""
    return not (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _is_readable(control_points: Tensor) -> bool:
    """Whether the values are all there is to the tensor, and the host has them: it waits for no device."""
    return (
        control_points.device.type == "cpu"
        and type(control_points) in (Tensor, torch.nn.Parameter)
        and calls.tracing_state() is None  # else it may be other values' turn in the graph
        and forward_ad.unpack_dual(control_points).tangent is None
    )


# ----------------------------------------------------------------------------------------- validation
def _check_control_points(control_points: Tensor, count: int, other_name: str, other: Tensor) -> None:
    check_tensor("control_points", control_points)
    if tuple(control_points.shape) != (count, 2):
        expected = f"({count}, 2), as many as {other_name} has,"
        refuse(ValueError, "control_points", expected, f"shape {tuple(control_points.shape)}")
    check_device("control_points", control_points, other_name, other)


def _check_positions(control_points: Tensor, dtype: torch.dtype) -> None:
    """Distinct points (K, 2) in float64 on the CPU, not all on a line; they were given in ``dtype``."""
    name = "control_points"
    finite = control_points.isfinite().all(1)
    if not finite.all():
        k = int(finite.logical_not().nonzero()[0])
        refuse(ValueError, name, "finite", f"{tuple(control_points[k].tolist())} at {k}")
    scale = control_points.abs().max()
    distances = torch.pdist(control_points)
    if distances.min() <= 1e-6 * scale:
        first, second = torch.triu_indices(len(control_points), len(control_points), 1)[:, distances.argmin()]
        place = tuple(control_points[first].tolist())
        refuse(ValueError, name, "distinct", f"{int(first)} and {int(second)} both at {place}")
    # The lesser singular value is the root of the sum of squared distances to the best line; what rounding
    # to dtype alone can make of points on a line is no more than this.
    across = torch.linalg.svdvals(control_points - control_points.mean(0))[1]
    if across <= max(1e-6, torch.finfo(dtype).eps) * scale * math.sqrt(len(control_points)):
        refuse(ValueError, name, "spread over the plane", f"{len(control_points)} points on one line")


def lattice_side(name: str, count: int) -> int:
    """The k of a k by k lattice. (Neither isqrt nor sqrt: this one the compiler traces.)"""
    k = 2
    while k * k < count:
        k += 1
    if k * k != count:
        expected = "for K = 4, 9, 16, ... control points, a square lattice, unless control_points says others"
        hint = f"control_points, ({count}, 2), says where in the output these are"
        refuse(ValueError, name, expected, f"K = {count}", hint)
    return k
