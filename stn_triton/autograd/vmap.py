"""``vmap``: an operator over one more dimension, with one call of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.modes import Source
from .function import Function

# The axis of each kind of tensor into which a mapped dimension goes.
_IMAGES = {"image": 0, "fill": 0, "output": 0, "params": 0, "coordinates": 0, "grid": 0}
_TRANSFORMS = {"output": 1, "params": 1, "coordinates": 1}
_TALL_GRID = {"output": 2, "params": 1, "coordinates": 2}


def fold_samples(
    function: type[Function],
    arguments: tuple[str, ...],
    results: tuple[str | None, ...],
    info: Any,
    in_dims: tuple[Any, ...],
    inputs: tuple[Any, ...],
) -> tuple[Any, Any]:
    """``function`` over one more dimension, with one call of it: a ``vmap`` staticmethod's two results.

    arguments: the kinds of the first inputs, which are tensors or None; then come the source and a shape.
    results: the kinds of the results; None for what is not asked for.

    The samples become more images of the batch; or, if all read the same images, more transforms of each, or
    one taller grid, and the images are not copied. Control points there is one set of in a call: where these
    are mapped, or each sample's gradient by them is asked for, each sample has a call of its own.
    """
    count = len(arguments)
    tensors, dims = inputs[:count], in_dims[:count]
    source, shape = inputs[count : count + 2]
    samples = info.batch_size
    mapped = [kind for kind, dim in zip(arguments, dims, strict=True) if dim is not None]
    if "control" in (*mapped, *results) or samples == 0:
        found = []
        for k in range(max(samples, 1)):  # of no samples, one of zeros, whose results are dropped
            chosen = (
                t if dim is None else t.select(dim, k) if samples else t.sum(dim)
                for t, dim in zip(tensors, dims, strict=True)
            )
            one = function.run(*chosen, *inputs[count:])
            found.append(one if isinstance(one, tuple) else (one,))
        stacked = tuple(
            column[0] if kind is None else torch.stack(column)[:samples]
            for kind, column in zip(results, zip(*found, strict=True), strict=True)
        )
        out_dims = tuple(None if kind is None else 0 for kind in results)
        return (stacked, out_dims) if len(results) > 1 else (stacked[0], out_dims[0])

    logical = {
        kind: t.shape if dim is None else (*t.shape[:dim], *t.shape[dim + 1 :])
        for kind, t, dim in zip(arguments, tensors, dims, strict=True)
        if t is not None
    }
    matrices = source not in (Source.GRID, Source.FLOW)
    of_image = "fill" in mapped or "image" in (*mapped, *results)
    if of_image or "grid" in (*arguments, *results) or source == Source.FLOW:
        axes = _IMAGES
    else:
        axes = _TRANSFORMS if matrices else _TALL_GRID
    # one output for each image: there is no axis of the transforms yet
    single = axes is _TRANSFORMS and len(logical["params"]) == 3
    batch = next(logical[kind][0] for kind in ("image", "output", "grid", "params") if kind in logical)
    broadcast = axes is _IMAGES and logical["params"][0] == 1 < batch

    def folded(kind: str, tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None or kind not in axes:
            return tensor
        axis = axes[kind]
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
        elif kind == "params" and axes is _IMAGES and len(tensor) == 1 and "params" not in results:
            return tensor
        else:
            tensor = tensor.expand(samples, *tensor.shape)
        if kind == "params" and broadcast:
            tensor = tensor.expand(samples, batch, *tensor.shape[2:])
        if single and kind != "coordinates":
            tensor = tensor.unsqueeze(2)
        return tensor.movedim(0, axis).flatten(axis, axis + 1)

    def unfolded(kind: str | None, tensor: Tensor) -> Tensor:
        if kind is None:
            return tensor
        axis = axes[kind]
        tensor = tensor.unflatten(axis, (samples, tensor.shape[axis] // samples)).movedim(axis, 0)
        if single and kind != "coordinates":
            tensor = tensor.squeeze(2)
        return tensor.sum(1, keepdim=True) if kind == "params" and broadcast else tensor

    if ("output" in results and axes is _TALL_GRID) or ("output" in arguments and axes is _IMAGES):
        shape = (samples * shape[0], *shape[1:])  # the output's size, or the images' shape
    found = function.run(
        *(folded(*argument) for argument in zip(arguments, tensors, dims, strict=True)),
        source,
        shape,
        *inputs[count + 2 :],
    )
    if isinstance(found, Tensor):
        return unfolded(results[0], found), 0
    unfolded_results = tuple(unfolded(*result) for result in zip(results, found, strict=True))
    return unfolded_results, tuple(None if kind is None else 0 for kind in results)
