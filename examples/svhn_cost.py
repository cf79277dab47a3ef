"""What a training step of SVHN's nets comes to, counted from shapes: ``python -m examples.svhn --counts``.

Counted are forward pass, backward pass and SGD's update in float32, operator by operator, as PyTorch runs
them when nothing is compiled. Traffic: each operator reads each of its inputs from memory once, and writes
each of its outputs once. Arithmetic: of convolutions, linear layers and samplers, a multiplication and an
addition being two operations; what is done element by element is bound by traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.deformable import AFFINE, WEIGHING
from examples.outputs import transformers_of
from examples.svhn_models import KINDS, svhn_net
from stn_triton.nn import SpatialTransformer

FLOAT, INDEX, MASK = 4, 8, 1  # bytes
COUNTED = nn.ReLU, nn.Dropout, nn.MaxPool2d  # besides convolutions and linear layers
BALANCES = 15, 100
"""Operations that a GPU does while it moves a byte: about an H200's in float32, and in TF32."""


class Cost(NamedTuple):
    flops: int
    bytes: int


class Costs(NamedTuple):
    """Of one step of a batch, by operators."""

    layers: list[Cost]  # of all but the transformers
    localisation: list[Cost]  # of the transformers, with the update of their parameters
    sampling: list[Cost]

    @property
    def total(self) -> Cost:
        return summed(self.layers + self.localisation + self.sampling)

    def limit(self, balance: float) -> float:
        """How long a step takes at least, in the time that one byte takes, on a machine that does ``balance``
        operations in it: each operator is bound by its arithmetic or by its traffic."""
        operators = self.layers + self.localisation + self.sampling
        return sum(max(one.flops / balance, one.bytes) for one in operators)


def summed(costs: Sequence[Cost]) -> Cost:
    return Cost(sum(one.flops for one in costs), sum(one.bytes for one in costs))


def has_weight(module: nn.Module) -> bool:
    """A convolution, a linear layer, or a transformer's regression layer."""
    return isinstance(getattr(module, "weight", None), nn.Parameter)


def is_counted(module: nn.Module) -> bool:
    return has_weight(module) or isinstance(module, COUNTED)


def step_costs(model: nn.Module, size: int, batch: int, *, fused: bool = True) -> Costs:
    """Of a net of :func:`examples.svhn_models.svhn_net` on images (batch, 3, size, size).

    Args:
        fused: the transformers sample as this package does, else as ``TorchTransformer``.
    """
    found = Costs([], [], [])
    inside = {id(part) for one in transformers_of(model) for part in one.modules()}

    def note(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        differentiated = arguments[0].requires_grad  # the images are not
        read, written = (batch * tensor.numel() for tensor in (arguments[0], output))
        if isinstance(module, SpatialTransformer):
            pixels = batch * output[0, 0].numel()
            found.sampling.append(sampling_cost(pixels, output.shape[1], differentiated, fused))
        elif is_counted(module):
            where = found.localisation if id(module) in inside else found.layers
            where.append(layer_cost(module, read, written, differentiated))

    hooks = [part.register_forward_hook(note) for part in model.modules()]
    try:
        model.train()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    for where, its in ((found.localisation, True), (found.layers, False)):
        parameters = sum(
            one.numel()
            for part in model.modules()
            if is_counted(part) and (id(part) in inside) is its
            for one in part.parameters()
        )
        where.append(Cost(0, FLOAT * 3 * parameters))  # the update reads and writes them, by their gradients
    return found


def layer_cost(module: nn.Module, read: int, written: int, differentiated: bool) -> Cost:
    """Of elements read and written forward; ``differentiated``: its input needs a gradient.

    Each of the two gradients of a convolution is a product of two of input, weight and output's gradient, and
    as large as the third.
    """
    backward = int(differentiated)
    if has_weight(module):
        weight = module.weight.numel()
        products = 2 * written * weight // module.weight.shape[0]
        return Cost(products * (2 + backward), FLOAT * (read + weight + written) * (2 + backward))
    if isinstance(module, nn.ReLU):  # backward reads what it gave
        return Cost(0, FLOAT * 5 * written)
    if isinstance(module, nn.Dropout):
        return Cost(0, (4 * FLOAT + 2 * MASK) * written if module.p else 0)
    return Cost(0, 2 * (FLOAT * (read + written) + INDEX * written))  # max-pooling


def sampling_cost(pixels: int, channels: int, differentiated: bool, fused: bool) -> Cost:
    """Affine, of a map as large as the output. Each of the two gradients is taken for as much arithmetic as
    the forward pass.

    Fused: forward, the map's gradient, theta's gradient, each reads one map and reads or writes another.
    PyTorch: the map's gradient is cleared, then added to, a read and a write, beside reading map and
    gradient; and the grid is written, read twice, its gradient written and read.
    """
    backward = int(differentiated)
    each = pixels * (AFFINE + WEIGHING + 8 * channels)
    maps = 4 + 2 * backward if fused else 4 + 3 * backward
    grids = 0 if fused else 5
    return Cost(each * (2 + backward), FLOAT * pixels * (maps * channels + grids * 2))


def cost_table(size: int, batch: int, width: float) -> str:
    """Markdown: the CNN, and what transformers add to it."""
    with torch.device("meta"):
        nets = {kind: svhn_net(kind, size, width=width) for kind in KINDS}
    rows = {"CNN": step_costs(nets["CNN"], size, batch)}
    for kind in KINDS[1:]:
        for sampler in ("PyTorch", "stn_triton"):
            rows[f"{kind}, {sampler}"] = step_costs(nets[kind], size, batch, fused=sampler != "PyTorch")
    plain = rows["CNN"]
    limits = " | ".join(f"{balance} operations a byte" for balance in BALANCES)
    lines = [
        f"| {size} px, batches of {batch} | GFLOP | GB | of it samplers | arithmetic | traffic | {limits} |",
        "|---" * (6 + len(BALANCES)) + "|",
    ]
    for name, costs in rows.items():
        total, its = costs.total, plain.total
        ratios = [total.flops / its.flops, total.bytes / its.bytes]
        ratios += [costs.limit(balance) / plain.limit(balance) for balance in BALANCES]
        added = ["" if costs is plain else f"+{100 * (ratio - 1):.1f} %" for ratio in ratios]
        cells = [
            f"{total.flops / 1e9:.1f}",
            f"{total.bytes / 1e9:.2f}",
            f"{summed(costs.sampling).bytes / 1e9:.2f}",
            *added,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
