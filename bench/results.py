"""A run's results: what the JSON file holds, written after every case; and the tables made of it.

``python -m bench.results FILE`` prints the rows in Markdown, ``--cases`` all cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stn_triton.kernels.host.files import replacing

SCHEMA = 1
# Two results are of one run if these agree; other facts of the machine may differ (date, clocks).
SAME = ("device", "torch", "triton", "sources", "interpreted")


@dataclasses.dataclass
class Measurement:
    """One way to do a case.

    ``status``: "timed"; "missing" (not installed, or has no such way), "mismatch" (wrong result: not timed),
    "failed"; ``why`` tells. ``errors``: ||result - exact|| / ||exact|| of output, d image and d parameters,
    of those that the case has; None for NaN and infinity. Milliseconds of device time: ``median``, ``low``
    (20 %), ``high`` (80 %), of so many ``runs``, taken by ``how``: "graph", "events" or "wall". ``call``: of
    an eager call, host included. ``peak``: the most bytes held beyond the inputs.
    """

    name: str
    status: str
    eager: bool = False
    why: str = ""
    errors: list[float | None] = dataclasses.field(default_factory=list)
    median: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int | None = None
    how: str | None = None
    call: float | None = None
    peak: int | None = None


@dataclasses.dataclass
class Entry:
    """A case and what was measured of it.

    ``status``: "done", "failed" (``why``; or a rival's result is wrong or failed) or "running" (the process
    ended in it). ``bytes``: the fewest that it moves; ``share_read``: of the image's pixels;
    ``bytes_of_floats``: of integers, the fewest for whoever samples a copy in float32, as torchvision does.
    """

    id: str
    row: str
    case: dict[str, Any]
    status: str = "running"
    why: str = ""
    attempts: int = 1
    share_read: float | None = None
    bytes: int | None = None
    bytes_of_floats: int | None = None
    measurements: list[Measurement] = dataclasses.field(default_factory=list)

    def times(self) -> dict[str, float]:
        """Milliseconds by name, of those that were timed."""
        return {m.name: m.median for m in self.measurements if m.median is not None}

    def find(self, name: str) -> Measurement | None:
        return next((m for m in self.measurements if m.name == name), None)

    def speedups(self) -> dict[str, float]:
        """How many times as fast as each rival ours is; "eager" is the fastest of PyTorch's eager ways."""
        times = self.times()
        ours = times.pop("ours", None)
        if ours is None:
            return {}
        found = {name: time / ours for name, time in times.items()}
        eager = [found[m.name] for m in self.measurements if m.eager and m.name in found]
        return found | ({"eager": min(eager)} if eager else {})

    def bandwidth(self) -> float | None:
        """Of ours: the fewest bytes over the time, bytes per second."""
        ours = self.times().get("ours")
        return self.bytes / (ours * 1e-3) if ours and self.bytes else None


@dataclasses.dataclass
class Results:
    """``machine``: bench.machine's facts; ``method``: how it was timed; ``roof``: bytes per second of a copy,
    and of one after all else; ``floor``: milliseconds of the shortest kernel; ``rows``: targets;
    ``not_reached``: ids of cases for which there was no time, and their rows."""

    machine: dict[str, Any]
    method: dict[str, Any]
    rows: dict[str, Any]
    schema: int = SCHEMA
    roof: float | None = None
    roof_after: float | None = None
    floor: float | None = None
    complete: bool = False
    not_reached: dict[str, str] = dataclasses.field(default_factory=dict)
    entries: list[Entry] = dataclasses.field(default_factory=list)

    def find(self, id: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.id == id), None)

    def of_row(self, row: str) -> tuple[list[Entry], list[Entry], int]:
        """A row's entries, those in which ours was timed, and how many cases it has."""
        entries = [entry for entry in self.entries if entry.row == row]
        timed = [entry for entry in entries if "ours" in entry.times()]
        return entries, timed, len(entries) + list(self.not_reached.values()).count(row)

    def save(self, path: Path) -> None:
        """All or nothing: who is killed in it leaves what was there before."""
        with replacing(path) as part:
            part.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Results:
    """Raises ValueError for a file that is damaged or of another schema."""
    try:
        data = json.loads(path.read_text())
        schema = data.get("schema")
        if schema == SCHEMA:
            entries = [
                Entry(**entry | {"measurements": [Measurement(**m) for m in entry["measurements"]]})
                for entry in data.pop("entries")
            ]
            return Results(**data, entries=entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, make it anew: {type(error).__name__}: {error}") from error
    raise ValueError(f"{path}: schema {schema!r}, this code reads {SCHEMA}")


# ------------------------------------------------------------------------------------------------ the table
@dataclasses.dataclass
class Verdict:
    """A target of a row, and the least and the most that cases reached; None where nothing was measured.

    ``whole``: every case of the row was measured.
    """

    rival: str
    target: float
    least: float | None
    most: float | None
    whole: bool

    @property
    def word(self) -> str:
        if self.least is None:
            return "not measured"
        if self.least < self.target:
            return "MISSED"
        return "met" if self.whole else "met where measured"

    def __str__(self) -> str:
        unit, factor = (" %", 100) if self.rival == "roof" else ("x", 1)
        digits = 0 if self.rival == "roof" else 2
        if self.least is None or self.most is None:
            reached = ""
        else:
            low, high = (f"{value * factor:.{digits}f}" for value in (self.least, self.most))
            reached = f" {low}{unit}" if low == high else f" {low}-{high}{unit}"
        return f"{self.rival}{reached} (>= {self.target * factor:.{digits}f}{unit}: {self.word})"


def verdicts(results: Results, row: str) -> list[Verdict]:
    """A target is met if every case of the row reaches it, the slowest counts."""
    _, timed, total = results.of_row(row)
    whole = len(timed) == total

    def verdict(rival: str, target: float, reached: list[float]) -> Verdict:
        return Verdict(rival, target, min(reached, default=None), max(reached, default=None), whole)

    found = []
    for rival, target in results.rows[row]["targets"].items():
        speedups = [entry.speedups() for entry in timed]
        found.append(verdict(rival, target, [each[rival] for each in speedups if rival in each]))
    target = results.rows[row]["roof"]
    if target is not None:
        reached = [entry.bandwidth() for entry in timed]
        shares = [value / results.roof for value in reached if value and results.roof]
        found.append(verdict("roof", target, shares))
    return found


def losses(entry: Entry) -> list[str]:
    """Rivals that are faster than ours. Our own affine map is none."""
    times = entry.times()
    ours = times.pop("ours", None)
    times.pop("ours affine", None)
    if ours is None:
        return []
    return [
        f"{name} is faster, {time:.4g} ms to our {ours:.4g}" for name, time in times.items() if time < ours
    ]


def problems(entry: Entry) -> list[str]:
    """What went wrong; a rival that is not there is no problem, but is told."""
    found = [f"{entry.status}: {entry.why}"] if entry.why or entry.status == "running" else []
    wrong = [m for m in entry.measurements if m.status in ("mismatch", "failed")]
    return found + [f"{m.name} {m.status}: {m.why}" for m in wrong]


def conditions(results: Results) -> str:
    """One line for under a table or a picture."""
    machine = results.machine
    parts = [machine["device"]]
    if machine.get("driver"):
        parts.append(f"driver {machine['driver']}")
    parts += [f"torch {machine['torch']}", f"triton {machine['triton']}", f"commit {machine['commit'][:12]}"]
    parts += [machine["date"][:10], results.method["clock"]]
    if results.roof:
        parts.append(f"copy {results.roof / 1e9:.0f} GB/s")
    return ", ".join(parts)


def table(results: Results) -> str:
    """The rows, their targets and what was reached; losses and problems by case."""
    lines = [conditions(results)]
    if results.roof and results.roof_after:
        drift = results.roof_after / results.roof - 1
        lines.append(f"copy after all cases: {results.roof_after / 1e9:.0f} GB/s ({drift:+.1%})")
    for row, about in results.rows.items():
        entries, timed, total = results.of_row(row)
        if not total:
            continue
        small = results.method["small"]  # whose times mean nothing
        reached = [] if small else [str(verdict) for verdict in verdicts(results, row)]
        lines.append("; ".join([f"{about['title']} [{len(timed)}/{total}]", *reached]))
        for entry in entries:
            told = [] if small else losses(entry)
            lines += [f"  ! {entry.id}: {text}" for text in (*told, *problems(entry))]
    absent = sorted({m.why for entry in results.entries for m in entry.measurements if "imported" in m.why})
    lines += [f"missing: {why}" for why in absent]
    lines += [f"memory of {text}" for text in memory(results)]
    lines += [f"bytes of {text}" for text in traffic(results)]
    if results.not_reached:
        lines.append(f"{len(results.not_reached)} cases not reached for want of time")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- Markdown
OTHERS = "kornia", "torchvision", "grid_sample alone", "half grid", "cudnn"


def _span(values: Iterable[float | None], digits: int = 1) -> str:
    """From the least to the most, in bold where the least is a loss."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return ""
    low, high = (f"{value:.{digits if value >= 1 else 2}f}" for value in (found[0], found[-1]))
    low = f"**{low}**" if found[0] < 1 and digits else low
    return low if len(found) == 1 or low == high else f"{low} - {high}"


def _cells(results: Results, entries: list[Entry]) -> list[str]:
    """How many times as fast as eager, compiled and other rivals ours is; the share of a copy's bandwidth."""
    speedups = [entry.speedups() for entry in entries]
    others = [
        f"{name.replace('cudnn', 'cuDNN')} {_span(each.get(name) for each in speedups)}"
        for name in OTHERS
        if any(name in each for each in speedups)
    ]
    bandwidths = [entry.bandwidth() for entry in entries]
    shares = [100 * value / results.roof for value in bandwidths if value and results.roof]
    eager, compiled = (_span(each.get(name) for each in speedups) for name in ("eager", "compiled"))
    return [eager, compiled, ", ".join(others), _span(shares, 0) + " %"]


def _shapes(entries: list[Entry]) -> str:
    """What was measured, images with what is not usual about them."""
    found = []
    for case in (entry.case for entry in entries):
        words = ["x".join(map(str, case["shape"]))]
        words += [case["dtype"]] * (case["dtype"] != "float32") + ["channels_last"] * case["channels_last"]
        words += [case["padding"]] * (case["padding"] != "zeros") + [f"{case['turn']} deg"] * bool(
            case["turn"]
        )
        found.append(" ".join(words))
    return ", ".join(dict.fromkeys(found))


def markdown(results: Results, by_case: bool = False) -> Iterator[str]:
    """A table's lines: a row's cases together, or each case with our milliseconds.

    Those of the device, and of an eager call with the host's time.
    """
    heads = ["eager : ours", "compiled : ours", "others : ours", "of the copy"]
    heads = ["case", "ours, ms", "a call, ms", *heads] if by_case else ["", "images", *heads]
    yield "| " + " | ".join(heads) + " |"
    yield "|---|" + ("" if by_case else "---|") + "---:|" * (len(heads) - (1 if by_case else 2))
    for row, about in results.rows.items():
        _, timed, total = results.of_row(row)
        for entry in timed if by_case else ():
            ours = entry.find("ours")
            call = "" if ours is None or ours.call is None else f"{ours.call:.3f}"
            cells = [f"`{entry.id}`", f"{entry.times()['ours']:.4f}", call, *_cells(results, [entry])]
            yield "| " + " | ".join(cells) + " |"
        if timed and not by_case:
            count = f"{len(timed)} of {total}: {_shapes(timed)}"
            yield "| " + " | ".join([about["title"], count, *_cells(results, timed)]) + " |"


def traffic(results: Results) -> list[str]:
    """What images of integers move at least, beside a copy in float32 as torchvision samples it."""
    found = []
    for entry in results.entries:
        if entry.bytes and entry.bytes_of_floats:
            ours, floats = entry.bytes, entry.bytes_of_floats
            shown = f"ours {ours / 1e6:.3g} MB, torchvision's floats {floats / 1e6:.3g} MB"
            found.append(f"{entry.id}: {shown} ({floats / ours:.2f}x)")
    return found


def memory(results: Results) -> list[str]:
    """The most that training steps hold beyond their inputs, ours beside PyTorch's."""
    found = []
    for entry in results.entries:
        peaks = {m.name: m.peak for m in entry.measurements if m.peak is not None}
        if entry.case.get("work") == "step" and "ours" in peaks and len(peaks) > 1:
            shown = ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items())
            found.append(f"{entry.id}: {shown}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="results.json")
    parser.add_argument("--cases", action="store_true", help="all cases, one by one")
    options = parser.parse_args()
    print("\n".join(markdown(load(options.file), options.cases)))


if __name__ == "__main__":
    main()
