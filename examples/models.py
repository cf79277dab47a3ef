"""The paper's classifiers of digits: FCN, CNN, and both behind a spatial transformer.

All have about the same number of parameters, of whatever transformer: the width of the classifier, units or
filters, makes up for what the localisation net takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stn_triton.nn import SpatialTransformer, Transform, localisation_cnn, localisation_fcn

PARAMETERS = 400_000
TRANSFORMS: dict[str, Transform] = {"Aff": "affine", "Proj": "projective", "TPS": "tps"}
NAMES = "FCN", "CNN", *(f"ST-{net}-{name}" for net in ("FCN", "CNN") for name in TRANSFORMS)
"""The rows of the paper's Table 1."""


def fcn(width: int, size: int, *, channels: int = 1, classes: int = 10) -> nn.Sequential:
    """(N, channels, size, size) -> (N, classes): two hidden layers of ``width`` units."""
    hidden = (
        nn.Flatten(),
        nn.Linear(channels * size * size, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
    )
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def cnn(width: int, size: int, *, channels: int = 1, classes: int = 10) -> nn.Sequential:
    """(N, channels, size, size) -> (N, classes): convolutions of 9 x 9 and 7 x 7 with ``width`` filters, each
    followed by 2 x 2 max-pooling, and one fully connected layer. Odd sizes are rounded up when halved, so
    that 21 x 21 pixels, which is half of 42, are enough."""
    for kernel in (9, 7):
        size = -(-(size - kernel + 1) // 2)
        if size < 1:
            raise ValueError("the images are too small for convolutions of 9 x 9 and 7 x 7")
    layers = []
    for inputs, kernel in ((channels, 9), (width, 7)):
        layers += [nn.Conv2d(inputs, width, kernel), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, classes))


class Transformed(nn.Module):
    """A spatial transformer, and a classifier of what comes out of it."""

    def __init__(self, transformer: SpatialTransformer, classifier: nn.Module) -> None:
        super().__init__()
        self.transformer, self.classifier = transformer, classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.transformer(images))


def count(model: nn.Module) -> int:
    """The number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def fit_width(build: Callable[[int], nn.Module], parameters: int) -> int:
    """The width at which ``build(width)`` comes nearest to a number of parameters."""

    def size(width: int) -> int:
        with torch.device("meta"):
            return count(build(width))

    low, high = 1, 2
    while size(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    return min(low, high, key=lambda width: abs(size(width) - parameters))


def build_classifier(
    name: str,
    size: int,
    *,
    halved: bool = False,
    parameters: int = PARAMETERS,
    channels: int = 1,
    classes: int = 10,
) -> nn.Module:
    """One of :data:`NAMES`, in its initial state, for images (N, channels, size, size).

    Args:
        name: of the model.
        size: of the images, 28 or more.
        halved: whether a transformer's output is averaged over 2 x 2 pixels before the classifier.
        parameters: how many the model is to have, about.
        channels, classes: of the images, and of the answers.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    *transformed, net = name.split("-")[:2]
    classifier = {"FCN": fcn, "CNN": cnn}[net]
    options = {"channels": channels, "classes": classes}
    if not transformed:
        return classifier(
            fit_width(lambda width: classifier(width, size, **options), parameters), size, **options
        )
    transformer = make_transformer(net, TRANSFORMS[name.split("-")[2]], size, channels=channels)
    pool = nn.AvgPool2d(2) if halved else nn.Identity()
    inner = size // 2 if halved else size
    rest = parameters - count(transformer)
    if rest < count(classifier(1, inner, **options)):
        raise ValueError(f"parameters must be more than {name}'s transformer has, {count(transformer):,}")
    width = fit_width(lambda width: classifier(width, inner, **options), rest)
    return Transformed(transformer, nn.Sequential(pool, classifier(width, inner, **options)))


def make_transformer(
    net: str, transform: Transform, size: int, *, channels: int = 1, transforms: int = 1
) -> SpatialTransformer:
    """The transformer of the paper's ST-FCN (``net`` "FCN") or ST-CNN ("CNN")."""
    localisation = {"FCN": localisation_fcn, "CNN": localisation_cnn}[net](input_shape=(channels, size, size))
    with torch.no_grad():
        features = localisation(torch.zeros(1, channels, size, size)).shape[1]
    return SpatialTransformer(localisation, transform, transforms=transforms, features=features)
