"""Reads machine code: NVIDIA's as ``nvdisasm -c -g`` prints it, AMD's as Triton keeps it.

``parse_sass`` and ``parse_amdgcn`` give one list of ``Instruction`` for either; what is not reachable from
the entry (padding, and subroutines, into which calls are not followed) is left out. Pure Python: nothing here
needs a compiler or a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

Line = tuple[str, int]  # file and line


class Instruction(NamedTuple):
    """``target``: where a branch leads, as an index. ``falls``: the next instruction may follow."""

    op: str
    text: str
    line: Line | None
    target: int | None = None
    falls: bool = True


# ------------------------------------------------------------------------------------------- parsing
def parse_sass(text: str) -> list[Instruction]:
    """The instructions of the first function of a disassembly, in their order."""
    found: list[tuple[str, str, Line | None]] = []
    labels: dict[str, int] = {}
    line: Line | None = None
    for row in text.splitlines():
        if match := re.match(r'\s*//## File "(.*)", line (\d+)', row):
            line = match[1], int(match[2])
        elif match := re.match(r"([.$\w]+):", row):
            labels[match[1]] = len(found)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", row):
            words = re.sub(r"^@!?U?P[T\d]+\s+", "", match[1])
            found.append((words.split()[0], match[1], line))
    code = []
    for op, words, at in found:
        target, falls, kind = None, True, op.split(".")[0]
        always = not words.startswith("@") or words.startswith("@PT ")
        if kind in ("BRA", "JMP"):
            label = re.search(r"`\(([^)]+)\)", words)
            target = labels.get(label[1]) if label else None
            # a second predicate may stand before the label
            falls = not (always and re.fullmatch(r"(@PT )?[\w.]+\s+`\([^)]+\)", words))
        elif kind in ("EXIT", "RET", "BRX"):
            falls = not always
        code.append(Instruction(op, words, at, target, falls))
    return _reachable(code)


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of the first function of an assembly file, in their order."""
    found: list[tuple[str, str, Line | None]] = []
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    line: Line | None = None
    for row in text.splitlines():
        row = row.split(";")[0].rstrip()
        if match := re.match(r'\s*\.file\s+(\d+)\s+(?:"(.*?)"\s+)?"(.*?)"', row):
            files[match[1]] = f"{match[2]}/{match[3]}" if match[2] else match[3]
        elif match := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", row):
            line = files.get(match[1], "?"), int(match[2])
        elif match := re.match(r"([.$\w]+):", row):
            labels[match[1]] = len(found)
        elif match := re.match(r"\s+([a-z]+_\w+)\b(.*)", row):
            found.append((match[1], (match[1] + match[2]).strip(), line))
    code = []
    for op, words, at in found:
        target = labels.get(words.split()[-1]) if re.match(r"s_c?branch", op) else None
        falls = op not in ("s_branch", "s_endpgm", "s_setpc_b64")
        code.append(Instruction(op, words, at, target, falls))
    return _reachable(code)


def _reachable(code: list[Instruction]) -> list[Instruction]:
    seen, waiting = set(), [0] if code else []
    while waiting:
        i = waiting.pop()
        if i in seen or i >= len(code):
            continue
        seen.add(i)
        if code[i].falls:
            waiting.append(i + 1)
        if (target := code[i].target) is not None:
            waiting.append(target)
    kept = sorted(seen)
    number: dict[int | None, int] = {old: new for new, old in enumerate(kept)}
    return [code[i]._replace(target=number.get(code[i].target)) for i in kept]


# ------------------------------------------------------------------------------------ what they do
def waits(code: Iterable[Instruction]) -> tuple[int, int]:
    """(loads, waits) of NVIDIA's machine code as it stands: a warp goes on after a load from global memory
    until it comes to a register that is loaded; by then all that it has asked for is taken to be there."""
    loads = found = 0
    awaited: set[int] = set()
    for op, text, *_ in code:
        kind, *rest = op.split(".")
        target = re.search(r"\bR(\d+)\b", text) if kind == "LDG" else None
        read = text[target.end() :] if target else text
        named = re.findall(r"\bR(\d+)(\.64)?", read)
        if awaited & {int(number) + k for number, wide in named for k in range(2 if wide else 1)}:
            found += 1
            awaited = set()
        if target:
            loads += 1
            awaited |= {int(target[1]) + k for k in range(_sass_bytes(rest) // 4 or 1)}
    return loads, found


class Traffic(NamedTuple):
    """How often each kind of memory operation stands in the code.

    ``loads`` and ``stores``: of global memory, by bytes for each lane. ``adds``: global additions without an
    answer, by type. ``atomics``: those with one, and compare-and-swap, which is counted in ``swaps`` too.
    ``fences``: what orders memory or empties a cache. ``spills``: to and from a lane's own memory.
    """

    loads: Counter[int]
    stores: Counter[int]
    adds: Counter[str]
    atomics: Counter[str]
    swaps: int
    fences: Counter[str]
    spill_stores: int
    spill_loads: int
    special: Counter[str]  # by name: logarithms, reciprocals, roots
    calls: int


_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_SASS_FENCES = ("MEMBAR", "ERRBAR", "FENCE")
_AMD_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}
_AMD_FENCES = ("buffer_wb", "buffer_inv", "buffer_gl", "global_wb", "global_inv")
_AMD_SPECIAL = r"v_(log|exp|rcp|rcp_iflag|rsq|sqrt|sin|cos)_f\d+"


def traffic(code: Iterable[Instruction]) -> Traffic:
    """Counts the memory operations of either vendor's code."""
    found = Traffic(Counter(), Counter(), Counter(), Counter(), 0, Counter(), 0, 0, Counter(), 0)
    swaps = spill_stores = spill_loads = calls = 0
    for instruction in code:
        op = instruction.op
        kind, *rest = op.split(".")
        if kind in ("LDG", "LD"):
            found.loads[_sass_bytes(rest)] += 1
        elif kind in ("STG", "ST"):
            found.stores[_sass_bytes(rest)] += 1
        elif kind == "STL" or op.startswith("scratch_store"):
            spill_stores += 1
        elif kind == "LDL" or op.startswith("scratch_load"):
            spill_loads += 1
        elif kind in ("RED", "REDG"):
            found.adds[_sass_type(rest)] += 1
        elif kind in ("ATOM", "ATOMG", "ATOMS"):
            found.atomics[op] += 1
            swaps += "CAS" in rest or "CAST" in rest
        elif kind in _SASS_FENCES or (kind == "CCTL" and "IVALL" in rest) or op.startswith(_AMD_FENCES):
            found.fences[op] += 1
        elif kind == "MUFU":
            found.special[rest[0].lower()] += 1
        elif kind == "CALL" or op == "s_swappc_b64":
            calls += 1
        elif match := re.match(r"(global|buffer|flat)_atomic_(\w+)", op):
            if "cmpswap" in op:
                swaps += 1
                found.atomics[op] += 1
            elif re.search(r"\b(sc0|glc)\b", instruction.text):  # these ask for the value before
                found.atomics[op] += 1
            else:
                found.adds[match[2].removeprefix("add_")] += 1
        elif match := re.match(r"(?:global|buffer|flat)_(load|store)_([a-z]+?)(?:x(\d))?(_.*)?$", op):
            width = _AMD_BYTES.get(match[2], 4) * int(match[3] or 1)
            (found.loads if match[1] == "load" else found.stores)[width] += 1
        elif match := re.match(_AMD_SPECIAL, op):
            found.special[{"log": "lg2", "exp": "ex2"}.get(match[1], match[1])] += 1
    return found._replace(swaps=swaps, spill_stores=spill_stores, spill_loads=spill_loads, calls=calls)


def _sass_bytes(modifiers: list[str]) -> int:
    return next((_SASS_BYTES[m] for m in modifiers if m in _SASS_BYTES), 4)


def _sass_type(modifiers: list[str]) -> str:
    """Such as f32x4; without one, an integer of 32 bits."""
    pattern = r"(F|BF|S|U)\d+(_V\d|x\d)?(\.RN)?|64"
    return next((m.lower() for m in modifiers if re.fullmatch(pattern, m)), "u32")
