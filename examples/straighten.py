"""Train a spatial transformer to straighten rotated digits: ``python -m examples.straighten``.

Nobody tells it the angles: it sees rotated digits and their labels, and finds that straight ones are easier
to tell apart (Jaderberg et al., 2015, section 4.1, in small). The digits are the 1,797 real ones, of
8 x 8 pixels, that come with scikit-learn.

Convention: an angle of a transformation is that of its matrix, in radians; it maps output coordinates to
input coordinates. So a digit rotated by ``a`` is straight again after a transformer that rotates by ``-a``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stn_triton as stn
from stn_triton import backend
from stn_triton.nn import SpatialTransformer, Transform, localisation_cnn
from stn_triton.transforms import similarity

SIZE = (28, 28)
HELD_OUT = 397  # digits, the last ones
ZOOM = 1.25  # how much wider the image is than the digit, so that little of it leaves when it turns


class Straightened(NamedTuple):
    """A trained net, and what it does with M held-out digits."""

    model: nn.Sequential  # a SpatialTransformer, then a classifier
    losses: Tensor  # (steps,), the cross-entropy of each training batch
    before: Tensor  # (M, 1, 28, 28), rotated digits
    after: Tensor  # (M, 1, 28, 28), as the transformer hands them to the classifier
    applied: Tensor  # (M,), the angle of each digit's rotation
    found: Tensor  # (M,), the angle of the transformer's
    labels: Tensor  # (M,)
    predictions: Tensor  # (M,)

    @property
    def error(self) -> float:
        """The share of wrong predictions."""
        return (self.predictions != self.labels).double().mean().item()

    @property
    def remaining(self) -> Tensor:
        """(M,): how far each digit is from the transformer's idea of straight, which need not be ours."""
        angle = self.applied + self.found
        centre = torch.atan2(angle.sin().mean(), angle.cos().mean())
        return torch.remainder(angle - centre + math.pi, 2 * math.pi) - math.pi


def load_digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) from 0 to 1, and their labels."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    return images, torch.from_numpy(digits.target).long()


def rotate(digits: Tensor, angle: Tensor) -> Tensor:
    """(M, 1, 8, 8), (M,) -> (M, 1, 28, 28): enlarged and rotated in one go."""
    theta = similarity(torch.full_like(angle, ZOOM), angle, angle.new_zeros(len(angle), 2))
    return stn.affine_grid_sample(digits, theta, SIZE)


def draw_angles(count: int, limit: float) -> Tensor:
    return (2 * torch.rand(count) - 1) * limit


def angle_of(theta: Tensor) -> Tensor:
    """(..., 2, 3) -> (...,): the angle of the rotation nearest to a matrix."""
    return torch.atan2(theta[..., 1, 0] - theta[..., 0, 1], theta[..., 0, 0] + theta[..., 1, 1])


def make_model(transform: Transform) -> nn.Sequential:
    """The transformer, and a classifier that is too small to learn every rotation of every digit."""
    transformer = SpatialTransformer(
        localisation_cnn(padding=2, input_shape=(1, *SIZE)), transform, features=20
    )
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SIZE), 32), nn.ReLU(), nn.Linear(32, 10))
    return nn.Sequential(transformer, classifier)


def train(
    transform: Transform = "similarity",
    *,
    steps: int = 400,
    batch: int = 128,
    limit: float = math.radians(60),
    seed: int = 0,
) -> Straightened:
    """Trains on digits rotated at random by up to ``limit`` to both sides: some seconds on a CPU core.

    It runs on the CPU and PyTorch's operators: these images are too small to busy a GPU.

    Args:
        transform: of the transformer, one that has an angle: "similarity" or "affine".
        steps: of Adam.
        batch: how many digits a step.
        limit: of the angles, in radians.
        seed: of the weights, the batches and the angles. The global generator is left as it was.
    """
    digits, labels = load_digits()
    with backend.use("torch"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(transform)
        optimiser = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-2, total_steps=steps)
        losses = torch.empty(steps)
        for step in range(steps):
            chosen = torch.randint(len(digits) - HELD_OUT, (batch,))
            images = rotate(digits[chosen], draw_angles(batch, limit))
            loss = F.cross_entropy(model(images), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses[step] = loss.detach()

        model.eval()
        transformer, classifier = model
        applied = draw_angles(HELD_OUT, limit)
        with torch.no_grad():
            before = rotate(digits[-HELD_OUT:], applied)
            theta = transformer.localise(before)
            after = transformer.sample(before, theta)
            predictions = classifier(after).argmax(-1)
    found = angle_of(theta)
    return Straightened(model, losses, before, after, applied, found, labels[-HELD_OUT:], predictions)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.straighten", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--transform", choices=["similarity", "affine"], default="similarity")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    result = train(**vars(parser.parse_args(arguments)))
    losses, angle = result.losses, result.applied.rad2deg().std().item()
    print(f"cross-entropy     {losses[:20].mean():.3f} -> {losses[-20:].mean():.3f}")
    print(f"spread of angles  {angle:.1f} -> {result.remaining.rad2deg().std().item():.1f} degrees")
    print(f"held-out error    {result.error:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
