"""What is refused, and how: ``grid_sample`` and ``affine_grid`` do as PyTorch, others name the argument.

The expected errors of the first two are not written here: PyTorch's own function is called too.
"""

import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import witness
from torch.utils._python_dispatch import TorchDispatchMode

import stn_triton as stn
from stn_triton.versions import TRICUBIC


class Text(str):
    pass


def x4(device, **kwargs):
    return torch.rand(2, 3, 4, 5, device=device, **kwargs)


def g4(device, **kwargs):
    return torch.rand(2, 6, 7, 2, device=device, **kwargs)


def x5(device):
    return torch.rand(2, 3, 4, 5, 6, device=device)


def g5(device):
    return torch.rand(2, 3, 2, 3, 3, device=device)


def theta(device):
    return torch.rand(2, 2, 3, device=device)


def theta5(device):
    return torch.rand(2, 3, 4, device=device)


def not_of_the_interpreter(caught):
    """Warnings but those by which NumPy tells Triton 3.6's interpreter how to convert numbers."""
    return [w for w in caught if "Conversion of an array with ndim" not in str(w.message)]


def outcome(function, arguments):
    """What a call gives or raises, and its warnings: their texts and where they point."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function(*arguments)
            result = tuple(result.shape), result.dtype, result.device
        except Exception as error:
            result = type(error), str(error)
    return result, [(str(w.message), w.category, w.filename) for w in not_of_the_interpreter(caught)]


class Spy(TorchDispatchMode):
    """Notes the package's own operators that run."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "stn_triton":
            self.ran.append(function)
        return function(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------- grid_sample
ZEROS = ("bilinear", "zeros", False)
GRID_SAMPLE = {  # name: the arguments, made on a device
    "input 3-d": lambda d: (x4(d)[0], g4(d), *ZEROS),
    "input 6-d": lambda d: (x5(d)[None], g5(d), *ZEROS),
    "input 0-d": lambda d: (torch.tensor(1.0, device=d), g4(d), *ZEROS),
    "grid 3-d": lambda d: (x4(d), g4(d)[0], *ZEROS),
    "grid 5-d for 4-d": lambda d: (x4(d), g5(d), *ZEROS),
    "grid 4-d for 5-d": lambda d: (x5(d), g4(d), *ZEROS),
    "batch": lambda d: (x4(d), g4(d)[:1], *ZEROS),
    "batch 5-d": lambda d: (x5(d)[:1], g5(d), *ZEROS),
    "last 3": lambda d: (x4(d), torch.rand(2, 6, 7, 3, device=d), *ZEROS),
    "last 2 of 5-d": lambda d: (x5(d), torch.rand(2, 3, 3, 3, 2, device=d), *ZEROS),
    "last 0": lambda d: (x4(d), g4(d)[..., :0], *ZEROS),
    "empty width": lambda d: (x4(d)[..., :0], g4(d), *ZEROS),
    "empty height": lambda d: (x4(d)[:, :, :0], g4(d), *ZEROS),
    "empty depth": lambda d: (x5(d)[:, :, :0], g5(d), *ZEROS),
    "empty space and batch": lambda d: (x4(d)[:0, :, :0], g4(d)[:0], *ZEROS),
    "int input": lambda d: (x4(d).int(), g4(d), *ZEROS),
    "int grid": lambda d: (x4(d), g4(d).int(), *ZEROS),
    "int both": lambda d: (x4(d).int(), g4(d).int(), *ZEROS),
    "bool input": lambda d: (x4(d) > 0, g4(d), *ZEROS),
    "complex": lambda d: (x4(d).to(torch.complex64), g4(d).to(torch.complex64), *ZEROS),
    "float8": lambda d: (x4(d).to(torch.float8_e4m3fn), g4(d).to(torch.float8_e4m3fn), *ZEROS),
    "double input": lambda d: (x4(d).double(), g4(d), *ZEROS),
    "half input": lambda d: (x4(d).half(), g4(d), *ZEROS),
    "bfloat16 grid": lambda d: (x4(d), g4(d).bfloat16(), *ZEROS),
    "input None": lambda d: (None, g4(d), *ZEROS),
    "grid None": lambda d: (x4(d), None, *ZEROS),
    "input list": lambda d: (x4(d).tolist(), g4(d), *ZEROS),
    "grid ndarray": lambda d: (x4(d), g4("cpu").numpy(), *ZEROS),
    "meta grid": lambda d: (x4(d), g4("meta"), *ZEROS),
    "meta input": lambda d: (x4("meta"), g4(d), *ZEROS),
    "sparse input": lambda d: (x4(d).to_sparse(), g4(d), *ZEROS),
    "sparse grid": lambda d: (x4(d), g4(d).to_sparse(), *ZEROS),
    "no grid": lambda d: (x4(d),),
    "nothing": lambda d: (),
    "too many": lambda d: (x4(d), g4(d), *ZEROS, 1),
    "mode typo": lambda d: (x4(d), g4(d), "bilnear", "zeros", False),
    "mode upper": lambda d: (x4(d), g4(d), "Bilinear", "zeros", False),
    "mode None": lambda d: (x4(d), g4(d), None, "zeros", False),
    "mode int": lambda d: (x4(d), g4(d), 0, "zeros", False),
    "mode list": lambda d: (x4(d), g4(d), ["bilinear"], "zeros", False),
    "padding typo": lambda d: (x4(d), g4(d), "bilinear", "zero", False),
    "padding None": lambda d: (x4(d), g4(d), "bilinear", None, False),
    "padding list": lambda d: (x4(d), g4(d), "bilinear", ["zeros"], False),
    "both typos": lambda d: (x4(d), g4(d), "cubic", "mirror", False),
    "typo and no align_corners": lambda d: (x4(d), g4(d), "cubic"),
    "padding typo and no align_corners": lambda d: (x4(d), g4(d), "bilinear", "mirror"),
    "bad shape and no align_corners": lambda d: (x4(d), g4(d)[:1]),
    "align_corners 1": lambda d: (x4(d), g4(d), "bilinear", "zeros", 1),
    "align_corners 0.0": lambda d: (x4(d), g4(d), "bilinear", "zeros", 0.0),
    "align_corners text": lambda d: (x4(d), g4(d), "bilinear", "zeros", "yes"),
    "align_corners numpy": lambda d: (x4(d), g4(d), "bilinear", "zeros", np.bool_(True)),
    "align_corners tensor": lambda d: (x4(d), g4(d), "bilinear", "zeros", torch.tensor(True)),
    # and what is legal, however odd
    "legal": lambda d: (x4(d), g4(d), *ZEROS),
    "no align_corners": lambda d: (x4(d), g4(d)),
    "align_corners None": lambda d: (x5(d), g5(d), "nearest", "border", None),
    "subclass of str": lambda d: (x4(d), g4(d), Text("nearest"), Text("border"), True),
    "parameter": lambda d: (torch.nn.Parameter(x4(d)), g4(d), *ZEROS),
    "all meta": lambda d: (x4("meta"), g4("meta"), *ZEROS),
    "no batch": lambda d: (x4(d)[:0], g4(d)[:0], *ZEROS),
    "no channels": lambda d: (x4(d)[:, :0], g4(d), *ZEROS),
    "no rows": lambda d: (x4(d), g4(d)[:, :0], *ZEROS),
    "no output 5-d": lambda d: (x5(d), g5(d)[:, :, :0], *ZEROS),
}


@pytest.mark.parametrize("name", GRID_SAMPLE)
def test_grid_sample_as_pytorch(either_backend, device, name):
    """The same result or the same exception with the same words, and the same warnings, to the caller."""
    arguments = GRID_SAMPLE[name](device)
    assert outcome(stn.grid_sample, arguments) == outcome(F.grid_sample, arguments)


def test_tricubic_is_the_one_difference(either_backend, device):
    """To PyTorch before 2.15, which has no bicubic sampling of volumes; from there on there is none."""
    call = x5(device), g5(device), "bicubic", "zeros", False
    assert stn.grid_sample(*call).shape == (2, 3, 3, 2, 3)
    if TRICUBIC:
        assert outcome(stn.grid_sample, call) == outcome(F.grid_sample, call)
    else:
        with pytest.raises(RuntimeError, match="bicubic interpolation only supports 4D input"):
            F.grid_sample(*call)


# ------------------------------------------------------------------------------------- affine_grid
AFFINE_GRID = {
    "theta None": lambda d: (None, (2, 3, 4, 5), False),
    "theta ndarray": lambda d: (theta("cpu").numpy(), (2, 3, 4, 5), False),
    "theta int": lambda d: (theta(d).int(), (2, 3, 4, 5), False),
    "theta complex": lambda d: (theta(d).to(torch.complex64), (2, 3, 4, 5), False),
    "theta sparse": lambda d: (theta(d).to_sparse(), (2, 3, 4, 5), False),
    "theta 2-d": lambda d: (theta(d)[0], (2, 3, 4, 5), False),
    "theta 4-d": lambda d: (theta(d)[None], (2, 3, 4, 5), False),
    "theta for 5-d": lambda d: (theta5(d), (2, 3, 4, 5), False),
    "theta for 4-d": lambda d: (theta(d), (2, 3, 4, 5, 6), False),
    "size 3": lambda d: (theta(d), (2, 3, 4), False),
    "size 6": lambda d: (theta(d), (2, 3, 4, 5, 6, 7), False),
    "size None": lambda d: (theta(d), None, False),
    "size int": lambda d: (theta(d), 4, False),
    "size text": lambda d: (theta(d), "2345", False),
    "size floats": lambda d: (theta(d), (2, 3, 4.0, 5), False),
    "size None inside": lambda d: (theta(d), (2, 3, None, 5), False),
    "size tensor": lambda d: (theta(d), torch.tensor([2, 3, 4, 5]), False),
    "size range": lambda d: (theta(d), range(2, 6), False),
    "wrong torch.Size": lambda d: (theta(d), torch.Size((2, 3, 4, 5, 6)), False),
    "wrong list": lambda d: (theta(d), [2, 3, 4, 5, 6], False),
    "height 0": lambda d: (theta(d), (2, 3, 0, 5), False),
    "height 0 in a list": lambda d: (theta(d), [2, 3, 0, 5], False),
    "height 0, corners": lambda d: (theta(d), (2, 3, 0, 5), True),
    "channels 0": lambda d: (theta(d), (2, 0, 4, 5), False),
    "batch 0": lambda d: (theta(d)[:0], (0, 3, 4, 5), False),
    "height -1": lambda d: (theta(d), (2, 3, -1, 5), False),
    "height -1, corners": lambda d: (theta(d), (2, 3, -1, 5), True),
    "batch": lambda d: (theta(d), (3, 3, 4, 5), False),
    "batch, corners": lambda d: (theta(d), (3, 3, 4, 5), True),
    "align_corners 1": lambda d: (theta(d), (2, 3, 4, 5), 1),
    "align_corners text": lambda d: (theta(d), (2, 3, 4, 5), "yes"),
    "no size": lambda d: (theta(d),),
    "nothing": lambda d: (),
    "bad shape and no align_corners": lambda d: (theta(d)[0], (2, 3, 4, 5)),
    # and what is legal, however odd
    "legal": lambda d: (theta(d), (2, 3, 4, 5), False),
    "legal 5-d": lambda d: (theta5(d), (2, 3, 4, 5, 6), True),
    "list": lambda d: (theta(d), [2, 3, 4, 5], False),
    "torch.Size": lambda d: (theta(d), torch.Size((2, 3, 4, 5)), False),
    "numpy ints": lambda d: (theta(d), tuple(np.array([2, 3, 4, 5])), False),
    "no align_corners": lambda d: (theta(d), (2, 3, 4, 5)),
    "one row": lambda d: (theta(d), (2, 3, 1, 5), False),
    "one row, corners": lambda d: (theta(d), (2, 3, 1, 5), True),
    "one row, corners, no channels": lambda d: (theta(d), (2, 0, 1, 5), True),
    "one row, no align_corners": lambda d: (theta(d), (2, 3, 1, 5)),
    "half": lambda d: (theta(d).half(), (2, 3, 4, 5), False),
    "meta": lambda d: (theta("meta"), (2, 3, 4, 5), False),
}


@pytest.mark.parametrize("name", AFFINE_GRID)
def test_affine_grid_as_pytorch(either_backend, device, name):
    """The same result or the same exception with the same words, and the same warnings, to the caller."""
    arguments = AFFINE_GRID[name](device)
    assert outcome(stn.affine_grid, arguments) == outcome(F.affine_grid, arguments)


@pytest.mark.parametrize("function", ["grid_sample", "affine_grid"])
def test_align_corners_warning(device, function):
    """Exactly one warning, at the line of the call."""
    arguments = (x4(device), g4(device)) if function == "grid_sample" else (theta(device), (2, 3, 4, 5))
    with pytest.warns(UserWarning, match="Default grid_sample and affine_grid behavior") as caught:
        getattr(stn, function)(*arguments)
    (warning,) = not_of_the_interpreter(caught)
    assert warning.filename == __file__
    with open(__file__) as lines:
        assert "getattr(stn, function)(*arguments)" in lines.readlines()[warning.lineno - 1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(stn, function)(*arguments, align_corners=False)
    assert not not_of_the_interpreter(caught)


# ------------------------------------------------------------------------------ affine_grid_sample
# name: (arguments on a device, the exception, what its message must say)
AFFINE_GRID_SAMPLE = {
    "input None": (lambda d: (None, theta(d)), TypeError, "input", "tensor", "NoneType"),
    "input list": (lambda d: ([1.0], theta(d)), TypeError, "input", "tensor", "list"),
    "input ndarray": (lambda d: (x4("cpu").numpy(), theta(d)), TypeError, "input", "tensor", "ndarray"),
    "input int": (lambda d: (x4(d).int(), theta(d)), TypeError, "input", "floating", "int32"),
    "input bool": (lambda d: (x4(d) > 0, theta(d)), TypeError, "input", "floating", "bool"),
    "input complex": (
        lambda d: (x4(d).to(torch.complex64), theta(d)),
        TypeError,
        "input",
        "floating",
        "complex64",
    ),
    "input float8": (
        lambda d: (x4(d).to(torch.float8_e4m3fn), theta(d)),
        (TypeError, ValueError),
        "input",
        "float8_e4m3fn",
    ),
    "input sparse": (lambda d: (x4(d).to_sparse(), theta(d)), ValueError, "input", "dense", "sparse"),
    "input 3-d": (lambda d: (x4(d)[0], theta(d)), ValueError, "input", "(N, C, H, W)", "(3, 4, 5)"),
    "input 6-d": (
        lambda d: (x5(d)[None], theta5(d)),
        ValueError,
        "input",
        "(N, C, D, H, W)",
        "(1, 2, 3, 4, 5, 6)",
    ),
    "input empty": (lambda d: (x4(d)[..., :0], theta(d)), ValueError, "input", "empty", "(2, 3, 4, 0)"),
    "theta None": (lambda d: (x4(d), None), TypeError, "theta", "tensor", "NoneType"),
    "theta int": (lambda d: (x4(d), theta(d).int()), TypeError, "theta", "floating", "int32"),
    "theta float8": (
        lambda d: (x4(d), theta(d).to(torch.float8_e4m3fn)),
        (TypeError, ValueError),
        "theta",
        "float8_e4m3fn",
    ),
    "theta sparse": (lambda d: (x4(d), theta(d).to_sparse()), ValueError, "theta", "dense", "sparse"),
    "theta square": (
        lambda d: (x4(d), torch.rand(2, 3, 3, device=d)),
        ValueError,
        "theta",
        "(2, 2, 3)",
        "(2, 3, 3)",
    ),
    "theta 2-d": (lambda d: (x4(d), theta(d)[0]), ValueError, "theta", "(2, 2, 3)", "(2, 3)"),
    "theta 5-d": (
        lambda d: (x4(d), theta(d)[None, None]),
        ValueError,
        "theta",
        "(2, T, 2, 3)",
        "(1, 1, 2, 2, 3)",
    ),
    "theta batch": (
        lambda d: (x4(d), torch.rand(3, 2, 3, device=d)),
        ValueError,
        "theta",
        "(2, 2, 3)",
        "(3, 2, 3)",
    ),
    "theta of volumes": (lambda d: (x4(d), theta5(d)), ValueError, "theta", "4-D", "(2, 3, 4)"),
    "theta of images": (lambda d: (x5(d), theta(d)), ValueError, "theta", "(2, 3, 4)", "(2, 2, 3)"),
    "theta on meta": (lambda d: (x4(d), theta("meta")), ValueError, "theta", "device", "meta"),
    "size int": (lambda d: (x4(d), theta(d), 4), TypeError, "size", "(H, W)", "4"),
    "size text": (lambda d: (x4(d), theta(d), "45"), TypeError, "size", "(H, W)", "'45'"),
    "size floats": (lambda d: (x4(d), theta(d), (4.0, 5)), TypeError, "size", "ints", "(4.0, 5)"),
    "size bools": (lambda d: (x4(d), theta(d), (True, 5)), TypeError, "size", "ints", "(True, 5)"),
    "size None inside": (lambda d: (x4(d), theta(d), (None, 5)), TypeError, "size", "ints", "(None, 5)"),
    "size tensor": (lambda d: (x4(d), theta(d), torch.tensor([4, 5])), TypeError, "size", "(H, W)", "tensor"),
    "size long": (lambda d: (x4(d), theta(d), (3, 4, 5)), ValueError, "size", "(H, W)", "(3, 4, 5)"),
    "size of N, C too": (
        lambda d: (x4(d), theta(d), x4(d).shape),
        ValueError,
        "size",
        "(H, W)",
        "(2, 3, 4, 5)",
    ),
    "size short": (lambda d: (x5(d), theta5(d), (4, 5)), ValueError, "size", "(D, H, W)", "(4, 5)"),
    "size negative": (lambda d: (x4(d), theta(d), (-1, 5)), ValueError, "size", "negative", "(-1, 5)"),
    **{
        f"{argument} {name}": (
            lambda d, value=value, position=position: (
                x4(d),
                theta(d),
                None,
                *("bilinear", "zeros")[:position],
                value,
            ),
            kind,
            argument,
            got,
        )
        for position, argument in enumerate(("mode", "padding_mode"))
        for name, value, kind, got in (
            ("None", None, TypeError, "NoneType"),
            ("int", 0, TypeError, "int"),
            ("list", ["zeros"], TypeError, "list"),
            ("bytes", b"zeros", TypeError, "bytes"),
            ("typo", "zeroes", ValueError, "'zeroes'"),
            ("upper", "Zeros", ValueError, "'Zeros'"),
        )
    },
    **{
        f"align_corners {value!r}": (
            lambda d, value=value: (x4(d), theta(d), None, "bilinear", "zeros", value),
            TypeError,
            "align_corners",
            "bool",
            repr(value),
        )
        for value in (None, 1, "yes")
    },
}


@pytest.mark.parametrize("name", AFFINE_GRID_SAMPLE)
def test_affine_grid_sample_names_the_argument(device, name):
    """The message begins with the argument, says what it must be and what came; nothing has run."""
    make, kind, *words = AFFINE_GRID_SAMPLE[name]
    arguments = make(device)
    tensors = [
        a for a in arguments if isinstance(a, torch.Tensor) and a.device.type != "meta" and not a.is_sparse
    ]
    copies = [tensor.clone() for tensor in tensors]
    with Spy() as spy, pytest.raises(kind) as caught:
        stn.affine_grid_sample(*arguments)
    message = str(caught.value)
    assert message.startswith(words[0] + " must be")
    for word in words:
        assert word in message, f"{word!r} is missing from {message!r}"
    assert not spy.ran
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies))
    assert stn.affine_grid_sample(x4(device), theta(device)).shape == (2, 3, 4, 5)  # and all is as before


@pytest.mark.parametrize("name", ["mode", "padding_mode"])
def test_affine_grid_sample_lists_the_options(device, name):
    """Of an unknown option the known ones are listed."""
    with pytest.raises(ValueError) as caught:
        stn.affine_grid_sample(x4(device), theta(device), **{name: "none"})
    known = ("bilinear", "nearest", "bicubic") if name == "mode" else ("zeros", "border", "reflection")
    assert all(repr(option) in str(caught.value) for option in known)


def test_affine_grid_sample_accepts_oddities(either_backend, device):
    """Lists and ``torch.Size`` for a size, subclasses of str for a mode."""
    x, t = x4(device), theta(device)
    expected = stn.affine_grid_sample(x, t, (4, 5), "nearest", "border")
    for size in ([4, 5], torch.Size((4, 5)), x.shape[2:], None):
        assert torch.equal(stn.affine_grid_sample(x, t, size, Text("nearest"), Text("border")), expected)


# --------------------------------------------------------------------------------------- emptiness
EMPTY = {  # name: (input shape, parameter shape, output size, output shape)
    "batch": ((0, 3, 4, 5), (0, 2, 3), (6, 7), (0, 3, 6, 7)),
    "batch of one theta": ((0, 3, 4, 5), (1, 2, 3), (6, 7), (0, 3, 6, 7)),
    "channels": ((2, 0, 4, 5), (2, 2, 3), (6, 7), (2, 0, 6, 7)),
    "height": ((2, 3, 4, 5), (2, 2, 3), (0, 7), (2, 3, 0, 7)),
    "width": ((2, 3, 4, 5), (2, 2, 3), (6, 0), (2, 3, 6, 0)),
    "depth": ((2, 3, 2, 4, 5), (2, 3, 4), (0, 6, 7), (2, 3, 0, 6, 7)),
    "transforms": ((2, 3, 4, 5), (2, 0, 2, 3), (6, 7), (2, 0, 3, 6, 7)),
    "batch of transforms": ((0, 3, 4, 5), (0, 4, 2, 3), (6, 7), (0, 4, 3, 6, 7)),
}


def assert_zero(gradient, tensor):
    assert gradient.shape == tensor.shape
    assert gradient.dtype == tensor.dtype
    assert (gradient == 0).all()


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("name", EMPTY)
def test_empty_affine(either_backend, device, name, mode):
    """No batch, channels, transforms or output: an empty result, and gradients of 0."""
    in_shape, theta_shape, size, out_shape = EMPTY[name]
    image = torch.rand(in_shape, device=device, requires_grad=True)
    params = torch.rand(theta_shape, device=device, requires_grad=True)
    output = stn.affine_grid_sample(image, params, size, mode)
    assert output.shape == out_shape
    assert output.dtype == image.dtype
    by_image, by_params = torch.autograd.grad(output.sum(), (image, params))
    assert_zero(by_image, image)
    assert_zero(by_params, params)


@pytest.mark.parametrize("name", ["no batch", "no channels", "no rows", "no output 5-d"])
def test_empty_grid_sample(either_backend, device, name):
    """Likewise for ``grid_sample``."""
    image, grid, *modes = GRID_SAMPLE[name](device)
    image, grid = image.detach().requires_grad_(), grid.detach().requires_grad_()
    output = stn.grid_sample(image, grid, *modes)
    assert output.numel() == 0
    by_image, by_grid = torch.autograd.grad(output.sum(), (image, grid))
    assert_zero(by_image, image)
    assert_zero(by_grid, grid)


# ---------------------------------------------------------------------------------------- autocast
AUTOCAST = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.int32, torch.float32),
]


@pytest.mark.parametrize(
    "input_dtype, grid_dtype", AUTOCAST, ids=["-".join(str(dtype)[6:] for dtype in pair) for pair in AUTOCAST]
)
@pytest.mark.parametrize("enabled", [True, False], ids=["autocast", "plain"])
def test_autocast_as_pytorch(either_backend, device, input_dtype, grid_dtype, enabled):
    """The dtypes that PyTorch's ``grid_sample`` takes and gives under autocast, and its errors."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    image, grid = x4(device).to(input_dtype), (g4(device) * 1.6 - 0.8).to(grid_dtype)
    with torch.autocast(device.type, dtype=dtype, enabled=enabled):
        ours = outcome(stn.grid_sample, (image, grid, *ZEROS))
        theirs = outcome(F.grid_sample, (image, grid, *ZEROS))
        assert ours == theirs
        if isinstance(theirs[0][0], tuple):
            difference = stn.grid_sample(image, grid, *ZEROS).cpu() - witness(image, grid, *ZEROS)
            assert difference.abs().max() < 1e-2


def test_autocast_gradients_keep_their_dtypes(either_backend, device):
    """Each gradient is of its argument's dtype, whatever the computation was cast to."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    image = x4(device, dtype=dtype, requires_grad=True)
    grid = g4(device, requires_grad=True)
    with torch.autocast(device.type, dtype=dtype):
        output = stn.grid_sample(image, grid, *ZEROS)
    output.sum().backward()
    assert image.grad.dtype == dtype
    assert grid.grad.dtype == torch.float32


# --------------------------------------------------------------------------- the nearest right call
NEAREST = {  # name: (a call, the end of its message)
    "no batch": (lambda d: stn.affine_grid_sample(x4(d), theta(d)[0]), "; a batch of one is theta[None]"),
    "no batch of images": (
        lambda d: stn.affine_grid_sample(x4(d)[0], theta(d)),
        "; a batch of one is input[None]",
    ),
    "another batch": (
        lambda d: stn.affine_grid_sample(x4(d), torch.rand(3, 2, 3, device=d)),
        "; theta has a batch of 3, input of 2",
    ),
    "a homography": (
        lambda d: stn.affine_grid_sample(x4(d), torch.rand(2, 3, 3, device=d)),
        "; projective_grid_sample takes homographies",
    ),
    "an affine map": (
        lambda d: stn.projective_grid_sample(x4(d), theta(d)),
        "; affine_grid_sample takes affine maps",
    ),
    "a map of volumes": (
        lambda d: stn.affine_grid_sample(x4(d), theta5(d)),
        "; that is a map for volumes, (N, C, D, H, W)",
    ),
    "one side": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), 7),
        "got 7; for equal sides size=(7, 7)",
    ),
    "a whole shape": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), x4(d).shape),
        "; without batch and channels size=(4, 5)",
    ),
    "another library's mode": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), mode="cubic"),
        "got 'cubic'; did you mean 'bicubic'?",
    ),
    "a typo": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), padding_mode="zeroes"),
        "got 'zeroes'; did you mean 'zeros'?",
    ),
    "nothing near": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), padding_mode="??"),
        "got '??'",
    ),
    "a flow's components last": (
        lambda d: stn.flow_grid_sample(x4(d)[:1], torch.rand(1, 4, 5, 2, device=d)),
        "flow must be (1, 2, H, W) for this 4-D input, got shape (1, 4, 5, 2); "
        "flow.movedim(-1, 1) puts components first",
    ),
    "no lattice": (
        lambda d: stn.tps_grid_sample(x4(d), torch.rand(2, 5, 2, device=d)),
        "got K = 5; control_points, (5, 2), says where in the output these are",
    ),
    "a small image": (
        lambda d: stn.nn.localisation_cnn().to(d)(torch.rand(1, 1, 24, 30, device=d)),
        "H and W of 28 or more for this localisation net, got shape (1, 1, 24, 30); localisation_cnn("
        "downsample=1) takes 14 or more and localisation_cnn(padding=2, downsample=1) 2 or more",
    ),
    "one number for a size": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), (5,)),
        "size must be (H, W), 2 ints, got (5,)",
    ),
    "a padding's other name": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), padding_mode=("zeros", "reflect")),
        "x first, got ('zeros', 'reflect'); did you mean 'reflection'?",
    ),
    "labels of int64": (
        lambda d: stn.affine_grid_sample(x4(d).long(), theta(d), mode="nearest"),
        "got torch.int64; input.float(), or input.to(torch.int16)",
    ),
    "a mask": (
        lambda d: stn.affine_grid_sample(x4(d) > 0, theta(d), mode="nearest"),
        "got torch.bool; input.float(), or input.to(torch.uint8)",
    ),
    "no channels": (
        lambda d: stn.nn.localisation_cnn(input_shape=(28, 28)),
        "input_shape must be (C, H, W), got (28, 28); without a batch, and with channels",
    ),
    "a side for a shape": (
        lambda d: stn.nn.localisation_fcn(input_shape=28),
        "input_shape must be (C, H, W) or (C, D, H, W), got 28",
    ),
    "one layer's width": (
        lambda d: stn.nn.localisation_fcn(32),
        "features must be a tuple of ints, one for each layer, got 32; features=(32,)",
    ),
}


NEAREST |= {
    f"swapped {name}": (
        lambda d, name=name, first=first: getattr(stn, f"{name}_grid_sample")(first.to(d), x4(d)),
        f"; arguments are (input, {argument}): are they swapped?",
    )
    for name, argument, first in (
        ("affine", "theta", torch.rand(2, 2, 3)),
        ("affine", "theta", torch.rand(1, 5, 2, 3)),
        ("projective", "homography", torch.rand(2, 3, 3)),
        ("tps", "points", torch.rand(2, 16, 2)),
        ("tps", "points", torch.rand(2, 5, 16, 2)),
        ("flow", "flow", torch.rand(2, 2, 4, 5)),
    )
}
NEAREST |= {
    "many crops of one": (
        lambda d: stn.affine_grid_sample(x4(d)[:1], torch.rand(5, 2, 3, device=d)),
        "; theta has a batch of 5, input of 1; theta[None] takes 5 crops of the one image",
    ),
    "many splines of one": (
        lambda d: stn.tps_grid_sample(x4(d)[:1], torch.rand(5, 16, 2, device=d)),
        "; points[None] takes 5 crops of the one image",
    ),
    "a photograph": (
        lambda d: stn.affine_grid_sample(np.zeros((4, 5, 3), np.uint8), theta(d)),
        "got ndarray; one image (H, W, C) is torch.from_numpy(input).permute(2, 0, 1)[None]",
    ),
    "an array": (
        lambda d: stn.affine_grid_sample(x4(d), np.zeros((2, 2, 3))),
        "got ndarray; torch.as_tensor(theta)",
    ),
    "an array of colours": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), fill=np.array([1, 2, 3])),
        "; fill.tolist()",
    ),
    "an array of many colours": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), fill=np.zeros((2, 3))),
        "; torch.as_tensor(fill)",
    ),
    "colours that broadcast over pixels": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), fill=torch.rand(3, 1, 1, device=d)),
        "got shape (3, 1, 1); fill.flatten(-3)",
    ),
    "colours of each volume": (
        lambda d: stn.affine_grid_sample(
            torch.rand(2, 3, 2, 4, 5, device=d),
            torch.rand(2, 3, 4, device=d),
            fill=torch.rand(2, 3, 1, 1, 1, device=d),
        ),
        "got shape (2, 3, 1, 1, 1); fill.flatten(-4)",
    ),
    "one colour in a tensor": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), fill=torch.rand(1, device=d)),
        "got shape (1,); fill.squeeze()",
    ),
    "a module's colours": (
        lambda d: stn.nn.SpatialTransformer(torch.nn.Flatten(), fill=torch.zeros(3)),
        "; fill.tolist()",
    ),
    "an array of a centre": (
        lambda d: stn.transforms.rotation(0.3, np.array([1, 2.0])),
        "; torch.as_tensor(centre)",
    ),
    "an array of a translation": (
        lambda d: stn.transforms.similarity(1.0, 0.3, np.array([1, 2.0])),
        "; torch.as_tensor(translation)",
    ),
    "a list of paddings": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), padding_mode=["circular", "border"]),
        "x first, got list; padding_mode=('circular', 'border')",
    ),
    "a list": (
        lambda d: stn.projective_grid_sample(x4(d), [[[1.0]]]),
        "got list; torch.as_tensor(homography)",
    ),
    "integers": (lambda d: stn.affine_grid_sample(x4(d), theta(d).long()), "got torch.int64; theta.float()"),
    "a flat matrix": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d).view(2, 6)),
        "got shape (2, 6); theta.view(-1, 2, 3)",
    ),
    "a mode in size's place": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), "bilinear"),
        "got 'bilinear'; mode='bilinear'",
    ),
    "a size of a tensor": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), torch.tensor([4, 5])),
        "; size.tolist()",
    ),
    "detections": (
        lambda d: stn.transforms.crop(torch.rand(1, 4, 5, device=d), (4, 5)),
        "got shape (1, 4, 5); without a score, which is last, boxes[..., :4]; without roi_align's "
        "image number boxes[..., 1:]",
    ),
    "a homography's kind": (
        lambda d: stn.transforms.identity(1, "homography"),
        "got 'homography'; did you mean 'projective'?",
    ),
}
NEAREST |= {
    "points of a linear layer": (
        lambda d: stn.tps_grid_sample(x4(d), torch.rand(2, 32, device=d)),
        "got shape (2, 32); points.view(2, -1, 2)",
    ),
    "points without a batch": (
        lambda d: stn.tps_grid_sample(x4(d), torch.rand(16, 2, device=d)),
        "got shape (16, 2); a batch of one is points[None]",
    ),
    "points with x and y first": (
        lambda d: stn.tps_grid_sample(x4(d), torch.rand(2, 2, 16, device=d)),
        "got shape (2, 2, 16); points.mT puts x and y last",
    ),
    "points with x and y first, for a grid": (
        lambda d: stn.tps_grid(torch.rand(2, 2, 16, device=d), (2, 3, 4, 5)),
        "got shape (2, 2, 16); points.mT puts x and y last",
    ),
    "points with x and y first, for coefficients": (
        lambda d: stn.transforms.tps_coefficients(torch.rand(2, 2, 16, device=d)),
        "got shape (2, 2, 16); points.mT puts x and y last",
    ),
    "a grid for theta": (
        lambda d: stn.affine_grid_sample(x4(d), g4(d)),
        "got shape (2, 6, 7, 2); grid_sample takes grids",
    ),
    "a grid for theta of volumes": (
        lambda d: stn.affine_grid_sample(x5(d), g5(d)),
        "got shape (2, 3, 2, 3, 3); grid_sample takes grids",
    ),
    "a square theta of volumes": (
        lambda d: stn.affine_grid_sample(x5(d), torch.rand(2, 4, 4, device=d)),
        "got shape (2, 4, 4); without the last row theta[..., :3, :]",
    ),
    "eight numbers of a homography": (
        lambda d: stn.projective_grid_sample(x4(d), torch.rand(2, 8, device=d)),
        "; torch.nn.functional.pad(homography, (0, 1), value=1.0).view(-1, 3, 3) has the last entry, 1, too",
    ),
    "a flow without a batch": (
        lambda d: stn.flow_grid_sample(x4(d), torch.rand(2, 4, 5, device=d)),
        "got shape (2, 4, 5); a batch of one is flow[None]",
    ),
    "a flow of another batch": (
        lambda d: stn.flow_grid_sample(x4(d), torch.rand(3, 2, 4, 5, device=d)),
        "; flow has a batch of 3, input of 2",
    ),
    "many flows of one": (
        lambda d: stn.flow_grid_sample(x4(d)[:1], torch.rand(3, 2, 4, 5, device=d)),
        "; flow has a batch of 3, input of 1; input.expand(3, -1, -1, -1)",
    ),
    "a size for a flow": (
        lambda d: stn.flow_grid_sample(x4(d), torch.rand(2, 2, 4, 5, device=d), (4, 5)),
        "mode must be a string, got tuple; a size is size=(4, 5), but a flow has its own",
    ),
    "a padding for a mode": (
        lambda d: stn.flow_grid_sample(x4(d), torch.rand(2, 2, 4, 5, device=d), mode="zeros"),
        "got 'zeros'; padding_mode='zeros'",
    ),
    "another library's padding for a mode": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), mode="replicate"),
        "got 'replicate'; padding_mode='border'",
    ),
    "a mode for a padding": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), padding_mode="nearest"),
        "got 'nearest'; mode='nearest'",
    ),
    "a size of an array": (
        lambda d: stn.affine_grid_sample(x4(d), theta(d), np.array([4, 5])),
        "; size.tolist()",
    ),
    "a size without batch and channels": (
        lambda d: stn.projective_grid(torch.rand(2, 3, 3, device=d), (4, 5)),
        "size must be (N, C, H, W), 4 ints, got (4, 5)",
    ),
    "colours of a grey image": (
        lambda d: stn.affine_grid_sample(x4(d)[:, :1], theta(d), fill=(1, 2, 3)),
        "fill must be a number for this input, got 3 of them",
    ),
}
NEAREST |= {
    "a module's size in transform's place": (
        lambda d: stn.nn.SpatialTransformer(torch.nn.Flatten(), (28, 28)),
        "got (28, 28); size=(28, 28)",
    ),
    "a module's mode in transform's place": (
        lambda d: stn.nn.SpatialTransformer(torch.nn.Flatten(), "bicubic"),
        "got 'bicubic'; mode='bicubic'",
    ),
    "a localisation net of images for volumes": (
        lambda d: stn.nn.SpatialTransformer(stn.nn.localisation_cnn(), dims=3),
        "localisation must be for volumes, got a localisation_cnn(); "
        "localisation_fcn() takes volumes, and so may a net of your own, of nn.Conv3d",
    ),
    "volumes for a localisation net of images": (
        lambda d: stn.nn.localisation_cnn()(x5(d)),
        "got shape (2, 3, 4, 5, 6); "
        "localisation_fcn() takes volumes, and so may a net of your own, of nn.Conv3d",
    ),
    "bytes for a localisation net": (
        lambda d: stn.nn.SpatialTransformer(stn.nn.localisation_cnn())(
            torch.zeros(2, 1, 28, 28, dtype=torch.uint8, device=d)
        ),
        "got torch.uint8; input.float(); "
        "to sample integers, transformer.sample(input, transformer.localise(input.float()))",
    ),
    "a patch without parentheses": (
        lambda d: stn.patch_torch(theta),
        "; a decorator is @stn.patch_torch()",
    ),
    "kornia's patch without parentheses": (
        lambda d: stn.patch_kornia(theta),
        "; a decorator is @stn.patch_kornia()",
    ),
    "a lattice's side for matrices": (
        lambda d: stn.transforms.identity(2, k=5),
        "k must be left out unless kind='tps', got 5 for 'affine'",
    ),
    "scales in a column": (
        lambda d: stn.transforms.attention(torch.rand(2, 1, device=d), torch.rand(2, 2, device=d)),
        "scale must be a number, or (2,), one for each translation, got shape (2, 1); scale.squeeze(-1)",
    ),
    "angles in a column": (
        lambda d: stn.transforms.rotation(torch.rand(2, 1, device=d), torch.rand(2, 2, device=d)),
        "angle must be a number, or (2,), one for each centre, got shape (2, 1); angle.squeeze(-1)",
    ),
    "scales of axes": (
        lambda d: stn.transforms.attention(torch.rand(5, 2, device=d), torch.rand(5, 2, device=d)),
        "got shape (5, 2); one scale serves all axes; for others write theta, or crop boxes",
    ),
    "two scales of axes": (
        lambda d: stn.transforms.attention((0.5, 0.3), (0.0, 0.0)),
        "got tuple; one scale serves all axes; for others write theta, or crop boxes",
    ),
    "a list of scales": (
        lambda d: stn.transforms.attention([0.5, 0.3], torch.rand(2, 2, device=d)),
        "got list; torch.as_tensor(scale)",
    ),
    "scales of another batch": (
        lambda d: stn.transforms.attention(torch.rand(2, device=d), torch.rand(3, 2, device=d)),
        "scale must be of leading dimensions that broadcast with translation's, (3,), got (2,)",
    ),
    "control points on a line": (
        lambda d: stn.transforms.tps_coefficients(torch.rand(5, 2), torch.arange(5.0).repeat(2, 1).mT),
        "control_points must be spread over the plane, got 5 points on one line",
    ),
    "a picture with channels last": (
        lambda d: stn.viz.draw_samples(torch.rand(4, 5, 3, device=d)),
        "got shape (4, 5, 3); samples.permute(2, 0, 1) has channels first",
    ),
    "pictures": (
        lambda d: stn.viz.draw_samples(x4(d)),
        "got shape (2, 3, 4, 5); samples[0] is one of a batch",
    ),
}
NEAREST |= {
    f"drawn {name}": (
        lambda d, shape=shape: stn.viz.grid_lines((4, 5), torch.rand(shape, device=d)),
        f"got shape {shape}; {hint}",
    )
    for name, shape, hint in (
        ("homography", (3, 3), "kind='projective'"),
        ("homographies", (5, 3, 3), "kind='projective'"),
        ("points", (16, 2), "kind='tps'"),
        ("flow", (2, 4, 5), "kind='flow'"),
        ("flows", (3, 2, 4, 5), "kind='flow'"),
        ("grid", (3, 4, 5, 2), "kind='grid'"),
        ("splines, or a grid", (2, 16, 2), "kind='tps' or kind='flow' or kind='grid'"),
    )
}


@pytest.mark.parametrize("name", NEAREST)
def test_errors_say_the_nearest_right_call(device, name):
    call, end = NEAREST[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(device)
    assert str(caught.value).endswith(end), caught.value


NOTES = {  # name: (arguments on a device, how the note begins)
    "bytes": (lambda d: (x4(d).to(torch.uint8), g4(d)), "grid_sample takes floats: input.float()"),
    "padding": (lambda d: (x4(d), g4(d), "bilinear", "wrap"), "stn_triton has padding_mode='circular' too"),
    "paddings": (
        lambda d: (x4(d), g4(d), "bilinear", ["circular", "border"]),
        "stn_triton takes a padding for each axis as a tuple, x first: padding_mode=('circular', 'border')",
    ),
    "mode": (lambda d: (x4(d), g4(d), "cubic"), ""),
    "padding for mode": (lambda d: (x4(d), g4(d), "border"), "padding_mode='border'"),
    "dtypes": (lambda d: (x4(d), g4(d).double()), "grid.to(input.dtype)"),
    "components first": (
        lambda d: (x4(d), g4(d).movedim(-1, 1)),
        "grid.movedim(1, -1) puts coordinates last; flow_grid_sample takes displacements in pixels",
    ),
    "components first, volumes": (lambda d: (x5(d), g5(d)[..., :2, :].movedim(-1, 1)), "grid.movedim(1, -1)"),
    "one grid": (
        lambda d: (x4(d), g4(d)[:1]),
        "a batch of one is not broadcast: grid.expand(2, -1, -1, -1)",
    ),
    "one volume": (
        lambda d: (x5(d)[:1], g5(d)),
        "a batch of one is not broadcast: input.expand(2, -1, -1, -1, -1)",
    ),
    "no batch": (lambda d: (x4(d)[:1], g4(d)[0]), "a batch of one is grid[None]"),
    "theta": (lambda d: (x4(d), theta(d)), "affine_grid_sample takes theta"),
    "theta of volumes": (lambda d: (x5(d), theta5(d)), "affine_grid_sample takes theta"),
    "places": (lambda d: (x4(d), g4(d)[:, 0]), "places (N, P, 2) are grid[:, None]"),
    "places in volumes": (lambda d: (x5(d), g5(d)[:, 0, 0]), "places (N, P, 3) are grid[:, None, None]"),
    "swapped": (lambda d: (g4(d), x4(d)), "arguments are (input, grid): are they swapped?"),
    "swapped, volumes": (lambda d: (g5(d), x5(d)), "arguments are (input, grid): are they swapped?"),
    "arrays": (
        lambda d: (x4("cpu").numpy(), g4("cpu").numpy()),
        "torch.as_tensor(input); torch.as_tensor(grid)",
    ),
    "photograph": (
        lambda d: (np.zeros((4, 5, 3), np.uint8), g4(d)),
        "one image (H, W, C) is torch.from_numpy(input).permute(2, 0, 1)[None]",
    ),
    "None": (lambda d: (x4(d), None), ""),
    "no dimensions": (lambda d: (torch.tensor(1.0, device=d), g4(d)), ""),
}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
@pytest.mark.parametrize("name", NOTES)
def test_notes_on_pytorchs_errors(device, name):
    """Where the message is PyTorch's, a note says what it leaves out."""
    make, start = NOTES[name]
    with pytest.raises(Exception) as caught:
        stn.grid_sample(*make(device), align_corners=False)
    note = " ".join(getattr(caught.value, "__notes__", ()))
    assert note.startswith(start), note
    assert bool(note) == bool(start)
