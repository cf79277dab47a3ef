"""Fine-grained classification: several transformers look at parts, one trunk reads them."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_triton.nn import SpatialTransformer

REGIONS = {
    2: [(-1.0, -1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0)],
    4: [(-1.0, -1.0, 0.0, 0.0), (0.0, -1.0, 1.0, 0.0), (-1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)],
}
"""Where transformers start: quarters of the image. (Not in the paper, which starts them apart.)"""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BuiltInTrunk(nn.Sequential):
    """Four strided convolutions with batch norm, (N, 3, S, S) -> (N, width, S / 16, S / 16): for tests, and
    where there is nothing better."""

    def __init__(self, width: int = 64) -> None:
        channels = [3, width // 4, width // 2, width, width]
        super().__init__(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
                for before, after in itertools.pairwise(channels)
            )
        )


def make_trunk(name: str, pretrained: bool = False) -> nn.Module:
    """A classification network without its pooling and head: (N, 3, H, W) -> (N, F, H', W').

    Args:
        name: "built-in"; "timm:NAME", any convolutional model of timm; or any classifier of torchvision whose
            features are pooled at the end. "googlenet" is the paper's: Inception with batch norm, which ends
            in 7 x 7 x 1024 for 224 pixels.
        pretrained: with ImageNet's weights, which torchvision and timm download.

    Raises:
        ImportError: timm or torchvision is not installed.
        ValueError: there is no such model, or its features cannot be told from its head.
    """
    if name == "built-in":
        if pretrained:
            raise ValueError("the built-in trunk has no pretrained weights")
        return BuiltInTrunk()
    if name.startswith("timm:"):
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ImportError(f"{name} needs timm: pip install timm") from error
        model = timm.create_model(
            name.partition(":")[2], pretrained=pretrained, num_classes=0, global_pool=""
        )
        return model
    try:
        from torchvision import models
        from torchvision.models import feature_extraction
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs torchvision: pip install torchvision") from error
    if name not in models.list_models(models):
        raise ValueError(f"torchvision has no classifier {name!r}")
    options = {}
    if name in ("googlenet", "inception_v3") and not pretrained:
        options = {"aux_logits": False, "init_weights": False}  # PyTorch's weights: torchvision's take SciPy
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    nodes = feature_extraction.get_graph_node_names(model)[1]
    pooling = [at for at, node in enumerate(nodes) if node in ("avgpool", "adaptive_avg_pool2d")]
    if not pooling:
        raise ValueError(f"{name} does not pool its features before its head")
    return _Features(feature_extraction.create_feature_extractor(model, {nodes[pooling[0] - 1]: "features"}))


class _Features(nn.Module):
    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(images)["features"]


class PartsNet(nn.Module):
    """N attention transformers of fixed 50 % scale share a localisation net; their crops share a trunk.

    The localisation net has a trunk of its own, a copy, because it learns at 1e-4 of the rate of the rest.

    Args:
        trunk: images (N, 3, S, S) to features (N, F, S', S').
        classes: how many.
        transformers: 2 or 4; 0 is the plain CNN, whose trunk sees the whole image, averaged to the size of a
            crop: the trunk's input has as many pixels with transformers and without.
        size: of the images, a multiple of ``crop``.
        crop: of the crops, and of the image that the localisation net sees.
        dropout: before the classifier.
    """

    def __init__(
        self,
        trunk: nn.Module,
        classes: int,
        transformers: int = 2,
        *,
        size: int = 448,
        crop: int = 224,
        dropout: float = 0.7,
    ) -> None:
        super().__init__()
        if transformers not in (0, *REGIONS):
            raise ValueError(f"transformers must be 0, 2 or 4, got {transformers}")
        if size % crop:
            raise ValueError(f"size must be a multiple of crop, {crop}, got {size}")
        self.halvings = size // crop
        self.trunk = trunk
        with torch.no_grad():  # in evaluation, so that no batch norm counts it
            trunk.eval()
            features, *place = trunk(torch.zeros(1, 3, crop, crop)).shape[1:]
            trunk.train()
        self.transformer: SpatialTransformer | None = None
        if transformers:
            looking = nn.Sequential(
                copy.deepcopy(trunk),
                nn.Conv2d(features, 128, 1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(128 * place[0] * place[1], 128),
                nn.ReLU(),
            )
            self.transformer = SpatialTransformer(
                looking,
                "attention",
                (crop, crop),
                transforms=transformers,
                regions=REGIONS[transformers],
                scale=0.5,
                features=128,
            )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(max(transformers, 1) * features, classes)
        mean, deviation = torch.tensor(IMAGENET).view(2, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, images: Tensor, theta: Tensor | None = None) -> Tensor:
        """(N, 3, size, size) from 0 to 1 -> (N, classes). Theta, (N, T, 2, 3), says where transformers look
        in place of the localisation net."""
        images = (images - self.mean) / self.deviation
        if self.transformer is None:
            crops = self._overview(images).unsqueeze(1)
        else:
            crops = self._look(images)[1] if theta is None else self.transformer.sample(images, theta)
        features = self.trunk(crops.flatten(0, 1)).mean((2, 3)).unflatten(0, crops.shape[:2])
        return self.classifier(self.dropout(features.flatten(1)))

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, size, size), from 0 to 1 -> theta, (N, T, 2, 3), and crops, (N, T, 3, crop, crop)."""
        assert self.transformer is not None
        theta = self._look((images - self.mean) / self.deviation)[0]
        return theta, self.transformer.sample(images, theta)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of normalised images."""
        assert self.transformer is not None
        theta = self.transformer.localise(self._overview(images))
        return theta, self.transformer.sample(images, theta)

    def _overview(self, images: Tensor) -> Tensor:
        """Averaged to the size of a crop."""
        return F.avg_pool2d(images, self.halvings)
