"""How the operators are sharded: given DTensors they split the work, and gather nothing.

Convention: a placement is that along one dimension of the device mesh. N is the batch of images, T the number
of transforms of each. For each dimension of the mesh DTensor takes the row that moves the least data:

========== ============ ================ ================ ===========================================
split by   image        parameters       samples          gradients: image, parameters, control points
========== ============ ================ ================ ===========================================
batch      Shard(0)     Shard(0)         Shard(0)         Shard(0), Shard(0), Partial
           Shard(0)     Replicate, of 1  Shard(0)         Shard(0), Partial, Partial
channels   Shard(1)     Replicate        Shard(1 or 2)    Shard(1), Partial, Partial
transforms Replicate    Shard(1)         Shard(1)         Partial, Shard(1), Partial
terms      Partial      Replicate        Partial          Partial, Partial, Partial
========== ============ ================ ================ ===========================================

The channels of samples are dimension 2 where there are transforms. Control points are whole everywhere. An
image that is sharded along its height or width is not left so: any pixel may be read for any other.

A fill is sharded as the image's batch and channels are. What is made in plain PyTorch takes no DTensors:
second derivatives with ``antialias=True``, and third ones.

DTensor is told by :func:`register`, which the first function that is given a DTensor calls.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import PLAIN
from .kernels.modes import Source

__all__ = ["register"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Nothing is imported to find out."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, the same in every process, as something that can be combined with ``like``."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def stack(tensors: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    """``torch.stack`` at a ``dim`` from the end, which PyTorch 2.11 counts one too few for shards."""
    return torch.stack(tensors, dim + tensors[0].dim() + 1)


def whole(tensor: Tensor) -> Tensor:
    """All of it in every process, as a plain tensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------- strategies
class _Operator(NamedTuple):
    """What its strategies follow from.

    Attributes:
        arguments: the kind of each tensor argument; the source comes next.
        results: the kind of each result.
        terms: (arguments, results): where these arguments are sums of terms, so are these results.
        flags: how many of the last arguments tell which of the last results are asked for.
        linear: the sources for which ``terms`` holds.
    """

    arguments: tuple[str, ...]
    results: tuple[str, ...]
    terms: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    flags: int = 0
    linear: Collection[int] = tuple(Source)


_OPERATORS = {
    "sample": _Operator(("image", "params", "control"), ("samples",), (((0,), (0,)),)),
    "sample_as": _Operator(("image", "params", "control", "fill"), ("samples",), ()),
    "sample_backward": _Operator(
        ("samples", "image", "params", "control"),
        ("image", "params", "control"),
        (((0,), (0, 1, 2)), ((1,), (1, 2))),
        flags=3,
    ),
    "sample_jvp": _Operator(
        ("image", "image", "params", "control", "coordinates"),
        ("samples",),
        (((0, 1), (0,)), ((1, 4), (0,))),
    ),
    "sample_hvp": _Operator(
        ("samples", "image", "image", "params", "control", "coordinates"),
        ("image", "coordinates"),
        (((0,), (0, 1)), ((2, 5), (0, 1)), ((1, 2), (1,))),
        flags=2,
    ),
    "grid": _Operator(
        ("params", "control"), ("coordinates",), (((0,), (0,)),), linear=(Source.AFFINE, Source.TPS)
    ),
    "grid_backward": _Operator(
        ("coordinates", "params", "control"), ("params", "control"), (((0,), (0, 1)),), flags=1
    ),
}


def _splits(params: Any, source: int) -> list[dict[str, int]]:
    """For each way to split the work, the dimension along which a kind of tensor is sharded."""
    transforms = params.ndim == 4 and source not in (Source.GRID, Source.FLOW)
    batch = {"image": 0, "fill": 0, "samples": 0, "coordinates": 0}
    if params.shape[0] > 1:
        batch["params"] = 0
    channels = {"image": 1, "fill": 1, "samples": 2 if transforms else 1}
    return [batch, channels, {"samples": 1, "params": 1, "coordinates": 1}][: 3 if transforms else 2]


def _strategies(operator: _Operator, *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """(results' placements, arguments' placements) along one dimension of a mesh."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    kinds, results = operator.arguments, operator.results
    count = len(kinds)
    tensors, source = arguments[:count], arguments[count]
    wanted = [True] * (len(results) - operator.flags) + list(arguments[len(arguments) - operator.flags :])
    found: list[tuple[list[Any], list[Any]]] = []

    def add(of_results: list[Any], of_arguments: list[Any]) -> None:
        # what is not asked for is an empty tensor
        of_results = [p if want else Replicate() for p, want in zip(of_results, wanted, strict=True)]
        found.append((of_results, [p for p, t in zip(of_arguments, tensors, strict=True) if t is not None]))

    add([Replicate()] * len(results), [Replicate()] * count)
    for split in _splits(tensors[kinds.index("params")], source):
        if any(kind in split for kind, t in zip(kinds, tensors, strict=True) if t is not None):
            # of what a process has whole, it has the gradient that comes from its share
            sharded: dict[str, Any] = {kind: Shard(dim) for kind, dim in split.items()}
            of_results = [sharded.get(kind, Partial()) for kind in results]
            add(of_results, [sharded.get(kind, Replicate()) for kind in kinds])
    for summed, sums in operator.terms if source in operator.linear else ():
        if any(tensors[k] is not None for k in summed):
            for sum_or_mean in Partial(), Partial("avg"):
                of_results = [sum_or_mean if k in sums else Replicate() for k in range(len(results))]
                add(of_results, [sum_or_mean if k in summed else Replicate() for k in range(count)])
    return found


_registered = False


def register() -> None:
    """Tells DTensor how the operators are sharded. Again, it does nothing."""
    global _registered
    if not _registered:
        from torch.distributed.tensor.experimental import register_sharding

        for name, operator in _OPERATORS.items():
            overload = getattr(torch.ops.stn_triton, name).default
            register_sharding(overload)(partial(_strategies, operator))
        _registered = True


# The compiler calls it while it traces, and does not trace it.
register._dynamo_marked_constant = True  # type: ignore[attr-defined]
