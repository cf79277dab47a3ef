"""Every tile size, and the reason for it.

A configuration is a function of what a ``Problem`` says and of nothing else: the rules below, and where a
table has been tuned for the architecture (``tables``) what it says instead. Nothing here is measured; that is
``tuning``'s, when asked for.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from ..modes import INVERTIBLE, MOST_STEPS, Interpolation, Source
from . import tables
from .blocks import Block, LocalBlocks


class Problem(NamedTuple):
    """What a configuration depends on: ``images`` outputs of ``channels`` x ``rows`` x ``columns``.

    ``kernel`` names the kernel and what is asked of it. ``channels_last`` says that neighbouring channels are
    neighbours in memory, in the image that is gathered from or added to: it is touched several times for
    each output pixel, everything else once.
    """

    kernel: str
    source: int
    interpolation: int
    dims: int
    images: int
    channels: int
    rows: int
    columns: int
    element_size: int
    channels_last: bool
    backward: bool

    @classmethod
    def of(
        cls,
        kernel: str,
        modes: Sequence[int],
        images: int,
        channels: int,
        size: torch.Size,
        like: torch.Tensor,
        channels_last: bool = False,
        backward: bool = False,
    ) -> "Problem":
        """``images`` of a size. ``modes`` begin with source and interpolation; ``like`` has the elements."""
        source, interpolation, *_ = modes
        rows, columns, element = size[:-1].numel(), size[-1], like.element_size()
        kind = kernel, source, interpolation, len(size)
        return cls(*kind, images, channels, rows, columns, element, channels_last, backward)

    @property
    def key(self) -> str:
        """Its bucket in a table: sizes by powers of two, outputs in all by powers of four.

        What tells matrices, dense coordinates and splines apart in cost is their source; rows of 64 pixels
        and more are alike.
        """
        sources: dict[int, str] = {Source.GRID: "dense", Source.FLOW: "dense", Source.TPS: "tps"}
        pixels = max(self.images * self.rows * self.columns, 1)
        return " ".join(
            (
                self.kernel,
                sources.get(self.source, "matrix"),
                Interpolation(self.interpolation).name.lower(),
                f"{self.dims}d",
                f"{8 * self.element_size}-bit",
                "channels-last" if self.channels_last else "planar",
                f"channels<={self.channels if self.channels <= 4 else power_of_2(self.channels)}",
                f"columns<={min(power_of_2(self.columns), 64)}",
                f"pixels<=4^{(pixels - 1).bit_length() + 1 >> 1}",
            )
        )


class Tile(NamedTuple):
    """How the work of one kernel is cut.

    A program computes ``rows * columns`` output pixels (``columns`` along x; in 3-D a row is one of the
    depth * height rows) for ``channels * unroll`` channels at a time. ``channels == 1`` is the planar
    pattern: lanes lie along x, and ``unroll`` channels are loaded before the first is needed.
    ``channels > 1`` is the channels-last pattern: lanes lie along the channels, 16 bytes each.
    ``splits`` programs share the channels of one pixel tile. A program does the same tile of ``group``
    outputs, which share a spline's basis, and ``steps`` tiles, one below the other, so that its set-up is
    spread over more pixels; no further registers are needed for that.
    """

    rows: int
    columns: int
    channels: int
    unroll: int
    warps: int
    splits: int
    group: int
    steps: int = 1

    @property
    def may_have_patches(self) -> bool:
        """Whether lanes can be told apart by patches of 8 x 4 pixels: of planes whose rows are longer."""
        return self.channels == 1 and self.columns >= 16 and self.rows >= 4


class Gather(NamedTuple):
    """How ``gather`` finds the outputs that read a tile of the input.

    Each lane goes through those of its pixel, ``candidates`` at most (a rotation has 9). Beyond, blocks of
    ``out_rows * out_columns`` outputs get the lanes.
    """

    out_rows: int
    out_columns: int
    candidates: int


class Sum(NamedTuple):
    """How d image of a general grid is summed where nothing asks for the same bits each time: by atomics, or
    (``sorted``) as under deterministic algorithms."""

    sorted: int


# (kernel, field, value) that replace what is chosen; the last one counts, and None is every kernel.
_forced: LocalBlocks[tuple[tuple[str | None, str, int], ...]] = LocalBlocks("forced")
_seen: LocalBlocks[list[tuple[Problem, NamedTuple]]] = LocalBlocks("seen")

_NOTHING: Mapping[str, int] = {}
# Kernels that have registers for two pixels a lane beside a spline's sums. (Control points' take more.)
_SPLINE_SUMS = "backward image", "backward parameters", "backward image parameters", "grid backward"
# Programs wanted for each processor (see _shared). Those that go through many channels take long, and the
# last ones are waited for: more of them. Others have more to set up. (Timed: planar images of 3 and 256
# channels, channels-last ones of 256, and a gather of 3, which is indifferent. Between them it is a guess.)
WAVES, WAVES_OF_CHANNELS = 8, 32


def override(kernel: str | None = None, **fields: int) -> Block[tuple[tuple[str | None, str, int], ...]]:
    """Replace fields of what is chosen inside the block (for one kernel only, if named); the results must not
    depend on it."""
    return Block(_forced, tuple((kernel, name, value) for name, value in fields.items()))


def observe() -> Block[list[tuple[Problem, NamedTuple]]]:
    """Inside, whatever is chosen is noted in the list that the block gives."""
    return Block(_seen, [])


def state() -> Hashable:
    """All that a choice depends on besides its arguments: what is kept of choices is kept by it.

    None while ``observe`` watches, whom nothing that is kept may escape.
    """
    if _seen.open.get() and _seen.values():
        return None
    forced = _forced.values() if _forced.open.get() else ()  # asked at each launch: no call for nothing
    return forced, tables.version if tables.live.open else -1, bool(tables.ignoring.open)


def _overridden(kernel: str) -> dict[str, int]:
    """What ``override`` says of a kernel."""
    return {
        name: value for says in _forced.values() for meant, name, value in says if meant in (None, kernel)
    }


def power_of_2(n: int) -> int:
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


def _settled(
    device: torch.device, problem: Problem, rules: Any, beside: Mapping[str, int] = _NOTHING
) -> tuple[Any, Mapping[str, Any]]:
    """The rules' choice with what a table and then ``override`` say instead, and all that they say.

    ``beside``: what else is chosen for the kernel.
    """
    tuned, overridden = tables.lookup(device, lambda: problem.key), _overridden(problem.kernel)
    chosen = _replaced(rules, tuned)
    if tuned and tables.lanes({**beside, **chosen._asdict()}) > tables.MOST_LANES:
        tables.refuse(device, problem.key, f"with the rules' {rules} they make a block too large")
        tuned, chosen = {}, rules
    chosen = _replaced(chosen, overridden)
    for seen in _seen.values()[-1:]:
        seen.append((problem, chosen))
    return chosen, {**tuned, **overridden}


def _replaced(chosen: Any, fields: Mapping[str, int]) -> Any:
    return chosen._replace(**{name: value for name, value in fields.items() if name in chosen._fields})


def choose(device: torch.device, problem: Problem) -> Tile:
    """The tile for a problem."""
    channels, columns, element_size = problem.channels, problem.columns, problem.element_size
    spline = problem.source == Source.TPS
    along = {Interpolation.NEAREST: 1, Interpolation.BICUBIC: 4}
    taps = along.get(Interpolation(problem.interpolation), 2) ** problem.dims
    if device.type == "cpu":
        tile = _interpreter_tile(channels, problem.rows, columns)
    elif problem.channels_last and channels >= 8:
        # Lanes along the channels, one 16-byte load each. All lanes of a pixel compute the same weights, so
        # that forward no more of them share a pixel than read a cache line, and each reads further lines too.
        # Otherwise two pixels a lane keep several gathers in flight. Neither fits beside many taps.
        vector = 16 // element_size
        lanes = 8 if taps <= 8 and not problem.backward else 32
        width = min(power_of_2(channels), lanes * vector, 128)
        unroll = min(-(-channels // width), 4) if lanes == 8 else 1
        pixels = max(128 * vector // width * (2 if taps <= 8 and unroll == 1 else 1), 8)
        columns_tile = min(power_of_2(columns), pixels)
        warps = 8 if element_size == 4 and not problem.backward else 4
        tile = Tile(pixels // columns_tile, columns_tile, width, unroll, warps, 1, 1)
    else:
        # What lanes wait for, the image's pixels, is hidden by other warps: one pixel a lane leaves registers
        # for most of them. Two pay for single channels, for bytes, and where many channels share the
        # coordinates; four for splines, which compute rather than wait, and two beside the sums of their
        # gradient, each of which is a reduction for every warp.
        two = channels == 1 or element_size == 1 or (channels > 4 and not problem.backward)
        pixels = 256 if taps <= 8 and two and not spline else 128
        warps = 4
        if spline and not problem.backward:
            warps = 1
        elif spline and taps <= 8 and problem.kernel in _SPLINE_SUMS:
            warps = 2
        columns_tile = min(power_of_2(columns), _tile_columns(problem))
        # no lanes for rows that there are not, but a warp
        pixels = min(pixels, max(columns_tile * power_of_2(problem.rows), 32))
        warps = min(warps, pixels // 32)
        unroll = channels if channels <= 4 else 4
        if taps > 8:
            unroll = min(unroll, 2 if taps <= 16 else 1)
        tile = Tile(pixels // columns_tile, columns_tile, 1, max(unroll, 1), warps, 1, 1)
    # Outputs that share a spline's basis: four, as many as keep their coordinates in the registers.
    group = 4 if spline and 4 <= problem.images < 2**31 else 1
    tile, fields = _settled(device, problem, tile._replace(group=group))
    if not spline:
        tile = tile._replace(group=1)
    return _shared(device, problem, tile, fields)


def choose_gather(device: torch.device, problem: Problem) -> tuple[Tile, Gather]:
    """The tile of the input of one program of ``gather``, and how it looks for the outputs that read it.

    One warp where it can be: its reductions need no barrier. What depends on the matrix alone costs as much
    as two or three pixels' nine candidates each, and all pixels of a lane share it: as many of them as
    registers allow.
    """
    channels, rows, columns = problem.channels, problem.rows, problem.columns
    if device.type == "cpu":
        tile, search = _interpreter_tile(channels, rows, columns), Gather(16, 64, 64)
    elif problem.channels_last and channels >= 8:
        # Four lanes a pixel, as each computes its nine weights: two pixels of 32 channels each.
        vector = 16 // problem.element_size
        width = min(power_of_2(channels), 4 * vector)
        unroll = min(-(-channels // width), 16 // vector)
        pixels = 16 if unroll > 1 else 512 // width
        columns_tile = min(power_of_2(columns), pixels)
        tile = Tile(pixels // columns_tile, columns_tile, width, unroll, 1, 1, 1)
        # as many outputs as give every lane 16 bytes
        search = Gather(1, max(8, 32 * vector // width), 512)
    else:
        # Sixteen sums a lane, or four pixels. A volume's pixels have 27 candidates: lanes in rows, of which a
        # load wants fewer sectors of one bank unless the map turns (``device.programs``). With many channels
        # its two pixels a lane take two warps, so that there are rows enough for a patch.
        unroll, volume = min(max(channels, 1), 8), problem.dims == 3
        warps = 2 if volume and unroll > 4 else 1
        pixels = (128 if unroll <= 4 else 64) * warps
        columns_tile = min(power_of_2(columns), 32 if volume else _patch_columns(problem.element_size))
        tile = Tile(pixels // columns_tile, columns_tile, 1, unroll, warps, 1, 1)
        # a patch of outputs reads few rows of pixels, whatever the angle; averages have no registers for it
        averages = problem.interpolation == Interpolation.AVERAGED
        search = Gather(1, 32, 512) if averages else Gather(4, 8, 512)
    tile, fields = _settled(device, problem, tile)
    tile = _shared(device, problem, tile, fields)
    return tile, _settled(device, problem._replace(kernel="gather search"), search, tile._asdict())[0]


def _patch_columns(element_size: int) -> int:
    """The columns of a planar tile: as many as fill the 32 bytes of a sector that is stored, of bytes half.

    A warp of pixels in a row touches a cache line for each of them once the map turns; a patch of 8 x 4 or 16
    x 2 touches few, whatever the angle.
    """
    return min(max(32 // element_size, 8), 16)


def _tile_columns(problem: Problem) -> int:
    """The columns of a planar tile of few channels.

    On an H200, forward, rows of 16 are as good as longer ones up to a turn of 45 degrees, and by 90 degrees
    take half the time, if lanes do not follow the map (``device.programs.numbers_of_lanes``). Where images'
    rows do not begin at a multiple of 64 bytes, each row of a tile writes parts of sectors at both ends, and
    longer ones waste less: a tenth at small turns. Turned by 45 degrees they lose as much. Sums by a matrix
    write nothing, and gain 7 % by rows of 32 at either turn.
    """
    if problem.channels > 4:
        return _patch_columns(problem.element_size) if problem.columns > 16 else 16
    whole = problem.columns * problem.element_size % 64 == 0
    sums = problem.backward and problem.source in INVERTIBLE
    return 16 if whole and not sums and problem.element_size > 1 and problem.dims == 2 else 32


def prefers_sorted(device: torch.device, problem: Problem) -> bool:
    """Whether d image of a general grid is summed from a sorted list though nothing asks for its order.

    Without a table: no. Atomics take less memory, and on an H200 0.59 of the time for 256 channels, 0.36
    for 3.
    """
    return bool(_settled(device, problem, Sum(0))[0].sorted)


def waves(problem: Problem) -> int:
    """Programs wanted for each processor."""
    few = 64 if problem.channels_last else 0 if problem.kernel == "gather" else 4
    return WAVES_OF_CHANNELS if problem.channels > few else WAVES


def _shared(device: torch.device, problem: Problem, tile: Tile, fields: Mapping[str, Any]) -> Tile:
    """``tile`` with splits and steps that leave ``waves`` programs to each processor, if ``fields`` say none.

    Channels are split where pixels alone give fewer programs: each repeats the coordinates of its pixels, so
    that large images are not split. Programs take steps where there are more; their blocks are then not far
    apart.
    """
    if device.type == "cpu":
        return tile
    wanted = fields.get("waves", waves(problem)) * _processors(device.type, device.index)
    outputs = -(-problem.images // tile.group)
    programs = outputs * -(-problem.rows // tile.rows) * -(-problem.columns // tile.columns)
    blocks = -(-problem.channels // (tile.channels * tile.unroll))
    splits = max(1, min(-(-wanted // max(programs, 1)), blocks))
    steps = max(1, min(MOST_STEPS, programs // wanted))
    return tile._replace(splits=fields.get("splits", splits), steps=fields.get("steps", steps))


def _interpreter_tile(channels: int, rows: int, columns: int) -> Tile:
    """The interpreter's time goes by program and operation, not by element: few, wide programs."""
    columns_tile = min(power_of_2(columns), 64)
    rows_tile = min(power_of_2(rows), 4096 // columns_tile)
    width = min(power_of_2(channels), 16)
    return Tile(rows_tile, columns_tile, width, 1, 4, 1, 1)
