"""SVHN's CNN, ST-CNN Single and ST-CNN Multi, and the same transformers on PyTorch's sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from examples.svhn_data import LENGTH, NONE
from stn_triton.nn import SpatialTransformer, localisation_cnn, localisation_fcn

Kind = Literal["CNN", "ST-CNN Single", "ST-CNN Multi"]
KINDS: tuple[Kind, ...] = ("CNN", "ST-CNN Single", "ST-CNN Multi")
CHANNELS = 48, 64, 128, 160, 192, 192, 192, 192
POOLED = 0, 2, 4, 6  # the convolutions that a 2 x 2 max-pooling follows
HIDDEN = 3072


class TorchTransformer(SpatialTransformer):
    """An affine :class:`SpatialTransformer` that samples by PyTorch's two functions, on a grid in memory."""

    def sample(self, input: Tensor, theta: Tensor) -> Tensor:
        size = self.size or input.shape[2:]
        grid = F.affine_grid(theta, [*input.shape[:2], *size], self.align_corners)
        return F.grid_sample(input, grid.to(input.dtype), self.mode, self.padding_mode, self.align_corners)


def svhn_net(
    kind: Kind,
    size: int = 64,
    *,
    width: float = 1.0,
    hidden: int = 2,
    dropout: float = 0.5,
    transformer: Callable[..., SpatialTransformer] = SpatialTransformer,
) -> nn.Sequential:
    """(N, 3, size, size) -> (N, 5, 11), a softmax's logits for each place of a sequence.

    Args:
        kind: "CNN"; "ST-CNN Single", with one transformer before all; or "ST-CNN Multi", with one before each
            of the first four convolutions, three of them on feature maps. Affine, bilinear.
        size: of the images, a multiple of 16.
        width: scales the channels, of localisation nets to 8 at least, and the hidden layers, but not
            localisation nets'; 1 is the paper's.
        hidden: layers between the convolutions and the softmaxes. (Two or three: not known for sure.)
        dropout: after every layer but the first convolution and those of localisation nets.
        transformer: what makes the transformers.
    """
    layers: list[nn.Module] = []
    shape = 3, size, size
    for index, full in enumerate(CHANNELS):
        localisation = None
        if kind == "ST-CNN Single" and index == 0:
            filters = max(8, round(width * 32))
            localisation = localisation_cnn(
                (filters, filters), (32, 32), padding=2, downsample=1, input_shape=shape
            )
        elif kind == "ST-CNN Multi" and index < 4:
            localisation = localisation_fcn((32, 32), input_shape=shape)
        if localisation is not None:
            layers.append(transformer(localisation, "affine", features=32))
        channels = round(width * full)
        layers += [nn.Conv2d(shape[0], channels, 5, padding=2), nn.ReLU()]
        if index > 0:
            layers.append(nn.Dropout(dropout))
        side = shape[1]
        if index in POOLED:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        shape = channels, side, side
    layers.append(nn.Flatten())
    features = math.prod(shape)
    for _ in range(hidden):
        layers += [nn.Linear(features, round(width * HIDDEN)), nn.ReLU(), nn.Dropout(dropout)]
        features = round(width * HIDDEN)
    layers += [nn.Linear(features, LENGTH * (NONE + 1)), nn.Unflatten(1, (LENGTH, NONE + 1))]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):  # the classifier's: ten deep, without it none learns
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def sequence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the five places, the batch's mean."""
    return LENGTH * F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def sequence_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,), bool: a sequence is right if all of it is."""
    return (logits.argmax(-1) != labels).any(-1)
