"""Every tile size, and the reason for it.

Nothing here is tuned behind the user's back: a tile is a pure function of shape, layout and device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch

from .modes import Interpolation


class Tile(NamedTuple):
    """How the work of one kernel is cut.

    A program computes ``rows * columns`` output pixels (``columns`` along x; in 3-D a row is one of the
    depth * height rows) for ``channels * unroll`` channels at a time. ``channels == 1`` is the planar
    pattern: lanes lie along x, and ``unroll`` channels are loaded before the first is needed.
    ``channels > 1`` is the channels-last pattern: lanes lie along the channels, 16 bytes each.
    ``splits`` programs share the channels of one pixel tile.
    """

    rows: int
    columns: int
    channels: int
    unroll: int
    warps: int
    splits: int

    @property
    def pixels(self) -> int:
        return self.rows * self.columns


class Gather(NamedTuple):
    """How ``gather`` finds the outputs that read a tile of the input.

    Each lane goes through those of its pixel, ``candidates`` at most (a rotation has 9). Beyond, blocks of
    ``out_rows * out_columns`` outputs get the lanes.
    """

    out_rows: int
    out_columns: int
    candidates: int


_NONE: dict[str, int] = {}
_forced: ContextVar[dict[str, int]] = ContextVar("forced_tile", default=_NONE)


@contextmanager
def override(**fields: int) -> Iterator[None]:
    """Replace fields of what is chosen inside the block; the results must not depend on it."""
    token = _forced.set(_forced.get() | fields)
    try:
        yield
    finally:
        _forced.reset(token)


def _with_forced(chosen: Any) -> Any:
    return chosen._replace(**{k: v for k, v in _forced.get().items() if k in chosen._fields})


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def _processors(device_type: str, device_index: int | None) -> int:
    if device_type == "meta":  # compiling for a GPU that is not there: an H100's
        return 132
    properties = torch.get_device_module(device_type).get_device_properties(device_index)
    # CUDA and HIP say multi_processor_count, Intel's GPUs gpu_subslice_count
    return int(
        getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 64)
    )


def choose(
    device: torch.device,
    *,
    images: int,
    channels: int,
    rows: int,
    columns: int,
    element_size: int,
    channels_last: bool,
    interpolation: Interpolation,
    dims: int,
    backward: bool,
) -> Tile:
    """The tile for ``images`` outputs of ``channels`` x ``rows`` x ``columns``.

    ``channels_last`` says that neighbouring channels are neighbours in memory, in the image that is gathered
    from or added to: it is touched several times for each output pixel, everything else once.
    """
    taps = (
        1 if interpolation == Interpolation.NEAREST else 2 if interpolation == Interpolation.BILINEAR else 4
    ) ** dims
    if device.type == "cpu":
        tile = _interpreter_tile(channels, rows, columns)
    elif channels_last and channels >= 8:
        # Lanes along the channels, one 16-byte load each; two pixels per lane keep several gathers in
        # flight, more of them would not fit the registers once there are many taps.
        vector = 16 // element_size
        width = min(_power_of_2(channels), 32 * vector, 128)
        pixels = max(128 * vector // width * (2 if taps <= 8 else 1), 8)
        columns_tile = min(_power_of_2(columns), pixels)
        tile = Tile(pixels // columns_tile, columns_tile, width, 1, 4, 1)
    else:
        # Lanes along x: a mild warp then gathers neighbouring addresses. Two pixels per lane share the set-up
        # of a program, the loads of its parameters.
        pixels = 256 if taps <= 8 and not backward else 128
        columns_tile = min(_power_of_2(columns), 32)
        unroll = channels if channels <= 4 else 4
        if taps > 8:
            unroll = min(unroll, 2 if taps <= 16 else 1)
        tile = Tile(pixels // columns_tile, columns_tile, 1, max(unroll, 1), 4, 1)
    if device.type != "cpu":
        tile = tile._replace(splits=_splits(device, images, channels, rows, columns, tile))
    return _with_forced(tile)


def choose_gather(
    device: torch.device,
    *,
    images: int,
    channels: int,
    rows: int,
    columns: int,
    element_size: int,
    channels_last: bool,
) -> tuple[Tile, Gather]:
    """The tile of the input of one program of ``gather``, and how it looks for the outputs that read it.

    One warp: its reductions need no barrier. What depends on the matrix alone costs as much as two or three
    pixels' nine candidates each, and all pixels of a lane share it: as many of them as registers allow.
    """
    if device.type == "cpu":
        tile, search = _interpreter_tile(channels, rows, columns), Gather(16, 64, 64)
    elif channels_last and channels >= 8:
        # Sixteen pixels of 32 channels at a time: a lane's vectors of up to four such blocks share a weight.
        width = min(_power_of_2(channels), 32)
        unroll = min(-(-channels // width), 4 if element_size == 4 else 2)
        pixels = 512 // width
        columns_tile = min(_power_of_2(columns), pixels)
        tile = Tile(pixels // columns_tile, columns_tile, width, unroll, 1, 1)
        search = Gather(1, 8, 512)
    else:
        # Sixteen sums a lane, or four pixels.
        unroll = min(max(channels, 1), 8)
        pixels = 128 if unroll <= 4 else 64
        columns_tile = min(_power_of_2(columns), 32)
        tile = Tile(pixels // columns_tile, columns_tile, 1, unroll, 1, 1)
        search = Gather(1, 32, 512)
    if device.type != "cpu":
        tile = tile._replace(splits=_splits(device, images, channels, rows, columns, tile))
    return _with_forced(tile), _with_forced(search)


def _splits(device: torch.device, images: int, channels: int, rows: int, columns: int, tile: Tile) -> int:
    """Programs over which the channels are divided: enough for eight to each processor, if there are.

    Every further program repeats the coordinates of its pixels, so that large images are not split.
    """
    programs = images * -(-rows // tile.rows) * -(-columns // tile.columns)
    wanted = -(-8 * _processors(device.type, device.index) // max(programs, 1))
    return max(1, min(wanted, -(-channels // (tile.channels * tile.unroll))))


def _interpreter_tile(channels: int, rows: int, columns: int) -> Tile:
    """The interpreter's time goes by program and operation, not by element: few, wide programs."""
    columns_tile = min(_power_of_2(columns), 64)
    rows_tile = min(_power_of_2(rows), 4096 // columns_tile)
    width = min(_power_of_2(channels), 16)
    return Tile(rows_tile, columns_tile, width, 1, 4, 1)
