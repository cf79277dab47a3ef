"""Finding what images have in common, with no labels: ``python -m examples.colocalisation``.

A hundred images of one digit, each somewhere on 84 x 84 pixels, translated (T) or translated among clutter
(TC: 16 pieces of 6 x 6 pixels of other digits). An attention transformer learns that its crops of two images
shall be more alike than its crop of one and a random crop of the same image, by a margin of 1 (Jaderberg et
al., 2015, section A.2). Alike is what a fixed network says that was trained to classify digits.

That loss alone does not lead to digits: while few crops show one, those few are unlike the others, and the
loss is lower when none does. So its minimum is looked for first, among crops at many places and of many
sizes, one of each image (:func:`in_common`). The net is led to these; that dies out, and the paper's loss is
left. No box takes part.

Convention: a box is its centre and half its side, normalised: an attention's translation and scale.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import stn_triton as stn
from examples.data import SIDE, Cluttered, Digits, Similar, load_mnist
from examples.outputs import Panel, save_animation, save_picture, save_table
from examples.runs import config_of, parser_of, run_seeds
from examples.training import Config, Task, processes, rank, world_size
from stn_triton.nn import SpatialTransformer
from stn_triton.transforms import attention, invert

CANVAS, CROP, PIECES = 84, 28, 16
CLASSES = 10
MARGIN = 1.0
# The paper leaves the following open.
CONTRAST = 2.0
"""Of encodings: the mean squared distance between a digit in its frame and a crop that is not, in margins."""
ALIKE = 0.1
"""Weight of the squared length of the features of crops that are no digit, in the encoder's training."""
FRAMED = 0.7
"""The intersection over union from which on the encoder's training set calls a crop a digit."""
SIZES, STRIDE = (0.24, 0.3, 0.36, 0.45, 0.6), 0.4
"""Of the crops among which the search chooses: half the side, and how far apart they are, in halves."""
STARTS, FOLLOWED, ROUNDS = 600, 10, 8
"""Of the search: crops that all others are compared with, how many of them are followed, and for how long."""
TIE = 0.1
"""The share of the squared distance in the search's choice, where many crops have no hinge at all."""
LEAD = 10.0
"""Weight of the squared distance to the boxes found, at first."""
DEFAULT = Config(
    steps=1000, batch=100, lr=3e-3, schedule="cosine", optimiser="adam", warm_up=0.75, snapshots=20
)
"""Every batch is the whole collection. The paper gives no schedule."""
QUICK = Config(steps=300, batch=100, lr=3e-3, schedule="cosine", optimiser="adam", warm_up=0.75, snapshots=20)
DISTORTIONS = {"T": Similar(size=CANVAS), "TC": Cluttered(size=CANVAS, patches=PIECES)}
PAPER = {"T": "100", "TC": "75-93"}  # % of the images found, over the digits
SHOWN = 10  # images in the picture

Encoder = Callable[[Tensor], Tensor]


class Boxes(NamedTuple):
    """Squares: (..., 2) and (...,)."""

    centre: Tensor
    half: Tensor

    def theta(self) -> Tensor:
        return attention(self.half, self.centre)


class Collection(NamedTuple):
    """Images and where the digits are, which is for the score alone, and for the encoder's training set."""

    images: Tensor  # (M, 1, 84, 84), from 0 to 1
    boxes: Boxes


def place(digits: Digits, index: Tensor, kind: str, generator: Generator) -> Collection:
    """Each digit at a random place; the box is its 28 x 28 pixels. The pieces of clutter are of any class."""
    distortion = DISTORTIONS[kind]
    images, to_canvas = [], []
    for part in index.split(250):  # a canvas for every piece of clutter takes memory
        drawn = distortion.draw(len(part), generator)
        images.append(distortion.apply(digits, part, drawn))
        to_canvas.append(invert(drawn[0]))
    return Collection(torch.cat(images), boxes_of(torch.cat(to_canvas)))


def collect(digits: Digits, label: int, kind: str, generator: Generator, count: int = 100) -> Collection:
    """Different digits of one class."""
    (which,) = (digits.labels == label).nonzero(as_tuple=True)
    index = which[torch.randperm(len(which), generator=generator, device=generator.device)[:count]]
    return place(digits, index, kind, generator)


# ------------------------------------------------------------------------------------------- the encoder
@torch.enable_grad()  # whoever asks for it first
def make_encoder(digits: Digits, steps: int = 1000, seed: int = 0) -> Encoder:
    """What crops are compared by, (N, 1, 28, 28) -> (N, 64): the features of a network that was trained on
    crops of all sizes to tell which digit is in the frame, or that none is. It stays as it is.

    Without the class for no digit, features of empty and of badly framed crops are anywhere, and so is the
    loss's minimum. Features of no digit are drawn to zero: else whatever all images hold, such as a stroke
    enlarged until it fills the crop, has features of its own, and the hinge cannot tell it from a digit. The
    boxes that this takes are of the encoder's own scenes.
    """
    device, batch = digits.images.device, 128
    generator = Generator(device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = nn.Sequential(
            *(nn.Conv2d(1, 12, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(12, 24, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(24 * 4 * 4, 64), nn.ReLU()),
        ).to(device)
        head = nn.Linear(64, CLASSES + 1).to(device)
    index = torch.randint(len(digits.labels), (3 * steps,), generator=generator, device=device)
    plain, cluttered = (
        place(digits, half, kind, generator) for half, kind in zip(index.chunk(2), DISTORTIONS)
    )
    images = torch.cat([plain.images, cluttered.images])
    truth = Boxes(*(torch.cat(pair) for pair in zip(plain.boxes, cluttered.boxes)))
    optimiser = torch.optim.Adam([*features.parameters(), *head.parameters()], 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def examples(count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Crops, whether they are digits in their frame, and of which class."""
        at = torch.randint(len(images), (count,), generator=generator, device=device)
        boxes = Boxes(*(one[at] for one in truth))
        tried = any_boxes(boxes, generator)
        crops = stn.affine_grid_sample(images[at], tried.theta(), (CROP, CROP))
        return crops, overlap(tried, boxes) > FRAMED, digits.labels[index[at]]

    for _ in range(steps):
        crops, framed, labels = examples(batch)
        encoded = features(crops)
        length = (encoded.square().sum(1) * ~framed).mean()
        loss = F.cross_entropy(head(encoded), labels.where(framed, CLASSES)) + ALIKE * length
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    features.requires_grad_(False)
    crops, framed, _ = examples(1024)
    found = features(crops)
    apart = torch.cdist(found[framed], found[~framed]).square().mean()
    length = (CONTRAST * MARGIN / apart).sqrt()
    return lambda crops: length * features(crops)


def any_boxes(truth: Boxes, generator: Generator) -> Boxes:
    """A third about right; a third near, from 0.3 to 3 times the size; a third anywhere, of any size."""
    count, device = len(truth.half), generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    kind = torch.randint(3, (count,), generator=generator, device=device)
    half = torch.where(
        kind == 0,
        truth.half * uniform(-0.25, 0.25).exp(),
        torch.where(
            kind == 1,
            truth.half * uniform(math.log(0.3), math.log(3.0)).exp(),
            uniform(math.log(0.04), math.log(3.0)).exp(),
        ),
    )
    noise = torch.randn(count, 2, generator=generator, device=device)
    near = truth.centre + noise * torch.where(kind == 0, 0.03, 0.75 * half).unsqueeze(-1)
    inside = (1 - half).abs().unsqueeze(-1)
    anywhere = inside * torch.stack([uniform(-1, 1), uniform(-1, 1)], -1)
    return Boxes(torch.where((kind < 2).unsqueeze(-1), near, anywhere), half)


# -------------------------------------------------------------------------------------------- the model
class Locator(nn.Module):
    """(N, 1, 84, 84) -> (N, 2, 3): where the transformer would crop. The task crops."""

    def __init__(self, transformer: SpatialTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, images: Tensor) -> Tensor:
        return self.transformer.localise(images)


def make_model(start: float = 0.5) -> Locator:
    """The paper's: 8 filters of 9 x 9, stride 4, pooling, 8-8-3; crops of 28 x 28.

    ``start``: half the side of the box in the middle from which all crops start; 1 is the whole image.
    """
    side = ((CANVAS - 9) // 4 + 1) // 2
    localisation = nn.Sequential(
        nn.Conv2d(1, 8, 9, stride=4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * side**2, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
    )
    region = (-start, -start, start, start)
    return Locator(SpatialTransformer(localisation, "attention", (CROP, CROP), features=8, regions=region))


# --------------------------------------------------------------------------------------------- the loss
def random_crops(images: Tensor, generator: Generator) -> Tensor:
    """(N, 1, 28, 28): of each image 28 x 28 of its pixels, anywhere."""
    scale = SIDE / CANVAS
    place = 2 * torch.rand(len(images), 2, generator=generator, device=generator.device) - 1
    return stn.affine_grid_sample(images, attention(scale, (1 - scale) * place), (CROP, CROP))


def triplet_hinge(crops: Tensor, others: Tensor) -> Tensor:
    """Of encoded crops c and random ones o, (N, F), the mean over all pairs n, m of
    ``max(0, |c_n - c_m|^2 - |c_n - o_n|^2 + margin)``."""
    between = (crops.unsqueeze(1) - crops).square().sum(-1)
    to_other = (crops - others).square().sum(-1, keepdim=True)
    hinge = F.relu(between - to_other + MARGIN)
    count = len(crops)
    return (hinge.sum() - hinge.diagonal().sum()) / (count * (count - 1))


# ------------------------------------------------------------------------------------------- the search
def candidates(sizes: Sequence[float] = SIZES, stride: float = STRIDE) -> Boxes:
    """Boxes of all sizes at all places of an image, (J, 2) and (J,)."""
    centres, halves = [], []
    for half in sizes:
        reach = 1 - half
        axis = torch.linspace(-reach, reach, 1 + math.ceil(2 * reach / (stride * half)))
        centres.append(torch.cartesian_prod(axis, axis))
        halves.append(torch.full((len(centres[-1]),), half))
    return Boxes(torch.cat(centres), torch.cat(halves))


@torch.no_grad()
def in_common(images: Tensor, encode: Encoder, generator: Generator, among: Boxes | None = None) -> Boxes:
    """What the images, (N, 1, 84, 84), have in common: of each the box, so that the crops' hinge is least.

    Some crops of some images are tried as the mean of all. Those to which most images have a crop near are
    followed: of each image the crop with the least hinge to the mean, then the mean of these, and so on. What
    has the least hinge over all pairs at the end is returned.
    """
    count, device = len(images), images.device
    boxes = Boxes(*(one.to(device) for one in (candidates() if among is None else among)))
    theta = boxes.theta().unsqueeze(0)
    crops = torch.stack(  # (N, J, F)
        [encode(stn.affine_grid_sample(image, theta, (CROP, CROP))[0]) for image in images.split(1)]
    )
    others = torch.stack([encode(random_crops(images, generator)) for _ in range(4)], 1)
    to_other = torch.cdist(crops, others).square().mean(-1)

    def cost(mean: Tensor) -> Tensor:
        """(F,) -> (N, J)"""
        apart = torch.cdist(crops.flatten(0, 1), mean.unsqueeze(0)).square().view(to_other.shape)
        return F.relu(apart - to_other + MARGIN) + TIE * apart

    starts = torch.randint(to_other.numel(), (STARTS,), generator=generator, device=device)
    means = crops.flatten(0, 1)[starts]
    reached = torch.stack([cost(mean).amin(1).mean() for mean in means])
    rows = torch.arange(count, device=device)
    ends = []
    for mean in means[reached.argsort()[:FOLLOWED]]:
        for _ in range(ROUNDS):
            chosen = cost(mean).argmin(1)
            mean = crops[rows, chosen].mean(0)
        hinges = [triplet_hinge(crops[rows, chosen], one) for one in others.unbind(1)]
        ends.append((torch.stack(hinges).mean().item(), chosen))
    best = min(ends, key=lambda end: end[0])[1]
    return Boxes(boxes.centre[best], boxes.half[best])


def overlap(a: Boxes, b: Boxes) -> Tensor:
    """(N,): intersection over union. A negative half side turns a crop by 180 degrees, and is a side too."""
    low = torch.maximum(*(box.centre - box.half.abs().unsqueeze(-1) for box in (a, b)))
    high = torch.minimum(*(box.centre + box.half.abs().unsqueeze(-1) for box in (a, b)))
    common = (high - low).clamp_min(0).prod(-1)
    return common / (4 * a.half.square() + 4 * b.half.square() - common)


def boxes_of(theta: Tensor) -> Boxes:
    return Boxes(theta[..., 2], theta[..., 0, 0])


class Finding(Task):
    """The target is the images, random crops of them, and the boxes that the search found; the model's output
    where it would crop."""

    def __init__(
        self, collection: Collection, search: Callable[[], Boxes], encode: Encoder, seed: int
    ) -> None:
        super().__init__(seed, collection.images.device)
        self.collection, self.search, self.encode = collection, search, encode

    @cached_property
    def found(self) -> Boxes:
        """What the search found; it takes a while, and runs that are done do without."""
        return self.search()

    def batch(self, count: int, part: slice = slice(None)) -> tuple[Tensor, tuple[Tensor, Tensor, Boxes]]:
        images = self.collection.images[:count][part]
        found = Boxes(*(one[:count][part] for one in self.found))
        return images, (images, random_crops(images, self.generator), found)

    def loss(self, output: Tensor, target: tuple[Tensor, Tensor, Boxes]) -> Tensor:
        """From the way to what the search found to the paper's."""
        images, others, found = target
        centre, half = boxes_of(output)
        away = (centre - found.centre).square().sum(-1) + (half - found.half).square()
        hinge = triplet_hinge(self.crop(images, output), self.encode(others))
        return LEAD * (1 - self.strength) * away.mean() + self.strength * hinge

    def crop(self, images: Tensor, theta: Tensor) -> Tensor:
        """Encoded."""
        return self.encode(stn.affine_grid_sample(images, theta, (CROP, CROP)))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """% of the images whose intersection over union is above a half, its mean, and the paper's loss with
        the same random crops each time, by which runs can be compared without knowing the boxes. And in what
        % the search alone had found the digit."""
        images, boxes = self.collection
        theta = model(images)
        ratio = overlap(boxes_of(theta), boxes)
        others = random_crops(images, Generator(images.device).manual_seed(0))
        return {
            "found": 100 * (ratio > 0.5).double().mean().item(),
            "IoU": ratio.mean().item(),
            "hinge": triplet_hinge(self.crop(images, theta), self.encode(others)).item(),
            "searched": 100 * (overlap(self.found, boxes) > 0.5).double().mean().item(),
        }

    def snapshot(self, model: nn.Module) -> Tensor:
        """Where it crops the images that are shown."""
        return model(self.collection.images[:SHOWN]).cpu()


# ------------------------------------------------------------------------------------------- the script
def panels_of(collection: Collection, theta: Tensor, title: str) -> list[Panel]:
    """Of the first images what is cropped, (K, 2, 3), and in a second colour the box that was to be found."""
    images, truth = collection.images[: len(theta)], collection.boxes.theta()
    theta = theta.to(images.device)
    crops = stn.affine_grid_sample(images, theta, (CROP, CROP))
    return [
        Panel(image, torch.stack([cropped, box]), [crop], title=title, outlines=True)
        for image, cropped, box, crop in zip(images, theta, truth, crops)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("colocalisation", __doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(DISTORTIONS), default=list(DISTORTIONS))
    parser.add_argument("--digits", nargs="+", type=int, choices=range(CLASSES), default=list(range(CLASSES)))
    parser.add_argument(
        "--encoder-steps", type=int, default=1000, help="of the classifier's training; default: %(default)s"
    )
    parser.add_argument(
        "--start", type=float, default=0.5, help="share of the side that all crops start from; default: 0.5"
    )
    parser.set_defaults(seeds=3)
    options = parser.parse_args(arguments)
    config = config_of(options, DEFAULT, QUICK)
    with processes(options.device) as device:
        if world_size() > 1:
            parser.error("the loss compares all images with each other, so it takes one process")
        mnist = load_mnist(options.data, device, stand_in=options.stand_in)
        encoder = cache(partial(make_encoder, mnist.train, options.encoder_steps))

        def encode(crops: Tensor) -> Tensor:
            return encoder()(crops)

        settings = {
            "steps of the encoder's training": options.encoder_steps,
            "start": options.start,
        }
        data = mnist.train.source
        lines = []
        for kind in options.kinds:
            panels: list[Panel] = []
            frames: dict[int, list[Panel]] = defaultdict(list)
            for label in options.digits:
                chance = Generator(device).manual_seed(label)
                collection = collect(mnist.train, label, kind, chance, config.batch)
                search = cache(partial(in_common, collection.images, encode, chance))

                def make_task(seed: int) -> Finding:
                    return Finding(collection, search, encode, seed)  # noqa: B023

                name = f"{kind}, digit {label}"
                runs = run_seeds(
                    name,
                    lambda: make_model(options.start),
                    make_task,
                    config,
                    options,
                    device,
                    settings | {"data": data},
                    figure="found",
                    paper=PAPER[kind],
                )
                best = min(range(options.seeds), key=lambda at: runs.line.figures[at]["hinge"])
                figures = runs.line.figures[best]
                named = f"{name}, mean IoU {figures['IoU']:.2f}, by search alone {figures['searched']:.0f} %"
                # what grows here is not a distortion
                lines.append(runs.line._replace(name=named, values=[figures["found"]], warm_up=0.0))
                shown = -(-SHOWN // len(options.digits))
                with torch.no_grad():
                    panels += panels_of(collection, runs.models[best](collection.images[:shown]), "")
                for step, theta in runs.kept[best]:
                    frames[step] += panels_of(collection, theta[:shown], "")
            if rank() == 0:
                said = "blue is cropped, orange was to be found"
                save_picture(
                    options.output / f"colocalisation_{kind}.png", panels, f"{kind}: {said}", len(panels)
                )
                titled = [(f"{kind}, step {step:,}: {said}", frames[step]) for step in sorted(frames)]
                if titled:
                    save_animation(options.output / f"colocalisation_{kind}.gif", titled, len(panels))
        if rank() == 0:
            settings = {
                "starts, of which the one with the least loss counts,": options.seeds,
                "the search leads over the first": f"{100 * config.warm_up:g} % of the iterations",
            } | settings
            title = "Co-localisation, images with IoU > 0.5"
            where = options.output, "colocalisation"
            print(save_table(*where, title, "found, %", lines, config, None, data, settings, device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
