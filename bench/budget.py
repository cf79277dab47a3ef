"""What kernels may cost: rules, and ``budget.json``, which holds what was counted last."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

from bench.launches import CASES, Case
from stn_triton.kernels.host.files import replacing

BUDGET = Path(__file__).with_name("budget.json")


class Budget(NamedTuple):
    """What the code for sm_90 was when it was last budgeted, by Triton's version.

    ``exceptions``: {"case", "target", "rule", "why"}, the first two with wildcards. One with "triton", with
    wildcards too, holds under those versions alone. A rule is one of ``broken_rules``, or what may grow.
    """

    triton: str
    exceptions: list[dict[str, str]]
    cases: dict[str, dict[str, Any]]

    @classmethod
    def load(cls) -> Budget:
        return cls(**json.loads(BUDGET.read_text())) if BUDGET.exists() else cls(triton.__version__, [], {})

    def save(self) -> None:
        """One case a line, that differences can be read."""
        rest = ",\n".join(f"    {json.dumps(exception)}" for exception in self.exceptions)
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(self.cases[name])}" for name in CASES if name in self.cases
        )
        head = f'{{\n  "triton": {json.dumps(self.triton)},\n  "exceptions": [\n{rest}\n  ],\n'
        with replacing(BUDGET) as part:
            part.write_text(f'{head}  "cases": {{\n{rows}\n  }}\n}}\n')

    def excused(self, rule: str, name: str, target: str) -> bool:
        return any(
            rule == each["rule"]
            and fnmatch.fnmatch(triton.__version__, each.get("triton", "*"))
            and fnmatch.fnmatch(name, each["case"])
            and fnmatch.fnmatch(target, each["target"])
            for each in self.exceptions
        )


# What may grow by how much: what a compiler chooses by a tenth, what is executed by a hundredth.
EXECUTED = ("instructions", "lines", "wavefronts")
GROWTH = {"registers": 1.1, "code": 1.1, **dict.fromkeys(EXECUTED, 1.01)}


def budgeted(row: dict[str, Any]) -> dict[str, Any]:
    """What the budget says of a case: of those that are executed, what was counted by map."""
    executed = {key: row[key] for key in EXECUTED if key in row}
    return {"registers": row["registers"], "code": row["code"], **executed}


def broken_rules(case: Case | None, target: str, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(rule, what broke it) of one case; without one, of any kernel."""
    if row["spills"]:
        yield "spills", f"{row['spills']} spills, none allowed"
    if row["fences"]:
        yield "fences", f"{row['fences']} fences, none allowed"
    if row["swaps"]:
        yield "swaps", f"{row['swaps']} compare-and-swaps, none allowed"
    if case is None or not case.vectors:
        return
    if set(row["image_loads"]) != {16}:
        yield "vectors", f"loads of images by bytes a lane are {row['image_loads']}: all must be 16"
    writes = case.kernel in ("sample_forward_kernel", "gather_backward_kernel", "sort_sums_kernel")
    if writes and set(row["stores"]) != {16}:
        yield "vectors", f"stores by bytes a lane are {row['stores']}: all must be 16"
    if target in ("sm_90", "sm_100") and set(row["adds"]) - {"f32x4"}:
        yield "vectors", f"additions to memory are {row['adds']}: all must be f32x4"


def complaints(results: dict[tuple[str, str], dict[str, Any]], budget: Budget) -> list[str]:
    """What ``--check`` has against the results: broken rules, and growth since the budget was written."""
    found = []
    same = budget.triton.split(".")[:2] == triton.__version__.split(".")[:2]
    for (target, name), row in results.items():
        where = f"{name} on {target}"
        for rule, text in broken_rules(CASES.get(name), target, row):
            if not budget.excused(rule, name, target):
                found.append(f"{where}: {text}")
        if not same or target != "sm_90":
            continue
        allowed = budget.cases.get(name)
        if allowed is None:
            found.append(f"{where}: not in the budget")
            continue
        for number, most in GROWTH.items():
            if budget.excused(number, name, target):
                continue
            for what, now, before in compared(number, row, allowed):
                if now > most * before:
                    found.append(f"{where}: {what} {now:g}, budget {before:g} and {100 * most - 100:.0f} %")
    return found


def compared(number: str, row: dict[str, Any], allowed: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(what, how much now, how much is allowed): one number, or one for each map."""
    now, before = row.get(number), allowed.get(number)
    if isinstance(now, dict):
        for map, value in now.items():
            yield f"{number} at {map}", value, (before or {}).get(map, 0)
    elif now is not None:
        yield number, now, before or 0


HELP = (
    "See one case: python -m bench.report CASE --target TARGET --lines. "
    "After a change that is meant: python -m bench.report --update-budget"
)


def update(budget: Budget, results: dict[tuple[str, str], dict[str, Any]]) -> Budget:
    """The budget with the results in the place of what it said.

    It forgets cases that are gone, and exceptions whose cases are all among the results and break no rule.
    """
    new = {name: budgeted(row) for (target, name), row in results.items() if target == "sm_90"}
    cases = {**budget.cases, **new}
    ordered = {name: cases[name] for name in CASES if name in cases}

    def needed(exception: dict[str, str]) -> bool:
        alone = budget._replace(exceptions=[exception])
        rule = exception["rule"]
        if rule in GROWTH:  # said of the budget that is replaced
            return not any(alone.excused(rule, name, target) for target, name in results)
        met = [key for key in results if alone.excused(rule, key[1], key[0])]
        broken = (rule in dict(broken_rules(CASES[key[1]], key[0], results[key])) for key in met)
        seen = {name for _, name in results}
        unseen = any(name not in seen and fnmatch.fnmatch(name, exception["case"]) for name in CASES)
        return not met or unseen or any(broken)

    return Budget(triton.__version__, list(filter(needed, budget.exceptions)), ordered)
