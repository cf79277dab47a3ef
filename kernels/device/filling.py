"""``fill``: what is taken in place of what lies outside the image.

Two rules, told apart by the padding. Where an axis has zeros padding, taps outside the image along such an
axis read the fill, with their weights. Where all axes have border padding, samples whose centre lies outside
take it whole.
"""

import triton
import triton.language as tl

from ..modes import Padding
from ..spec import plain
from .interpolation import tap_count
from .padding import beyond, reads_outside


@triton.constexpr_function
def fills_centres(spec):
    """Whether the fill goes by the centres of samples; else by their taps."""
    return all(padding == Padding.BORDER for padding in plain(spec.padding))


@triton.jit
def missed_weight(taps, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The weight of an axis' taps that read nothing: exactly 0 if all are in the image, and 1 if none is."""
    missed = tl.zeros(taps.index[0].shape, SPEC.compute)
    none = tl.full(taps.index[0].shape, True, tl.int1)
    if not reads_outside(SPEC, AXIS):
        for k in tl.static_range(tap_count(SPEC)):
            missed += tl.where(taps.inside[k], 0.0, taps.weight[k])
            none = none & (taps.inside[k] == 0)
        missed = tl.where(none, 1.0, missed)
    return missed


@triton.jit
def outside_of(places, taps, sizes, SPEC: tl.constexpr):
    """How much of a sample is outside the image: 0 or 1 by its centre, or the weight of its taps there."""
    if fills_centres(SPEC):
        outside = beyond(places[0], sizes.input[0], SPEC) | beyond(places[1], sizes.input[1], SPEC)
        if SPEC.dims == 3:
            outside = outside | beyond(places[2], sizes.input[2], SPEC)
        return outside.to(SPEC.compute)
    else:
        inside = (1.0 - missed_weight(taps[0], 0, SPEC)) * (1.0 - missed_weight(taps[1], 1, SPEC))
        if SPEC.dims == 3:
            inside *= 1.0 - missed_weight(taps[2], 2, SPEC)
        return 1.0 - inside


@triton.jit
def filled(value, outside, fill, n, c, exists, SPEC: tl.constexpr):
    """Samples with their channels' fill in place of what is outside. No part of NaN is none."""
    of_channel = tl.load(fill.pointer + n * fill.strides.n + c * fill.strides.c, exists, other=0.0)
    if fills_centres(SPEC):
        return tl.where(outside > 0.0, of_channel, value)
    else:
        return tl.where(outside == 0.0, value, value + outside * of_channel)
