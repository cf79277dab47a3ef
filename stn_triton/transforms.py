"""The parameters of transforms: making, composing and inverting them, and the thin-plate spline's algebra.

Convention: every transform maps output coordinates to input coordinates, both normalised and x first;
x points right and y down. A point is a column, ``theta @ (x, y, 1)``: affine maps are (..., 2, 3), or
(..., 3, 4) in 3-D, homographies (..., 3, 3).

Everything is differentiable, batched, usable under ``torch.func`` and ``torch.compile``, and never makes
the host wait for the device, but for the one read that :func:`tps_coefficients` describes. Computed in
float32 or wider, and rounded once to the dtype the arguments promote to.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from . import calls, distributed
from .calls import elsewhere, has_torch_function, is_taken, plain, public, tracing_state
from .checks import check_device, check_int, check_regularization, check_tensor, refuse, to_number

__all__ = [
    "identity",
    "attention",
    "similarity",
    "compose",
    "invert",
    "control_lattice",
    "tps_coefficients",
    "tps_evaluate",
]


# ------------------------------------------------------------------------------------- making them
def identity(
    n: int,
    kind: str = "affine",
    *,
    dims: int = 2,
    k: int = 4,
    transforms: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Parameters of n transforms that leave images as they are.

    Args:
        n: the batch size; 0 is legal.
        kind: "affine", "attention", "similarity", "projective" or "tps".
        dims: 2 or 3; 3 for "affine" and "attention" only.
        k: for "tps", the side of the lattice of control points.
        transforms: T, for parameters (n, T, ...) of T transforms of each image.
        device, dtype: the result's; a floating dtype, by default PyTorch's default.

    Returns:
        A new tensor. "affine", "attention" and "similarity": (n, dims, dims + 1), for all three
        are applied as affine maps. "projective": (n, 3, 3). "tps": (n, k * k, 2), the points of
        :func:`control_lattice`. (The identity of a flow, which has the size of an image, is
        ``torch.zeros``.)

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.identity(8).shape, stn.transforms.identity(8, "tps", k=5).shape
        (torch.Size([8, 2, 3]), torch.Size([8, 25, 2]))
    """
    known = ("affine", "attention", "similarity", "projective", "tps")
    if kind not in known:
        refuse(ValueError, "kind", "one of " + ", ".join(map(repr, known)), repr(kind))
    n, dims = check_int("n", n, 0), check_int("dims", dims, 2)
    if dims > (3 if kind in ("affine", "attention") else 2):
        refuse(ValueError, "dims", '2, or 3 for "affine" and "attention"', f"{dims} for {kind!r}")
    dtype = _check_dtype(dtype)
    if kind == "tps":
        parameters = control_lattice(k, device=device, dtype=dtype)
    elif kind == "projective":
        parameters = torch.eye(3, device=device, dtype=dtype)
    else:
        parameters = torch.eye(dims, dims + 1, device=device, dtype=dtype)
    if transforms is None:
        return parameters.repeat(n, 1, 1)
    return parameters.repeat(n, check_int("transforms", transforms, 0), 1, 1)


@public
def attention(scale: float | Tensor, translation: Tensor) -> Tensor:
    """The affine map that reads a scaled and moved window: ``[[s, 0, tx], [0, s, ty]]``.

    Equation 2 of Jaderberg et al., Spatial Transformer Networks, 2015.

    Convention: the output shows the part of the input that is centred at ``translation`` and ``scale``
    times as large as the input, so 0.5 magnifies twofold.

    Args:
        scale: (...,), or a number.
        translation: (..., 2), or (..., 3) in 3-D. Its leading dimensions broadcast with the scale's,
            which has no more of them; only a single translation, (2,) or (3,), serves any scale.

    Returns:
        (..., 2, 3) or (..., 3, 4).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.attention(0.5, torch.tensor([-0.5, 0.25]))  # half as wide, left of the middle
        tensor([[ 0.5000,  0.0000, -0.5000],
                [ 0.0000,  0.5000,  0.2500]])
    """
    dims = _check_translation(translation, (2, 3))
    scale = _check_factor("scale", scale, translation)
    compute, result = _dtypes(scale, translation)
    factor, translation = _factor(scale, translation, compute), translation.to(compute)
    factors, translation = torch.broadcast_tensors(factor.unsqueeze(-1), translation)
    factor = factors[..., 0]
    zero = torch.zeros_like(factor)
    entries = [factor if row == column else zero for row in range(dims) for column in range(dims)]
    return _augment(torch.stack(entries, -1).unflatten(-1, (dims, dims)), translation).to(result)


@public
def similarity(scale: float | Tensor, angle: float | Tensor, translation: Tensor) -> Tensor:
    """Scale, rotate and move: ``[[s cos a, -s sin a, tx], [s sin a, s cos a, ty]]``.

    Convention: radians. As x points right and y down, a positive angle turns the window that is read
    clockwise, and so the picture that comes out counter-clockwise. The rotation is one of normalised
    coordinates: where an image is not square, it is a rotation of the square it is stretched to.

    Args:
        scale: (...,), or a number; as in :func:`attention`.
        angle: (...,), or a number.
        translation: (..., 2). Its leading dimensions broadcast with those of scale and angle, which have
            no more of them; only a single translation, (2,), serves any scale and angle.

    Returns:
        (..., 2, 3).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.similarity(torch.rand(8), torch.rand(8), torch.zeros(8, 2)).shape
        torch.Size([8, 2, 3])
    """
    _check_translation(translation, (2,))
    scale = _check_factor("scale", scale, translation)
    angle = _check_factor("angle", angle, translation)
    if isinstance(scale, Tensor) and isinstance(angle, Tensor):
        _check_leading("angle", angle.shape, "scale", scale.shape)
    compute, result = _dtypes(scale, angle, translation)
    scale, angle = _factor(scale, translation, compute), _factor(angle, translation, compute)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    linear = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
    return _augment(linear, translation.to(compute)).to(result)


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
    dtype = _check_dtype(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    axis = (2 * torch.arange(k, device=device, dtype=compute) - (k - 1)) / (k - 1)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    return torch.stack([x, y], -1).flatten(0, 1).to(dtype)


# ------------------------------------------------------------------------------- their composition
@public
def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The transform that maps a point p to ``outer(inner(p))``.

    Convention: transforms map output to input, so an image sampled by ``compose(outer, inner)`` is the
    image sampled by ``outer`` and that result sampled by ``inner``, without the blur of the step between.

    Args:
        outer, inner: affine maps (..., 2, 3) or (..., 3, 4), or homographies (..., 3, 3). A homography
            goes with 2-D affine maps. Leading dimensions broadcast.

    Returns:
        Affine where both are, else a homography.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> image = torch.rand(1, 3, 48, 64)
        >>> crop = stn.transforms.attention(0.5, torch.zeros(1, 2))
        >>> turn = stn.transforms.similarity(1.0, 0.3, torch.zeros(1, 2))
        >>> turned = stn.affine_grid_sample(image, stn.transforms.compose(crop, turn))  # interpolated once
    """
    _check_theta("outer", outer)
    _check_theta("inner", inner)
    if outer.shape[-1] != inner.shape[-1]:
        expected = f"of as many dimensions as outer, {tuple(outer.shape)},"
        refuse(ValueError, "inner", expected, f"shape {tuple(inner.shape)}")
    check_device("inner", inner, "outer", outer)
    _check_leading("inner", inner.shape[:-2], "outer", outer.shape[:-2])
    compute, result = _dtypes(outer, inner)
    rows = max(outer.shape[-2], inner.shape[-2])
    product = _matmul(_homogeneous(outer.to(compute)), _homogeneous(inner.to(compute)))
    return product[..., :rows, :].to(result)


@public
def invert(theta: Tensor) -> Tensor:
    """The inverse transform: ``compose(theta, invert(theta))`` is the identity.

    Args:
        theta: affine maps (..., 2, 3) or (..., 3, 4), or homographies (..., 3, 3).

    Returns:
        Of theta's shape and dtype. The inverse of a singular map has infinite and NaN entries (samplers
        read nothing at such coordinates); that is no error, as to find out the host had to wait.

    By cofactors (Cramer's rule), whose derivatives exist wherever the inverse does.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> theta = stn.transforms.similarity(0.5, 0.3, torch.zeros(1, 2))
        >>> there_and_back = stn.transforms.compose(theta, stn.transforms.invert(theta))
        >>> torch.allclose(there_and_back, torch.eye(2, 3), atol=1e-6)
        True
    """
    _check_theta("theta", theta)
    compute, result = _dtypes(theta)
    rows, columns = theta.shape[-2:]
    matrix = theta.to(compute)
    if columns == 3:
        return _inverse(_homogeneous(matrix))[..., :rows, :].to(result)
    linear = _inverse(matrix[..., :3])
    return _augment(linear, -_matmul(linear, matrix[..., 3:]).squeeze(-1)).to(result)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Of tiny matrices; unlike ``@`` never rounded to TF32, nor to half by autocast."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _inverse(matrix: Tensor) -> Tensor:
    """Of (..., 3, 3). The inverse's columns are the cross products of the rows, over the determinant."""
    a, b, c = matrix.unbind(-2)
    adjugate = torch.stack([torch.linalg.cross(*rows) for rows in ((b, c), (c, a), (a, b))], -1)
    determinant = (a * adjugate[..., 0]).sum(-1)
    return adjugate / determinant[..., None, None]


def _homogeneous(theta: Tensor) -> Tensor:
    """(..., d, d + 1) with the row (0, ..., 0, 1) below; square matrices as they are."""
    if theta.shape[-2] == theta.shape[-1]:
        return theta
    row = theta[..., :1, :]  # its kind of tensor, a DTensor for instance
    row = torch.cat([torch.zeros_like(row[..., 1:]), torch.ones_like(row[..., :1])], -1)
    return torch.cat([theta, row], -2)


def _augment(linear: Tensor, translation: Tensor) -> Tensor:
    """(..., d, d) with the translation (..., d) as a column to its right, leading dimensions broadcast."""
    linear, column = torch.broadcast_tensors(linear, translation.unsqueeze(-1))
    return torch.cat([linear, column[..., :1]], -1)


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
    lattices by k, for others by their values, the last 64 of them. On an accelerator the host waits to
    read a tensor of control points when it first meets it and after each change in place (one that
    PyTorch cannot see, through ``.data`` or another library's view, needs a new tensor).

    Control points that require gradients get them. Their system is solved anew each time, as it is within
    ``torch.compile``, ``torch.func`` transforms, dispatch modes and CUDA graph capture (except that of a
    lattice, a constant to the compiler), and on accelerators for tensors made in inference mode. Then the
    host waits for nothing: duplicate, collinear and non-finite control points may give no error, but
    coefficients that are NaN, infinite or huge.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> stn.transforms.tps_coefficients(stn.transforms.identity(8, "tps")).shape
        torch.Size([8, 19, 2])
    """
    if (has_torch_function(points, control_points) or tracing_state()) and is_taken():
        return elsewhere(tps_coefficients, points, control_points, regularization)
    check_tensor("points", points)
    if points.dim() < 2 or points.shape[-1] != 2 or points.shape[-2] < 3:
        refuse(ValueError, "points", "(..., K, 2) with K of 3 or more", f"shape {tuple(points.shape)}")
    regularization = check_regularization(regularization)
    if control_points is None:
        result, _ = _dtypes(points)
        matrix = _lattice_matrix(lattice_side("points", points.shape[-2]), regularization, points.device)
    else:
        _check_control_points(control_points, points.shape[-2], "points", points)
        result, _ = _dtypes(points, control_points)
        matrix = _control_matrix(plain(distributed.whole(control_points)), regularization)
    matrix = distributed.replicated(matrix, points)
    return (matrix @ points.double()).to(result)  # float64 knows neither TF32 nor autocast


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
    _check_leading("xy", xy.shape[:-2], "coefficients", coefficients.shape[:-2])
    count = coefficients.shape[-2] - 3
    compute, _ = _dtypes(coefficients, xy)
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
    return torch.stack(bent, -1) + a_x * xy[..., :1] + a_y * xy[..., 1:] + a_1


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
    return torch.stack(chosen, -2) @ b, torch.zeros_like(A[..., 0, 0], dtype=torch.int32)


# ------------------------------------------------------------------- the systems that are remembered
# Unregularised lattices are few and small, and compiled code and captured graphs refer to them and to their
# matrices: these are kept for good.
_lattices: dict[tuple[int, torch.device], Tensor] = {}
_places: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
_values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of tensors on accelerators
_lock = threading.Lock()


def kept_lattice(k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``control_lattice``, made once: not to be written to."""
    if torch.compiler.is_dynamo_compiling():  # which folds it into what it compiles
        return control_lattice(k, device=device, dtype=dtype)
    key = k, device, dtype
    if _is_eager(device):
        if key not in _places:
            with torch.inference_mode(False), torch.no_grad():
                _places.setdefault(key, control_lattice(k, device=device, dtype=dtype))
        return _places[key]
    if key in _places and not is_in_torch_dispatch_mode():
        return _places[key]
    return control_lattice(k, device=device, dtype=dtype)


def _lattice_matrix(k: int, regularization: float, device: torch.device) -> Tensor:
    if regularization == 0:
        if torch.compiler.is_dynamo_compiling() or _is_eager(device):
            return _plain_lattice_matrix(k, device)
        if (k, device) in _lattices and not is_in_torch_dispatch_mode():
            return _lattices[k, device]
    elif _is_eager(device):
        return _system_matrix(k, torch.float64, float(regularization), device)
    return _solve(control_lattice(k, device=device, dtype=torch.float64), regularization)


def _control_matrix(control_points: Tensor, regularization: float) -> Tensor:
    device, dtype = control_points.device, control_points.dtype
    if _is_eager(device) and _is_readable(control_points):
        if not control_points.requires_grad:
            return _system_matrix(_read(control_points), dtype, float(regularization), device)
        if device.type == "cpu":
            _check_positions(control_points.detach().double(), dtype)
    return _solve(control_points, regularization)


def _plain_lattice_matrix(k: int, device: torch.device) -> Tensor:
    """Without regularization."""
    if (k, device) not in _lattices:
        with torch.inference_mode(False), torch.no_grad():
            lattice = control_lattice(k, device="cpu", dtype=torch.float64)
            matrix = _solve(lattice, 0.0).to(device)
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
    """Whether the values are all there is to the tensor, and changes to them are noticed."""
    device = control_points.device.type
    return (
        type(control_points) in (Tensor, torch.nn.Parameter)
        and calls.tracing_state() is None  # else it may be other values' turn in the graph
        and device != "meta"
        and (device == "cpu" or not control_points.is_inference())  # which count no versions
        and forward_ad.unpack_dual(control_points).tangent is None
    )


def _read(control_points: Tensor) -> tuple[float, ...]:
    """The values, x and y by turns. From an accelerator, only if they may have changed."""
    if control_points.device.type == "cpu":
        return tuple(control_points.detach().flatten().tolist())
    return _read_once(control_points)


def _read_once(control_points: Tensor) -> tuple[float, ...]:
    layout = control_points.data_ptr(), control_points.dtype, control_points.shape, control_points.stride()
    state = control_points._version, *layout
    with _lock:
        known, values = _values.get(control_points, (None, ()))
    if known != state:
        values = tuple(control_points.detach().flatten().tolist())
        with _lock:
            _values[control_points] = state, values
    return values


# ----------------------------------------------------------------------------------------- validation
def _check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The default dtype for None."""
    if dtype is None:
        return torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        refuse(TypeError, "dtype", "a floating-point dtype", repr(dtype))
    return dtype


def _check_leading(name: str, leading: Sequence[int], other_name: str, other: Sequence[int]) -> None:
    if any(a != b and a != 1 and b != 1 for a, b in zip(reversed(leading), reversed(other))):
        expected = f"such that its leading dimensions broadcast with {tuple(other)}, those of {other_name}"
        refuse(ValueError, name, expected, tuple(leading))


def _check_theta(name: str, theta: Tensor) -> None:
    check_tensor(name, theta)
    if theta.dim() < 2 or tuple(theta.shape[-2:]) not in ((2, 3), (3, 4), (3, 3)):
        expected = "(..., 2, 3), (..., 3, 4) or (..., 3, 3)"
        refuse(ValueError, name, expected, f"shape {tuple(theta.shape)}")


def _check_translation(translation: Tensor, dims: tuple[int, ...]) -> int:
    """The number of spatial dimensions."""
    check_tensor("translation", translation)
    if translation.dim() < 1 or translation.shape[-1] not in dims:
        expected = " or ".join(f"(..., {d})" for d in dims)
        refuse(ValueError, "translation", expected, f"shape {tuple(translation.shape)}")
    return translation.shape[-1]


def _check_factor(name: str, value: float | Tensor, translation: Tensor) -> float | Tensor:
    """A number, or a tensor whose dimensions broadcast with the translation's leading ones."""
    number = to_number(value)
    if number is not None:
        return number
    if not isinstance(value, Tensor):
        refuse(TypeError, name, "a tensor or a number", type(value).__name__)
    check_tensor(name, value)
    check_device(name, value, "translation", translation)
    leading = translation.shape[:-1]
    if leading and value.dim() > len(leading):  # (N, 1) with (N, 2) would make (N, N, 2, 3)
        expected = f"of no more dimensions than translation's leading ones, {tuple(leading)},"
        refuse(ValueError, name, expected, f"shape {tuple(value.shape)}")
    _check_leading(name, value.shape, "translation", leading)
    return value


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
        refuse(ValueError, name, "not all on one line", f"{len(control_points)} points on one")


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


# --------------------------------------------------------------------------------------------- dtypes
def _dtypes(*values: float | Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What to compute in, at least float32, and what the tensors promote to."""
    dtypes = [value.dtype for value in values if isinstance(value, Tensor)]
    result = functools.reduce(torch.promote_types, dtypes)
    return torch.promote_types(result, torch.float32), result


def _factor(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), value, device=like.device, dtype=dtype)
