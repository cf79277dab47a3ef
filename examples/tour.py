# %% [markdown]
# # A tour of `stn_triton`
#
# A spatial transformer lets a network choose where it looks. It predicts a transformation from the image,
# and samples the image there. This package does the sampling in one kernel, with gradients by the image and
# by the transformation.
#
# Everything here runs on a CPU in seconds. With a GPU, set `device = "cuda"` in the first cell; nothing
# else changes. You need `pip install "stn_triton[demo]"`.
#
# This notebook is made from `tour.py`, by `python -m examples.notebook examples/tour.py`.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from skimage import data as photographs
from sklearn.datasets import load_digits
from torch import nn

import stn_triton as stn
from stn_triton import viz

torch.manual_seed(0)
device = "cpu"

# %% [markdown]
# ## From PyTorch's tutorial to this package
#
# PyTorch's tutorial on spatial transformers has a net of this kind. A small network sees the digit and
# predicts six numbers, the matrix `theta`. `affine_grid` makes of it where each output pixel is to be read,
# and `grid_sample` reads there. The last layer starts as the identity, so that training begins with the
# digit as it is.


# %%
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.localisation = nn.Sequential(
            *(nn.Conv2d(1, 8, 7), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(8, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(90, 32), nn.ReLU()),
        )
        self.regression = nn.Linear(32, 6)
        nn.init.zeros_(self.regression.weight)
        self.regression.bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])
        self.classifier = nn.Sequential(
            *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(1440, 10)),
        )

    def straighten(self, x):
        theta = self.regression(self.localisation(x)).view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x):
        return self.classifier(self.straighten(x))


# %% [markdown]
# Five lines of it change:
#
# ```diff
# -import torch.nn.functional as F
# +import stn_triton as stn
#
#          theta = self.regression(self.localisation(x)).view(-1, 2, 3)
# -        grid = F.affine_grid(theta, x.size(), align_corners=False)
# -        return F.grid_sample(x, grid, align_corners=False)
# +        return stn.affine_grid_sample(x, theta)
# ```
#
# The grid is gone: it is never made, neither forward nor backward. Below, both nets have the same weights,
# and give the same. They are compared a little off the identity, where every sample lies exactly on a
# pixel: bilinear interpolation has a corner there, and rounding decides which of its two slopes one gets.


# %%
class Fused(Net):
    def straighten(self, x):
        theta = self.regression(self.localisation(x)).view(-1, 2, 3)
        return stn.affine_grid_sample(x, theta)


found = load_digits()  # 1,797 handwritten digits of 8 x 8 pixels
digits = torch.from_numpy(found.images).float().unsqueeze(1).to(device) / 16
labels = torch.from_numpy(found.target).long().to(device)


def rotated(digits, limit):
    """(N, 1, 8, 8) -> (N, 1, 28, 28): enlarged and turned by up to a limit, in one go."""
    angle = limit * (2 * torch.rand(len(digits), device=digits.device) - 1)
    scale, centre = torch.full_like(angle, 1.25), torch.zeros(len(digits), 2, device=digits.device)
    return stn.affine_grid_sample(digits, stn.transforms.similarity(scale, angle, centre), (28, 28))


tutorial, net = Net().to(device), Fused().to(device)
off = 0.05 * torch.randn(6, device=device)
tutorial.regression.bias.data += off
net.load_state_dict(tutorial.state_dict())
images = rotated(digits[:64], math.pi / 3)
losses = [F.cross_entropy(one(images), labels[:64]) for one in (tutorial, net)]
for loss in losses:
    loss.backward()
first, second = (torch.cat([p.grad.flatten() for p in one.parameters()]) for one in (tutorial, net))
print(f"losses {losses[0]:.5f} and {losses[1]:.5f}")
print("the gradients agree to a ten thousandth:", ((first - second).norm() < 1e-4 * first.norm()).item())

# %% [markdown]
# It trains as before. Nobody tells it the angles. While digits are nearly upright the classifier comes to
# want them so. As they begin to turn, the transformer turns them back.

# %%
net.regression.bias.data -= off
steps = 200
optimiser = torch.optim.Adam(net.parameters(), 3e-3)
for step in range(steps):
    index = torch.randint(1400, (64,), device=device)
    limit = math.pi / 3 * min(1.0, step / (0.7 * steps))
    loss = F.cross_entropy(net(rotated(digits[index], limit)), labels[index])
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

with torch.no_grad():
    images = rotated(digits[1400:], math.pi / 3)
    straight = net.straighten(images)
    theta = net.regression(net.localisation(images)).view(-1, 2, 3)
    right = (net(images).argmax(1) == labels[1400:]).float().mean()
print(f"{100 * right:.0f} % of the turned digits that it had not seen are told right")

_, axes = plt.subplots(2, 8, figsize=(8, 2.1), layout="constrained")
for k, (above, below) in enumerate(zip(*axes)):
    viz.draw_grid(images[k].clamp(0, 1), theta[k], lines=4, labels=[[]], ax=above)
    viz.draw_samples(straight[k].clamp(0, 1), labels=(), linewidth=1, ax=below)

# %% [markdown]
# `stn.nn.SpatialTransformer` is all of that in one module: any localisation net, five kinds of
# transformation, a start at the identity or at regions of your choice.

# %%
transformer = stn.nn.SpatialTransformer(
    stn.nn.localisation_cnn(input_shape=(1, 28, 28)), "affine", features=20
).to(device)
print(torch.allclose(transformer(images), images, atol=1e-5))

# %% [markdown]
# ## Several crops of one image
#
# `theta` of shape (N, T, 2, 3) takes T crops of each image, and the image is not copied. Here are three
# crops of one photograph. `theta` always maps the output to the input, x first, and -1 and 1 are the
# image's edges.

# %%
pixels = torch.from_numpy(photographs.astronaut()[:256, 100:356].copy())
photo = (pixels.permute(2, 0, 1)[None].float() / 255).to(device)

scale = torch.tensor([0.33, 0.25, 0.3], device=device)
place = torch.tensor([[-0.05, -0.1], [0.35, 0.65], [0.65, -0.4]], device=device)
crops = stn.transforms.attention(scale, place)[None]  # (1, 3, 2, 3)
samples = stn.affine_grid_sample(photo, crops, size=(96, 96))
print(tuple(samples.shape))


def show(params, kind, samples, lines=8):
    """The photograph with the grid over it, and what is read."""
    count = len(samples)
    _, axes = plt.subplots(1, 1 + count, figsize=(2 + 2 * count, 2.1), layout="constrained")
    labels = [[]] * count
    viz.draw_grid(photo[0], params, kind, lines=lines, labels=labels, show_points=False, ax=axes[0])
    for color, sample, ax in zip(viz.PALETTE, samples, axes[1:]):
        viz.draw_samples(sample.detach().clamp(0, 1), color=color, labels=(), linewidth=2, ax=ax)


show(crops[0], "affine", samples[0], lines=0)

# %% [markdown]
# ## A homography, a spline, a flow
#
# A homography has a vanishing point.

# %%
homography = torch.tensor([[[0.8, 0.1, 0.0], [0.0, 0.7, 0.0], [0.0, 0.4, 1.0]]], device=device)
show(homography[0], "projective", stn.projective_grid_sample(photo, homography, (128, 128)))

# %% [markdown]
# A thin-plate spline is told for each point of a lattice where it is read. The plate between bends as
# little as it can.

# %%
lattice = stn.transforms.control_lattice(4).to(device)
points = (0.8 * lattice + 0.12 * torch.randn(16, 2, device=device))[None]
show(points[0], "tps", stn.tps_grid_sample(photo, points, (128, 128)))

# %% [markdown]
# A flow tells it for every pixel, in pixels.

# %%
y, x = torch.meshgrid(*[torch.arange(256.0, device=device)] * 2, indexing="ij")
flow = torch.stack([8 * (y / 20).sin(), 8 * (x / 20).sin()])[None]
show(flow[0], "flow", stn.flow_grid_sample(photo, flow))

# %% [markdown]
# ## Gradients by the photograph
#
# Which pixels does a crop depend on, and how much? Here each of the three crops has a squared mean, and its
# gradient by the photograph is drawn. Where crops overlap, gradients add up. Small crops weigh more: more
# outputs read each pixel.

# %%
photo.requires_grad_()
stn.affine_grid_sample(photo, crops, size=(96, 96)).square().sum().backward()
_, ax = plt.subplots(figsize=(2.2, 2.2), layout="constrained")
ax.imshow(photo.grad[0].norm(dim=0).cpu(), cmap="inferno")
ax.set_axis_off()
photo.requires_grad_(False)
print(f"{100 * (photo.grad != 0).float().mean():.0f} % of the photograph has a gradient")

# %% [markdown]
# Gradients by the transformation are what a transformer learns from. `torch.func` and second derivatives
# work too.


# %%
def contrast(theta):
    """How much a crop varies."""
    return stn.affine_grid_sample(photo, theta, size=(32, 32)).var()


first = torch.func.grad(contrast)(crops[:, 0])
second = torch.func.hessian(contrast)(crops[:, 0])
print(tuple(first.shape), tuple(second.shape), first.isfinite().all().item(), second.isfinite().all().item())

# %% [markdown]
# ## `torch.compile`
#
# Each function is one operator to the compiler, with no break in the graph. The backend named here needs no
# C++ compiler; leave it out for the usual one.

# %%
compiled = torch.compile(net.eval(), fullgraph=True, backend="aot_eager")
with torch.no_grad():
    print(torch.allclose(compiled(images[:8]), net(images[:8]), atol=1e-5))

# %% [markdown]
# ## Export
#
# An exported program has the operator of this package. For where the package is not installed, decompose it
# into PyTorch's own operators; `torch.onnx.export` takes the result.

# %%
program = torch.export.export(net, (images[:8],))
plain = program.run_decompositions(stn.export.decompositions())
for name, one in (("exported", program), ("decomposed", plain)):
    calls = [str(node.target) for node in one.graph.nodes if node.op == "call_function"]
    print(f"{name}: {', '.join(sorted({call for call in calls if 'stn' in call or 'grid' in call}))}")
print(torch.allclose(plain.module()(images[:8]), net(images[:8]), atol=1e-5))

# %% [markdown]
# ## Code that you do not edit
#
# Libraries call PyTorch's `grid_sample` themselves. Inside of this block it runs on this package's kernels,
# wherever it is called from, on devices that have them. (On a CPU it stays PyTorch's.)

# %%
before = tutorial(images[:8])
with stn.patch_torch():
    print(torch.allclose(tutorial(images[:8]), before, atol=1e-5))

# %% [markdown]
# From here: `docs/numbers.md` has what is supported, `examples/README.md` the paper's experiments, `python -m
# stn_triton` tells which code computes on your devices.
