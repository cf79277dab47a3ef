"""The spatial transformer as a module, and the paper's localisation nets.

Jaderberg, Simonyan, Zisserman, Kavukcuoglu: Spatial Transformer Networks, 2015, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from . import calls
from .backend import without_autocast
from .checks import (
    PaddingMode,
    check_antialias,
    check_fill_numbers,
    check_int,
    check_modes,
    check_number,
    check_regularization,
    check_spatial_size,
    refuse,
    refuse_choice,
    refuse_type,
    to_number,
)
from .functional import affine_grid_sample, projective_grid_sample, tps_grid_sample
from .kernels.host.dtypes import WHOLE_NUMBERS
from .transforms import attention, control_lattice, similarity
from .transforms.matrices import in_rows

__all__ = ["SpatialTransformer", "localisation_cnn", "localisation_fcn"]

Transform = Literal["affine", "attention", "similarity", "projective", "tps"]


class SpatialTransformer(nn.Module):
    """Looks at an image, decides on a transformation, and resamples the image by it.

    A localisation net turns the image into features; a linear layer, :attr:`regression`, turns the
    features into the transformation's parameters; a fused kernel samples the image. :meth:`localise`
    is the first half and :meth:`sample` the second, for images and feature maps other than the one
    the net looked at::

        self.transformer = stn.nn.SpatialTransformer(stn.nn.localisation_cnn(), size=(28, 28))

        digits = self.transformer(images)

        theta = self.transformer.localise(thumbnails)
        crops = self.transformer.sample(photographs, theta)

    Convention: parameters map output coordinates to input coordinates, both normalised and x first. With
    ``align_corners=True`` -1 and 1 are the centres of an image's outermost pixels, with
    ``align_corners=False`` their outer edges.

    ============== ============================================== ===========================================
    ``transform``  parameters that the net regresses              :meth:`localise` returns
    ============== ============================================== ===========================================
    "affine"       6, the matrix row by row (12 in 3-D)           theta, (N, 2, 3) or (N, 3, 4)
    "attention"    3: scale, x, y (in 3-D z too); with ``scale``  theta, (N, 2, 3) or (N, 3, 4)
                   given 2: x, y
    "similarity"   4: scale, angle in radians, x, y               theta, (N, 2, 3)
    "projective"   8, the matrix row by row without its last      homography, (N, 3, 3)
                   entry, which is 1
    "tps"          2 K: where each of the K control points,       points, (N, K, 2)
                   a square lattice in the output, is read from
    ============== ============================================== ===========================================

    Training starts at the identity, or at ``regions``, as the paper's does: the net regresses an update,
    and the weights and the bias that make it start at zero. The parameters are :attr:`initial`, which is
    not trained, plus the update, so weight decay pulls to the start. While the weights are zero
    no gradient reaches the localisation net: the first step moves the weights, the second the net.

    Parameters are float32 (float64 in a float64 module) all the way from the features to the kernel, under
    autocast and in float16 and bfloat16 modules too, as rounding one to bfloat16 can move samples by about
    a pixel in an image 512 wide. :attr:`initial` stays float32 when the module becomes half.
    :attr:`regression` is no ``nn.Linear``, so that to initialise a model's linear layers leaves the start
    alone.

    Example:
        >>> net = stn.nn.SpatialTransformer(stn.nn.localisation_cnn(), "affine", size=(28, 28))
        >>> digits = torch.rand(8, 1, 28, 28)
        >>> torch.allclose(net(digits), digits, atol=1e-5)  # it starts as the identity
        True
        >>> net.localise(digits).shape
        torch.Size([8, 2, 3])
    """

    initial: Tensor
    """The parameters at the start, (T, P), in the order of the table."""

    regression: _Regression
    """The linear layer from the features to the update of the parameters. It starts at zero."""

    def __init__(
        self,
        localisation: nn.Module,
        transform: Transform = "affine",
        size: Sequence[int] | None = None,
        mode: str = "bilinear",
        padding_mode: PaddingMode = "zeros",
        align_corners: bool = False,
        transforms: int = 1,
        *,
        regions: Tensor | Sequence[Any] | None = None,
        features: int | None = None,
        dims: int = 2,
        scale: float | None = None,
        lattice: int = 4,
        regularization: float = 0.0,
        antialias: bool = False,
        fill: float | Sequence[float] | None = None,
    ) -> None:
        """
        Args:
            localisation: the localisation net: any module that maps the images to features, (N, ...), which
                are flattened. ``nn.Flatten()`` will do.
            transform: "affine", "attention", "similarity", "projective" or "tps".
            size: the output's spatial size, (H_out, W_out) or (D_out, H_out, W_out). Default: the input's.
            mode: "bilinear" (trilinear for volumes), "nearest" or "bicubic". No gradient reaches the net
                through "nearest".
            padding_mode: "zeros", "border", "reflection" or "circular", or one for each axis, x first.
            align_corners: see the convention.
            transforms: T, how many transformers work side by side on each image with one localisation net. If
                there are several, results have a dimension T after N.
            regions: (T, 4), boxes (x0, y0, x1, y1) in normalised coordinates that the transformers start from
                instead of the whole image, (-1, -1, 1, 1); in 3-D (T, 6), (x0, y0, z0, x1, y1, z1). One (4,)
                is for all. For "attention" and "similarity" they are square. Transformers that start
                from the same region differ only if what follows treats them differently.
            features: the number of features. Default: the first batch shows it, as with ``nn.LazyLinear``;
                ``.to(memory_format=...)``, DDP, FSDP and export then want a batch to have gone through.
            dims: 2; or 3, for volumes ("affine" and "attention").
            scale: of "attention": half the window's side, fixed (the paper's birds: 0.5). Default: regressed.
            lattice: of "tps": the control points along a side; K is its square.
            regularization: of "tps": see :func:`stn_triton.tps_grid_sample`.
            antialias: of all but "tps": see :func:`stn_triton.affine_grid_sample`. The paper names aliasing
                as what limits shrinking.
            fill: a number, or one for each channel; see :func:`stn_triton.affine_grid_sample`.

        Raises:
            TypeError: an argument is not of the type it must be.
            ValueError: an argument does not fit; the message names it.
        """
        super().__init__()
        if not isinstance(localisation, nn.Module):
            refuse(TypeError, "localisation", "a torch.nn.Module", type(localisation).__name__)
        if transform not in get_args(Transform):
            refuse_choice("transform", transform, get_args(Transform))
        dims = check_int("dims", dims, 2)
        if dims not in (2, 3) or (dims == 3 and transform not in ("affine", "attention")):
            expected = "2, or 3 for 'affine' and 'attention'"
            refuse(ValueError, "dims", expected, f"{dims!r} for {transform!r}")
        if dims == 3 and isinstance(localisation, _LocalisationCNN):
            refuse(ValueError, "localisation", "for volumes", "a localisation_cnn()", _FOR_VOLUMES)
        check_modes(mode, padding_mode, align_corners, dims)
        transforms = check_int("transforms", transforms, 1)
        if features is not None:
            features = check_int("features", features, 0)
        for name, given, owner in (
            ("scale", scale is not None, "attention"),
            ("lattice", lattice != 4, "tps"),
            ("regularization", regularization != 0, "tps"),
        ):
            if given and transform != owner:
                refuse(ValueError, name, f"left out unless transform={owner!r}", f"transform={transform!r}")
        if scale is not None:
            scale = check_number("scale", scale)
            if not 0 < scale < math.inf:
                refuse(ValueError, "scale", "finite and positive", scale)
        lattice = check_int("lattice", lattice, 2)
        regularization = check_regularization(regularization)
        check_antialias(antialias, mode)
        if antialias and transform == "tps":
            refuse(ValueError, "antialias", "False for transform='tps'", antialias)

        self.transform = transform
        self.size = None if size is None else check_spatial_size(size, dims)
        self.mode, self.padding_mode, self.align_corners = mode, padding_mode, align_corners
        self.transforms, self.dims = transforms, dims
        self.scale, self.lattice, self.regularization = scale, lattice, regularization
        self.antialias, self.fill = antialias, check_fill_numbers(fill, padding_mode, dims)
        self._regions = self._checked_regions(regions)
        self.register_buffer("initial", self._start())
        self.localisation = localisation
        outputs = self.initial.numel()
        self.regression = _LazyRegression(outputs) if features is None else _Regression(features, outputs)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) or (N, C, D, H, W) -> (N, C, *size), or (N, T, C, *size) for several transformers, in
        the input's dtype and memory format."""
        if (call := calls.as_leaf(self, input)) is not None:
            return call
        return self.sample(input, self.localise(input))

    def localise(self, input: Tensor) -> Tensor:
        """The transformations of a batch of images; see the table. Several transformers: (N, T, ...)."""
        calls.check(self._check_input, input)
        features = self.localisation(input)
        calls.check(self._check_features, features, input)
        update = self.regression(features.flatten(1)).view(-1, *self.initial.shape)
        parameters = self.initial + update  # (N, T, P)
        return self._assemble(parameters if self.transforms > 1 else parameters.squeeze(1))

    def sample(self, input: Tensor, theta: Tensor) -> Tensor:
        """Any images by the transformations that :meth:`localise` returned. Their batch may be 1."""
        arguments = (input, theta, self.size, self.mode, self.padding_mode, self.align_corners)
        if self.transform == "tps":
            return tps_grid_sample(*arguments, regularization=self.regularization, fill=self.fill)
        if self.transform == "projective":
            return projective_grid_sample(*arguments, antialias=self.antialias, fill=self.fill)
        return affine_grid_sample(*arguments, antialias=self.antialias, fill=self.fill)

    def reset_parameters(self) -> None:
        """Starts anew, at ``regions``; the localisation net stays. For a module made on the meta device:
        ``to_empty(device=...)`` leaves :attr:`initial` empty too, and this fills it."""
        self.regression.reset_parameters()
        self.initial.copy_(self._start())

    # ----------------------------------------------------------------------------------------- checks
    def _check_input(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            refuse_type("input", input)
        if input.dim() != self.dims + 2:
            layout = "(N, C, H, W)" if self.dims == 2 else "(N, C, D, H, W)"
            refuse(ValueError, "input", layout, f"shape {tuple(input.shape)}")

    @staticmethod
    def _check_features(features: Tensor, input: Tensor) -> None:
        if not isinstance(features, Tensor):
            refuse(TypeError, "localisation", "a module that returns a tensor", type(features).__name__)
        if features.dim() < 2 or features.shape[0] != input.shape[0]:
            expected = f"a module that returns ({input.shape[0]}, ...) for this input"
            refuse(ValueError, "localisation", expected, f"shape {tuple(features.shape)}")

    # ------------------------------------------------------------------------------------- parameters
    def _assemble(self, parameters: Tensor) -> Tensor:
        """(..., P) -> the matrix or the points that the sampler takes."""
        if self.transform == "affine":
            return in_rows(parameters, self.dims + 1)
        if self.transform == "projective":
            return in_rows(F.pad(parameters, (0, 1), value=1.0), 3)
        if self.transform == "tps":
            return in_rows(parameters, 2)
        if self.transform == "similarity":
            return similarity(parameters[..., 0], parameters[..., 1], parameters[..., 2:])
        if self.scale is None:
            return attention(parameters[..., 0], parameters[..., 1:])
        return attention(self.scale, parameters)

    def _start(self) -> Tensor:
        """The parameters, (T, P), that map the whole output to the regions, in float32 or wider."""
        low, high = self._boxes().chunk(2, -1)
        centre, reach = (low + high) / 2, (high - low) / 2
        if self.transform in ("affine", "projective"):
            matrix = torch.cat([reach.diag_embed(), centre.unsqueeze(-1)], -1).flatten(1)
            return matrix if self.transform == "affine" else F.pad(matrix, (0, 2))
        if self.transform == "tps":
            points = control_lattice(self.lattice, dtype=centre.dtype, device=centre.device)
            return (centre.unsqueeze(1) + reach.unsqueeze(1) * points).flatten(1)
        scale = reach[:, :1]
        if self.transform == "similarity":
            return torch.cat([scale, torch.zeros_like(scale), centre], -1)
        return torch.cat([scale, centre], -1) if self.scale is None else centre

    def _boxes(self) -> Tensor:
        """(T, 2 dims)."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        regions = self._regions
        boxes = torch.tensor(regions, dtype=dtype) if isinstance(regions, list) else regions.to(dtype)
        return boxes.expand(self.transforms, 2 * self.dims)

    def _checked_regions(self, regions: Tensor | Sequence[Any] | None) -> Tensor | list[Any]:
        """Boxes as numbers; or a tensor whose values nobody knows, a fake or a meta tensor."""
        if regions is None:
            reach = self.scale or 1.0
            return [-reach] * self.dims + [reach] * self.dims
        values: Tensor | list[Any]
        try:
            values = _numbers(regions)
            given = _nested_shape(values)
        except RuntimeError:  # a tensor's that has none
            assert isinstance(regions, Tensor)
            values, given = regions.detach(), tuple(regions.shape)
        shape = (self.transforms, 2 * self.dims)
        if given not in (shape, shape[1:]):
            refuse(ValueError, "regions", f"{shape} or {shape[1:]}", f"shape {given}")
        if isinstance(values, list):
            for box in values if len(given) == 2 else [values]:
                self._check_region(box)
        return values

    def _check_region(self, box: list[float]) -> None:
        sides = [high - low for low, high in zip(box, box[self.dims :])]
        if not all(math.isfinite(side) and side > 0 for side in sides):
            corners = "(x0, y0, x1, y1) with x0 < x1 and y0 < y1"
            if self.dims == 3:
                corners = "(x0, y0, z0, x1, y1, z1), each first one the smaller"
            refuse(ValueError, "regions", corners, box)
        if self.transform in ("attention", "similarity"):
            side = sides[0] if self.scale is None else 2 * self.scale
            if not all(math.isclose(other, side, rel_tol=1e-5) for other in sides):
                square = "square" if self.scale is None else f"squares of side {side:g}"
                refuse(ValueError, "regions", f"{square} for this transform", f"sides {sides}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpatialTransformer:
        """What ``to``, ``half`` and the like call. The start moves with the module, and is not rounded."""
        initial = self.initial
        super()._apply(fn, recurse)
        if self.initial.dtype in (torch.float16, torch.bfloat16):
            self.initial = initial.to(self.initial.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        options = f"transform={self.transform!r}, size={self.size}, mode={self.mode!r}, "
        options += f"padding_mode={self.padding_mode!r}, align_corners={self.align_corners}"
        for name, default in (
            ("transforms", 1),
            ("dims", 2),
            ("scale", None),
            ("lattice", 4),
            ("regularization", 0.0),
            ("antialias", False),
            ("fill", None),
        ):
            if getattr(self, name) != default:
                options += f", {name}={getattr(self, name)}"
        return options


def _numbers(value: Any) -> Any:
    """Nested lists of numbers for nested sequences, arrays and tensors."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_numbers(item) for item in value]
    number = to_number(value)
    if number is None:
        refuse(TypeError, "regions", "a tensor or nested sequences of numbers", repr(value))
    return number


def _nested_shape(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        return ()
    inner = {_nested_shape(value) for value in values}
    if len(inner) > 1:
        refuse(ValueError, "regions", "boxes of one length", values)
    return (len(values), *(inner.pop() if inner else ()))


class _Regression(nn.Module):
    """A linear layer that starts at zero and computes in float32 or wider, whatever its own dtype.

    It is no ``nn.Linear``: what initialises, prunes or adapts the linear layers of a model leaves it alone.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        return 0 if is_lazy(self.weight) else self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.bias.shape[0]

    def reset_parameters(self) -> None:
        if not is_lazy(self.weight):
            nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if (call := calls.as_leaf(self, input)) is not None:
            return call
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(input.device.type):
            return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _LazyRegression(LazyModuleMixin, _Regression):
    """Becomes a :class:`_Regression` when the first features arrive."""

    cls_to_become = _Regression
    weight: UninitializedParameter  # type: ignore[assignment]

    def __init__(self, out_features: int) -> None:
        super().__init__(0, out_features)
        self.weight = UninitializedParameter()  # type: ignore[assignment]

    def initialize_parameters(self, input: Tensor) -> None:
        if self.has_uninitialized_params():
            with torch.no_grad():
                shape = self.out_features, input.shape[-1]
                self.weight.materialize(shape)  # type: ignore[attr-defined]
                nn.init.zeros_(self.weight)


# ---------------------------------------------------------------------------------- localisation nets
def localisation_fcn(
    features: Sequence[int] = (32, 32, 32), *, input_shape: Sequence[int] | None = None
) -> nn.Sequential:
    """Fully connected layers, each with a ReLU. The paper's ST-FCN (its appendix) by default.

    Args:
        features: of each layer. ``(32, 32)`` is SVHN's ST-CNN Multi (section 4.2).
        input_shape: of one image or volume, (C, H, W) or (C, D, H, W). Default: the first batch shows it.

    Returns:
        A net from (N, \\*input_shape) to (N, features[-1]).

    Example:
        >>> stn.nn.localisation_fcn(input_shape=(1, 28, 28))(torch.rand(8, 1, 28, 28)).shape
        torch.Size([8, 32])
    """
    net = nn.Sequential(nn.Flatten(), *_fully_connected(features))
    return _built(net, input_shape, "(C, H, W) or (C, D, H, W)", (3, 4))


def localisation_cnn(
    channels: Sequence[int] = (20, 20),
    features: Sequence[int] = (20,),
    *,
    kernel_size: int = 5,
    padding: int = 0,
    downsample: int = 2,
    input_shape: Sequence[int] | None = None,
) -> nn.Sequential:
    """Convolutions, each with a ReLU, 2 x 2 max-pooling between them, then fully connected layers.

    By default the paper's ST-CNN (its appendix), which needs images of 28 x 28 or more; the error for smaller
    ones says what takes them.
    ``localisation_cnn((32, 32), (32, 32), padding=2, downsample=1)`` is SVHN's ST-CNN Single (section 4.2).
    Odd sizes are rounded down when halved.

    Args:
        channels: of each convolution.
        features: of each fully connected layer.
        kernel_size: of the convolutions.
        padding: of the convolutions, with zeros.
        downsample: the images are averaged over squares of this side first; 1 leaves them as they are.
        input_shape: of one image, (C, H, W). Default: the first batch shows it.

    Returns:
        A net from (N, C, H, W) to (N, features[-1]).

    Example:
        >>> stn.nn.localisation_cnn(input_shape=(1, 28, 28))(torch.rand(8, 1, 28, 28)).shape
        torch.Size([8, 20])
    """
    channels = _widths("channels", channels)
    kernel_size, padding = check_int("kernel_size", kernel_size, 1), check_int("padding", padding, 0)
    downsample = check_int("downsample", downsample, 1)
    layers: list[nn.Module] = [nn.AvgPool2d(downsample)] if downsample > 1 else []
    for index, width in enumerate(channels):
        if index > 0:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.LazyConv2d(width, kernel_size, padding=padding), nn.ReLU()]
    net = _LocalisationCNN(*layers, nn.Flatten(), *_fully_connected(features))
    net.least_size = _least_size(len(channels), kernel_size, padding, downsample)
    net.takes_smaller = _takes_smaller(len(channels), kernel_size, padding, downsample)
    return _built(net, input_shape, "(C, H, W)", (3,))


def _least_size(convolutions: int, kernel_size: int, padding: int, downsample: int) -> int:
    """The least side of images of which every convolution makes a pixel."""
    side = 1
    for index in reversed(range(convolutions)):
        side = max(side + kernel_size - 1 - 2 * padding, 1) * (2 if index > 0 else 1)
    return side * downsample


def _takes_smaller(convolutions: int, kernel_size: int, padding: int, downsample: int) -> str:
    """Which arguments take smaller images, in words."""
    others = {}
    if downsample > 1:
        others["downsample=1"] = _least_size(convolutions, kernel_size, padding, 1)
    if padding < kernel_size // 2:
        same = kernel_size // 2
        others[f"padding={same}, downsample=1"] = _least_size(convolutions, kernel_size, same, 1)
    said = " and ".join(f"localisation_cnn({name}) {least} or more" for name, least in others.items())
    return f"{said.replace(')', ') takes', 1)}" if said else ""


_FOR_VOLUMES = "localisation_fcn() takes volumes, and so may a net of your own, of nn.Conv3d"


class _LocalisationCNN(nn.Sequential):
    """Its layers; what is too small for them is refused before one of them fails with less to say."""

    least_size = 1  # not annotated: TorchScript reads no annotations of the future
    takes_smaller = ""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            calls.check(self._check_input, input)
        for layer in self:
            input = layer(input)
        return input

    @torch.jit.unused
    def _check_input(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            refuse_type("input", input)
        if input.dim() == 5:
            layout = "(N, C, H, W) for this localisation net"
            refuse(ValueError, "input", layout, f"shape {tuple(input.shape)}", _FOR_VOLUMES)
        if input.dtype in WHOLE_NUMBERS:
            sample = "transformer.sample(input, transformer.localise(input.float()))"
            hint = f"input.float(); to sample integers, {sample}"
            refuse(TypeError, "input", "floating-point for this localisation net", input.dtype, hint)
        if input.dim() >= 3 and min(input.shape[-2:]) < self.least_size:
            expected = f"(N, C, H, W) with H and W of {self.least_size} or more for this localisation net"
            refuse(ValueError, "input", expected, f"shape {tuple(input.shape)}", self.takes_smaller)


def _fully_connected(features: Sequence[int]) -> list[nn.Module]:
    return [layer for width in _widths("features", features) for layer in (nn.LazyLinear(width), nn.ReLU())]


def _widths(name: str, widths: Sequence[int]) -> list[int]:
    if not isinstance(widths, (tuple, list)):
        hint = f"{name}=({widths},)" if isinstance(widths, int) else ""
        refuse(TypeError, name, "a tuple of ints, one for each layer,", repr(widths), hint)
    return [check_int(name, width, 0) for width in widths]


def _built(
    net: nn.Sequential, input_shape: Sequence[int] | None, expected: str, dims: tuple[int, ...]
) -> nn.Sequential:
    """The net; if the shape of its input is known, with no lazy layer left."""
    if input_shape is not None:
        if not isinstance(input_shape, (tuple, list)):
            refuse(TypeError, "input_shape", expected, repr(input_shape))
        shape = [check_int("input_shape", n, 0) for n in input_shape]
        if len(shape) not in dims:
            refuse(ValueError, "input_shape", expected, tuple(shape), "without a batch, and with channels")
        with torch.no_grad():
            net(torch.zeros(1, *shape))
    return net
