"""Drawings: without a display, at the coordinates the samplers read, with errors that name the argument."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import stn_triton as stn  # noqa: E402
from stn_triton import viz  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
H, W = 40, 60


def make_params(kind):
    """One transform of a kind, which is near to the identity."""
    torch.manual_seed(0)
    if kind == "flow":
        return torch.randn(2, 12, 20)
    if kind == "grid":
        return stn.affine_grid(stn.transforms.identity(1), (1, 1, 12, 20), False)[0] * 0.5
    start = stn.transforms.identity(1, kind)[0]
    noise = 0.05 * torch.randn_like(start)
    return start + (noise if kind != "projective" else noise * torch.eye(3).flip(0))


KINDS = ["affine", "attention", "similarity", "projective", "tps", "flow", "grid"]


@pytest.fixture(autouse=True)
def _close():
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def rendered(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def interpolated(kind, params, xy, align_corners=False):
    """Where ``xy``, normalised output coordinates (P, 2), are read, in pixels; not by the package's grids."""
    p = params.double()
    xy1 = torch.cat([xy, torch.ones_like(xy[:, :1])], 1)
    if kind == "tps":
        lattice = stn.transforms.control_lattice(4, dtype=torch.float64)
        uv = stn.transforms.tps_evaluate(stn.transforms.tps_coefficients(p), lattice, xy)
    elif kind == "projective":
        uvw = xy1 @ p.T
        uv = uvw[:, :2] / uvw[:, 2:]
    else:
        uv = xy1 @ p.T
    size = torch.tensor([W, H], dtype=torch.float64)
    return (uv + 1) / 2 * (size - 1) if align_corners else ((uv + 1) * size - 1) / 2


CORNERS = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("kind", KINDS[:5])
def test_lines_are_where_the_formula_reads(kind, align_corners):
    params = make_params(kind)
    (found,) = viz.grid_lines((H, W), params, kind, lines=4, align_corners=align_corners)
    torch.testing.assert_close(found.corners, interpolated(kind, params, CORNERS, align_corners))
    assert len(found.lines) == 6
    steps = torch.linspace(-1, 1, len(found.lines[0]), dtype=torch.float64)
    for line, k in zip(found.lines, [-0.5, 0, 0.5] * 2):
        fixed = torch.full_like(steps, k)
        first = line is found.lines[0] or any(line is other for other in found.lines[:3])
        xy = torch.stack([fixed, steps] if first else [steps, fixed], -1)
        torch.testing.assert_close(line, interpolated(kind, params, xy, align_corners))
    torch.testing.assert_close(found.border[0], found.corners[0])
    torch.testing.assert_close(found.border[-1], found.corners[0])
    assert len(found.points) == (16 if kind == "tps" else 0)


def test_what_is_learned_is_drawn_and_numbers_are_any():
    """Control points that are parameters, of any dtype; NumPy's numbers."""
    lattice = torch.nn.Parameter(stn.transforms.control_lattice(3))
    points = (lattice * 0.8).detach()
    size, lines = (np.int64(H), W), np.int64(4)
    (found,) = viz.grid_lines(size, points, "tps", control_points=lattice, lines=lines)
    (plain,) = viz.grid_lines((H, W), points, "tps", control_points=lattice.detach(), lines=4)
    assert torch.equal(found.border, plain.border)
    assert not found.border.requires_grad
    viz.draw_grid(torch.rand(3, H, W), points, "tps", control_points=lattice)
    viz.draw_before_after(torch.rand(H, W), points, "tps", control_points=lattice, size=(5, 6))


@pytest.mark.parametrize("align_corners", [False, True])
def test_flow_moves_pixels_by_pixels(align_corners):
    """A flow of the image's own size starts at pixel centres, with and without aligned corners."""
    flow = torch.zeros(2, H, W)
    flow[0], flow[1] = 3, -2
    (found,) = viz.grid_lines((H, W), flow, "flow", align_corners=align_corners)
    expected = torch.tensor([[3, -2], [W + 2, -2], [W + 2, H - 3], [3, H - 3]], dtype=torch.float64)
    torch.testing.assert_close(found.corners, expected)


def test_grid_and_affine_agree():
    theta = make_params("affine")
    grid = stn.affine_grid(theta[None], (1, 1, 9, 9), True)[0]
    by_grid = viz.grid_lines((H, W), grid, "grid", lines=4, align_corners=True)[0]
    by_theta = viz.grid_lines((H, W), theta, lines=4, align_corners=True)[0]
    torch.testing.assert_close(by_grid.corners, by_theta.corners, rtol=1e-5, atol=1e-5)
    for coarse, fine in zip(by_grid.lines, by_theta.lines):
        torch.testing.assert_close(coarse, fine[:: len(fine) // 8], rtol=1e-5, atol=1e-5)


def test_horizon_interrupts_lines():
    """Lines that cross w = 0 have a gap there, and what is far away is left out."""
    homography = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1.7, 0.3]])
    (found,) = viz.grid_lines((H, W), homography, "projective", lines=6)
    for line in found.lines[:5]:  # of constant x
        bad = line.isnan().any(1)
        assert bad.any()
        assert bad.float().mean() < 0.2
        y = torch.linspace(-1, 1, len(line))
        gap = (y[bad].min(), y[bad].max())
        assert gap[0] < -0.3 / 1.7 < gap[1]
    figure = viz.draw_grid(torch.rand(3, H, W), homography, "projective").figure
    assert rendered(figure).std() > 0
    singular = viz.draw_grid(torch.rand(3, H, W), torch.zeros(3, 3), "projective")
    rendered(singular.figure)


@pytest.mark.parametrize("transforms", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_over_the_image(kind, transforms):
    image = torch.rand(3, H, W)
    before, params = image.clone(), make_params(kind)
    if transforms:
        params = torch.stack([params * s for s in (1.0, 0.8, 0.6)])
    params.requires_grad_()
    axes = viz.draw_grid(image, params, kind, lines=5)
    assert torch.equal(image, before)
    assert params.grad is None
    texts = [text.get_text() for text in axes.texts]
    assert texts == (
        ["a", "2", "3", "4", "b", "2", "3", "4", "c", "2", "3", "4"] if transforms else [*"1234"]
    )
    colors = {line.get_color() for line in axes.lines}
    assert colors == set(viz.PALETTE[: transforms or 1])
    assert axes.get_xlim() == (-0.5, W - 0.5)
    assert axes.get_ylim() == (H - 0.5, -0.5)
    with_lines = rendered(axes.figure)
    bare = viz.draw_samples(image, labels="").figure
    assert with_lines.shape == rendered(bare).shape
    assert (with_lines != rendered(bare)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transforms", [None, 3])
def test_before_and_after(kind, transforms):
    params = make_params(kind)
    params = torch.stack([params] * transforms) if transforms else params
    size = None if kind in ("flow", "grid") else (24, 30)
    figure = viz.draw_before_after(torch.rand(H, W), params, kind, size=size, lines=3)
    assert len(figure.axes) == 1 + (transforms or 1)
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape[:2] == (size or (12, 20))
    rendered(figure)


def test_after_is_what_the_sampler_gives():
    image, theta = torch.rand(3, H, W), make_params("affine")
    figure = viz.draw_before_after(image, theta, mode="bicubic", padding_mode="border")
    expected = stn.affine_grid_sample(image[None], theta[None], None, "bicubic", "border")[0].clamp(0, 1)
    shown = torch.as_tensor(figure.axes[1].images[0].get_array().data)
    torch.testing.assert_close(shown, expected.permute(1, 2, 0), rtol=0, atol=2e-5)


def test_own_axes_labels_colours_and_control_points():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    controls = torch.tensor([[-1.0, -1], [1, -1], [0, 1]])
    points = controls * 0.5
    result = viz.draw_grid(
        torch.zeros(H, W), points, "tps", control_points=controls, colors=["red"], labels=["x"], ax=axes
    )
    assert result is axes
    assert [text.get_text() for text in axes.texts] == ["x"]
    dots = axes.lines[-1]
    torch.testing.assert_close(torch.tensor(dots.get_xdata()), ((points[:, 0] + 1) * W - 1).double() / 2)
    viz.draw_grid(torch.zeros(H, W), points, "tps", control_points=controls, show_image=False, ax=axes)
    assert len(axes.images) == 1


@pytest.mark.parametrize(
    "dtype, shape",
    [
        (torch.uint8, (3, H, W)),
        (torch.float16, (1, H, W)),
        (torch.float64, (H, W)),
        (torch.bfloat16, (3, H, W)),
    ],
)
def test_images_of_each_type(dtype, shape):
    image = torch.rand(shape) * (255 if dtype == torch.uint8 else 1)
    array = viz.draw_grid(image.to(dtype), make_params("affine").to(torch.float16)).images[0].get_array()
    assert array.max() <= 1
    expected = image.squeeze() if image.squeeze().dim() == 2 else image.permute(1, 2, 0)
    expected = expected / (255 if dtype == torch.uint8 else 1)
    torch.testing.assert_close(torch.as_tensor(array.data), expected, rtol=0, atol=6e-3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"image": [1]}, TypeError, "image must be a tensor, got list"),
        (
            {"image": torch.zeros(H, W, dtype=torch.int64)},
            TypeError,
            "image must be floating-point, or uint8",
        ),
        ({"image": torch.zeros(1, 3, H, W)}, ValueError, "image must be one image"),
        ({"image": torch.zeros(4, H, W)}, ValueError, "image must be one image"),
        ({"image": torch.zeros(3, 0, W)}, ValueError, "image must be one image"),
        ({"params": None}, TypeError, "params must be a tensor"),
        ({"params": torch.ones(2, 3).long()}, TypeError, "params must be a floating-point tensor"),
        ({"params": torch.eye(3)}, ValueError, r"params must be \(2, 3\) or \(T, 2, 3\) for kind 'affine'"),
        ({"params": torch.zeros(0, 2, 3)}, ValueError, "params must be"),
        ({"kind": "rigid"}, ValueError, "kind must be one of 'affine'"),
        ({"kind": "projective"}, ValueError, r"params must be \(3, 3\)"),
        ({"kind": "tps"}, ValueError, r"params must be \(K, 2\) or \(T, K, 2\) for kind 'tps' with K >= 3"),
        ({"kind": "tps", "params": torch.rand(5, 2)}, ValueError, "params must be a square number"),
        ({"kind": "flow"}, ValueError, r"params must be \(2, h, w\)"),
        ({"kind": "grid", "params": torch.rand(4, 5, 3)}, ValueError, r"params must be \(h, w, 2\)"),
        ({"control_points": torch.rand(3, 2)}, ValueError, "control_points must be left out"),
        (
            {"kind": "tps", "params": torch.rand(4, 2), "control_points": torch.zeros(4, 2)},
            ValueError,
            "control_points must be",
        ),
        (
            {"kind": "tps", "params": torch.rand(4, 2), "regularization": -1},
            ValueError,
            "regularization must",
        ),
        ({"lines": 1.5}, TypeError, "lines must be an int"),
        ({"lines": -1}, ValueError, "lines must be 0 or more"),
        ({"align_corners": None}, TypeError, "align_corners must be a bool"),
        ({"labels": ["1", "2"]}, ValueError, "labels must be 1 sequences of up to 4 labels"),
        ({"colors": []}, ValueError, "colors must be one colour or more"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"image": torch.zeros(H, W), "params": make_params("affine")} | change
    with pytest.raises(error, match=message):
        viz.draw_grid(**arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"kind": "flow", "params": torch.zeros(2, 4, 4), "size": (4, 4)},
            ValueError,
            "size must be left out",
        ),
        ({"ax": None}, TypeError, "ax must be left out"),
        ({"mode": "cubic"}, ValueError, "mode must be one of"),
    ],
)
def test_errors_of_before_and_after(change, error, message):
    arguments = {"image": torch.zeros(H, W), "params": make_params("affine")} | change
    with pytest.raises(error, match=message):
        viz.draw_before_after(**arguments)


def run(code, *options):
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_matplotlib_is_imported_by_drawing_alone():
    code = "import sys, stn_triton.viz; assert not [m for m in sys.modules if m.startswith('matplotlib')]"
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_missing_matplotlib_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install stn_triton\[viz\]"):
        viz.draw_grid(torch.zeros(H, W), make_params("affine"))
