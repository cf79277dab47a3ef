"""Executes the PTX that Triton compiles, on the CPU, in NumPy: every access is checked, all work counted.

    kernel = Kernel(ptx_text, bytes_of_shared_memory)
    memory = Memory()
    address = memory.add("x", bytes_of_x)
    counts = execute(kernel, programs, [address, ...], memory)

All threads of a batch of programs go in lockstep. A register is an array that broadcasts to (programs,
threads), so that what all threads share is computed once. Where threads part at a branch, the sides run one
after the other and meet again at the branch's immediate post-dominator, as on a GPU.

``Fault`` is raised by an access outside the elements that ``Memory`` was given, by a misaligned one, by a
barrier or a shuffle that not all threads reach, and by an instruction that is not known. Registers and shared
memory hold rubbish until they are written.

``bench.ptx`` has the arithmetic, and says where its bits are not the GPU's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from bench.ptx import BITS, TYPES, Array, Fault, narrowed, operation, widened

WARP, SECTOR, LINE = 32, 32, 128  # lanes; bytes that memory moves at least; bytes of a cache line
WORD = 4  # bytes of a bank of shared memory, of which there are 32
SHARED = 0x400  # address of a program's shared memory
Lanes = Any  # which threads an instruction is for, an array of bool; None is all


# ----------------------------------------------------------------------------------------------- kernels
class Instruction(NamedTuple):
    """``run`` does it for some lanes; control flow has none. ``guard``: (predicate, negated), or None."""

    text: str
    line: str
    guard: tuple[str, bool] | None
    run: Callable[[Batch, Lanes], None] | None
    target: str | None


class Kernel:
    """The entry of a PTX module, in blocks of instructions; each branch ends one."""

    def __init__(self, text: str, shared: int = 0) -> None:
        self.shared = (shared + 15) // 16 * 16
        self.widths: dict[str, int] = {"pred": 1}  # bits of registers, by the letters of their names
        self.blocks: list[list[Instruction]] = [[]]
        self.block_of: dict[str, int] = {}
        header, _, rest = text[text.index(".visible .entry") :].partition("{\n")
        self.name = header.split()[2].rstrip("(")
        self.params = re.findall(r"\.param \.[ubsf](\d+).*?(\w+),?\n", header)
        self.threads = int(re.search(r"\.reqntid (\d+)", header)[1])  # type: ignore[index]
        files = dict(re.findall(r'\.file\s+(\d+)\s+".*?([^/"]+)"', text))
        body, line = re.sub(r"//.*", "", rest[: rest.index("\n}")]), ""
        statement = ""
        for row in map(str.strip, body.splitlines()):
            if match := re.match(r"\.loc\s+(\d+) (\d+)", row):
                line = f"{files.get(match[1], '?')}:{match[2]}"
            elif match := re.fullmatch(r"([$\w]+):", row):
                self._cut()
                self.block_of[match[1]] = len(self.blocks) - 1
            else:
                *whole, statement = f"{statement} {row}".split(";")
                for each in whole:
                    self._statement(" ".join(each.lstrip("{} \t").split()), line)

    def _statement(self, text: str, line: str) -> None:
        """A declaration or an instruction; braces before it open and close scopes, and mean nothing here."""
        if match := re.fullmatch(r"\.reg \.(?:pred|[bfus](\d+)) (%?\w+?)(<\d+>)?", text):
            self.widths[match[2]] = int(match[1] or 1)
        elif text and not text.startswith((".local", ".pragma")):
            self._add(text, line)

    def _cut(self) -> None:
        if self.blocks[-1]:
            self.blocks.append([])

    def _add(self, text: str, line: str) -> None:
        match = re.fullmatch(r"(?:@(!?)(%\w+) )?(\S+)(?: (.*))?", text)
        assert match is not None, text
        negated, predicate, op, rest = match.groups()
        operands = [each.strip() for each in re.split(r",(?![^{\[]*[}\]])", rest or "")]
        guard = (predicate, bool(negated)) if predicate else None
        control = op.split(".")[0] in ("bra", "ret", "exit")
        target = operands[0] if op.startswith("bra") else None
        run = None if control else _instruction(self, op.replace("shared::cta", "shared"), operands)
        self.blocks[-1].append(Instruction(text, line, guard, run, target))
        if control:
            self._cut()

    def width(self, register: str) -> int:
        if register not in self.widths:
            self.widths[register] = self.widths[register.rstrip("0123456789")]
        return self.widths[register]

    def after(self, block: int) -> list[int]:
        """Where a block leads: its branch's target first. The number past the last is the end."""
        last = self.blocks[block][-1] if self.blocks[block] else None
        if last is None or last.run is not None:
            return [block + 1]
        target = len(self.blocks) if last.target is None else self.block_of[last.target]
        return [target] if last.guard is None else [target, block + 1]

    @cached_property
    def meetings(self) -> list[int]:
        """The immediate post-dominator of each block."""
        end = len(self.blocks)
        behind = [(1 << end + 1) - 1] * end + [1 << end]  # sets of blocks, as bits
        old: list[int] = []
        while behind != old:
            old = list(behind)
            for block in reversed(range(end)):
                common = -1
                for other in self.after(block):
                    common &= behind[other]
                behind[block] = common | 1 << block
        # the nearest one has all the others behind it
        return [
            next((p for p in range(end + 1) if p != b and behind[p] == behind[b] & ~(1 << b)), end)
            for b in range(end)
        ]


# ------------------------------------------------------------------------------------------ instructions
def _operand(kernel: Kernel, text: str, kind: str) -> Callable[[Batch], Array]:
    """What fetches an operand as a type."""
    if kind == "pred":
        if text in ("true", "false", "0", "1", "-1"):
            truth = np.array([[text not in ("false", "0")]])
            return lambda batch: truth
        return (lambda batch: ~batch.read(text[1:])) if text[0] == "!" else (lambda batch: batch.read(text))
    dtype, bits = TYPES[kind], TYPES[kind].itemsize * 8
    if text in ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x"):
        return lambda batch: batch.special[text].view(dtype)
    if re.fullmatch(r"%n?(tid|ctaid)\.[yz]", text):
        text = str(int(text.startswith("%n")))
    if text[0] == "%" or text in kernel.widths:
        if kernel.width(text) == bits:
            return lambda batch: batch.read(text).view(dtype)
        return lambda batch: batch.read(text).astype(BITS[bits]).view(dtype)
    if text == "global_smem":
        text = str(SHARED)
    number = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.removesuffix("U"), 0)
    value = np.array([[number & (1 << bits) - 1]], BITS[bits]).view(dtype)
    return lambda batch: value


def _address(kernel: Kernel, text: str) -> Callable[[Batch], Array]:
    match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    assert match is not None, text
    bits = kernel.width(match[1]) if match[1][0] == "%" else 64
    fetch, offset = _operand(kernel, match[1], f"b{bits}"), int(match[2] or 0)
    step = np.array([[offset & (1 << bits) - 1]], BITS[bits])
    return lambda batch: (fetch(batch) + step if offset else fetch(batch)).astype(np.uint64, copy=False)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def _instruction(kernel: Kernel, op: str, operands: list[str]) -> Callable[[Batch, Lanes], None]:
    parts = op.split(".")
    name = parts[0]
    if name in ("ld", "st", "red", "atom"):
        return _memory(kernel, op, operands)
    if op in ("bar.sync", "bar.warp.sync"):
        return lambda batch, lanes: batch.together(lanes, WARP if "warp" in op else kernel.threads)
    if name in ("shfl", "redux"):
        return _exchange(kernel, parts, operands)
    if name in ("ldmatrix", "stmatrix"):
        return _matrix(kernel, op, operands)
    if name == "mov" and "{" in operands[0] + operands[1]:
        return _packing(kernel, parts[-1], operands)
    function, kinds = operation(parts, len(operands) - 1)
    fetch = [_operand(kernel, text, kind) for text, kind in zip(operands[1:], kinds)]
    target = operands[0]

    def run(batch: Batch, lanes: Lanes) -> None:
        batch.write(target, function(*[each(batch) for each in fetch]), lanes)

    return run


def _packing(kernel: Kernel, kind: str, operands: list[str]) -> Callable[[Batch, Lanes], None]:
    """``mov`` between a register and its parts, the lowest first."""
    unpacks = operands[0][0] == "{"
    names, whole = _names(operands[not unpacks]), TYPES[kind]
    bits = whole.itemsize * 8 // len(names)

    def unpack(batch: Batch, lanes: Lanes) -> None:
        value = source(batch)
        for i, name in enumerate(names):
            if name != "_":
                batch.write(name, (value >> whole.type(i * bits)).astype(BITS[bits]), lanes)

    def pack(batch: Batch, lanes: Lanes) -> None:
        value = whole.type(0)
        for i, each in enumerate(fetch):
            value = value | each(batch).astype(whole) << whole.type(i * bits)
        batch.write(operands[0], value, lanes)

    if unpacks:
        source = _operand(kernel, operands[1], kind)
        return unpack
    fetch = [_operand(kernel, name, f"b{bits}") for name in names]
    return pack


def _memory(kernel: Kernel, op: str, operands: list[str]) -> Callable[[Batch, Lanes], None]:
    name, space, *_, kind = op.split(".")
    if space == "param":
        target, param = operands[0], operands[1].strip("[]")
        return lambda batch, lanes: batch.write(target, batch.params[param].view(TYPES[kind]), lanes)
    # Triton 3.6 keeps the register for the value before, which nothing reads: ptxas makes it a red
    adds = name in ("red", "atom")
    pattern = (
        rf"{name}\.global\.gpu\.relaxed\.add(\.noftz)?(\.v[248])?\.(f32|f64|f16|bf16|f16x2|bf16x2)"
        if adds
        else r"(ld|st)\.(global|shared)(\.v[248])?\.[bus]\d+"
    )
    if not re.fullmatch(pattern, op):
        raise Fault(f"unknown access {op}")
    place, values = operands[name in ("ld", "atom") :][:1][0], operands[0 if name == "ld" else -1]
    where, names = _address(kernel, place), _names(values)
    packed = kind.endswith("x2")
    kind = kind.removesuffix("x2")
    if name == "ld":
        dtype = TYPES[kind]

        def load(batch: Batch, lanes: Lanes) -> None:
            values = batch.access(space, "load", where(batch), dtype, len(names), lanes)
            for register, value in zip(names, values):
                batch.write(register, value, lanes)

        return load
    fetch = [_operand(kernel, each, "b32" if packed else kind) for each in names]

    def send(batch: Batch, lanes: Lanes) -> None:
        values = [each(batch) for each in fetch]
        if packed:
            halves = [value >> np.uint32(by) for value in values for by in (0, 16)]
            values = [half.astype(np.uint16).view(TYPES[kind]) for half in halves]
        what = f"add {kind}" if adds else "store"
        batch.access(space, what, where(batch), TYPES[kind], len(values), lanes, values)

    return send


def _exchange(kernel: Kernel, parts: list[str], operands: list[str]) -> Callable[[Batch, Lanes], None]:
    """Shuffles and reductions within a warp, of which all lanes must be there."""
    kind = parts[-1]
    fetch = [_operand(kernel, text, kind if i == 0 else "b32") for i, text in enumerate(operands[1:])]
    lane = np.arange(WARP)
    reductions = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or}

    def run(batch: Batch, lanes: Lanes) -> None:
        batch.together(lanes, WARP)
        batch.counts.exchanges += int(batch.here.sum())
        value, *rest = [batch.warps(each(batch)) for each in fetch]
        here = True if lanes is None else batch.warps(lanes)
        if ((rest[-1] != 0xFFFFFFFF) & here).any():
            raise Fault(f"{'.'.join(parts)} of a part of a warp")
        if parts[0] == "redux":
            total = reductions[parts[2]].reduce(value, 1, keepdims=True, dtype=value.dtype)
            result = np.broadcast_to(total, value.shape)
        else:
            by, limit = (each.astype(np.int64) for each in rest[:2])
            segment, last = limit >> 8 & 31, limit & 31
            low, high = lane & segment, lane & segment | last & ~segment
            moves = {"bfly": lane ^ by, "idx": low | by & 31 & ~segment, "up": lane - by, "down": lane + by}
            source = moves[parts[2]]
            source = np.where(source >= high if parts[2] == "up" else source <= high, source, lane)
            result = np.take_along_axis(value, source, 1)
        batch.write(operands[0], result.reshape(batch.shape), lanes)

    return run


def _matrix(kernel: Kernel, op: str, operands: list[str]) -> Callable[[Batch, Lanes], None]:
    """8 x 8 matrices of halves: lane 8 m + r points to row r of matrix m, and lane i has two of row i / 4."""
    match = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", op)
    if not match:
        raise Fault(f"unknown instruction {op}")
    loads, count, turned = match[1] == "ld", int(match[2]), bool(match[3])
    names, where = _names(operands[not loads]), _address(kernel, operands[loads])

    def run(batch: Batch, lanes: Lanes) -> None:
        batch.together(lanes, WARP)
        pointing = np.arange(kernel.threads) % WARP < 8 * count
        used = np.broadcast_to(pointing if lanes is None else pointing & lanes, batch.shape)
        if loads:
            values = batch.access("shared", "load", where(batch), BITS[64], 2, used)
            rows = np.stack([np.broadcast_to(value, batch.shape) for value in values], -1)
            matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, 4, 8, 8)
            for number, name in enumerate(names):
                matrix = matrices[:, number].swapaxes(1, 2) if turned else matrices[:, number]
                batch.write(name, np.ascontiguousarray(matrix).view(np.uint32).reshape(batch.shape), lanes)
            return
        matrices = np.zeros((batch.shape[0] * batch.shape[1] // WARP, 4, 8, 8), np.uint16)
        for number, name in enumerate(names):
            matrix = np.ascontiguousarray(batch.warps(batch.read(name))).view(np.uint16).reshape(-1, 8, 8)
            matrices[:, number] = matrix.swapaxes(1, 2) if turned else matrix
        rows = matrices.reshape(*batch.shape, 8).view(np.uint64)
        batch.access("shared", "store", where(batch), BITS[64], 2, used, [rows[..., 0], rows[..., 1]])

    return run


# ------------------------------------------------------------------------------------------------ memory
class Buffer(NamedTuple):
    """Bytes at an address. ``allowed``: which of them may be touched; None is all."""

    name: str
    base: int
    data: Array
    allowed: Array | None


class Memory:
    """Buffers far from each other, at addresses that 32 bits do not hold."""

    GAP = 1 << 40

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(self, name: str, data: Array, allowed: Array | None = None, offset: int = 0) -> int:
        """Where the bytes are, ``offset`` from a multiple of 512."""
        base = (len(self.buffers) + 1) * self.GAP + self.GAP // 2 + offset
        self.buffers.append(Buffer(name, base, data, allowed))
        return base

    def find(self, addresses: Array, size: int) -> list[tuple[Buffer, Any, Array]]:
        """(buffer, indices of the addresses in it, offsets); accesses have ``size`` bytes."""
        found = []
        numbers = (addresses // np.uint64(self.GAP)).astype(np.int64)
        for number in np.unique(numbers):
            which = slice(None) if numbers[0] == number and (numbers == number).all() else numbers == number
            if not 1 <= number <= len(self.buffers):
                raise Fault(f"at {addresses[which][0]:#x}, which is in no tensor")
            buffer = self.buffers[number - 1]
            offsets = addresses[which].astype(np.int64) - buffer.base
            outside = (offsets < 0) | (offsets + size > len(buffer.data))
            if buffer.allowed is not None and not outside.any():
                outside = ~buffer.allowed[offsets[:, None] + np.arange(size)].all(1)
            if outside.any():
                at = offsets[outside][0]
                raise Fault(f"at byte {at} of {buffer.name}, of {len(buffer.data)}; {outside.sum()} lanes")
            found.append((buffer, which, offsets))
        return found


def _ordered(numbers: Array) -> tuple[Array, Array]:
    """Each row's numbers in order, and which of them are not the one before."""
    ordered = np.sort(numbers, 1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return ordered, new


def wavefronts(addresses: Array, size: int, bank: int = SECTOR) -> Array:
    """How often L1 turns to each request (a row of lanes' addresses) of ``size`` bytes a lane.

    L1's data lie in banks of ``bank`` bytes, one line's bytes in all of them. In a clock each bank gives one
    place to all lanes that ask for it; a half, a quarter or an eighth of a warp is served at a time where
    lanes ask for 8, 16 or 32 bytes. ``counting`` says how well this fits an H200's counters.
    """
    parts = max(size // WORD, 1)
    if not len(addresses):
        return np.zeros(0, int)
    places, new = _ordered(addresses.reshape(len(addresses) * parts, -1) // bank)
    banks = LINE // bank
    each = [(new & (places % banks == number)).sum(1) for number in range(banks)]
    return np.max(each, 0).reshape(len(addresses), parts).sum(1)


class Traffic:
    """Accesses to global memory: requests of warps, the sectors and lines that they touch, and how often L1
    turns to them. ``idle``: requests of which a predicate keeps all lanes; L1 turns to each once."""

    def __init__(self) -> None:
        self.requests = self.idle = self.sectors = self.lines = self.wavefronts = 0

    def add(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """``addresses``: (requests, lanes); those of lanes that are not there repeat another's. Returns the
        sectors of each request in order, and which of them are not the one before."""
        self.requests += len(addresses)
        sectors, new = _ordered(addresses // SECTOR)
        lines = sectors // (LINE // SECTOR)
        self.sectors += int(new.sum()) * max(size // SECTOR, 1)
        self.lines += len(lines) + int((lines[:, 1:] != lines[:, :-1]).sum())
        self.wavefronts += int(wavefronts(addresses, size).sum())
        return sectors, new


class Counts:
    """Of a launch.

    ``programs`` ran, ``instructions`` were issued by their warps. ``traffic`` is global memory's, by "load",
    "store" and "add". ``exchanges``: wavefronts of L1 by shared memory and by shuffles. ``fetched``: sectors
    that programs loaded, each once a program: what L2 gives to an L1 that keeps them until the program ends.
    """

    def __init__(self) -> None:
        self.programs = self.instructions = self.exchanges = self.fetched = 0
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)


# --------------------------------------------------------------------------------------------- execution
class Batch:
    """Programs in lockstep."""

    def __init__(
        self, kernel: Kernel, memory: Memory, params: dict[str, Array], numbers: Array, counts: Counts
    ) -> None:
        self.kernel, self.memory, self.params, self.counts = kernel, memory, params, counts
        self.shape = len(numbers), kernel.threads
        self.registers: dict[str, Array] = {}
        self.everyone = np.ones(self.shape[0] * self.shape[1] // WARP, bool)
        self.here: Any = self.everyone  # the warps that are where the batch is
        self.seen: list[Array] = []  # sectors that were loaded, with their program
        self.shared = np.full(len(numbers) * kernel.shared, 0xCD, np.uint8)
        self.special = {
            "%tid.x": np.arange(kernel.threads, dtype=np.uint32)[None],
            "%ctaid.x": numbers.astype(np.uint32)[:, None],
            "%ntid.x": np.array([[kernel.threads]], np.uint32),
        }

    def read(self, name: str) -> Array:
        value = self.registers.get(name)
        if value is None:  # LLVM packs halves that are never written with others
            bits = self.kernel.width(name)
            dtype = BITS.get(bits, TYPES["pred"])
            value = np.array([[0xFFC0DEADFFC0DEAD & (1 << bits) - 1]], np.uint64).astype(dtype)
        return value

    def write(self, name: str, value: Array, lanes: Lanes) -> None:
        if value.dtype != bool:
            dtype = BITS[self.kernel.width(name)]
            if value.dtype.itemsize != dtype.itemsize:  # such as a byte into 16 bits, by its sign
                value = value.astype(dtype if value.dtype.kind != "i" else f"i{dtype.itemsize}")
            value = value.view(dtype)
        self.registers[name] = value if lanes is None else np.where(lanes, value, self.read(name))

    def warps(self, value: Array) -> Array:
        """As (warps, lanes)."""
        return np.broadcast_to(value, self.shape).reshape(-1, WARP)

    def together(self, lanes: Lanes, size: int) -> None:
        """Of each ``size`` threads all are there, or none."""
        if lanes is not None:
            here = np.broadcast_to(lanes, self.shape).reshape(-1, size)
            if (here.any(1) != here.all(1)).any():
                raise Fault("not all threads are there")

    def run(self) -> None:
        """A stack of (where to go on, where to stop, who): what is on top runs."""
        kernel, end = self.kernel, len(self.kernel.blocks)
        stack: list[tuple[int, int, Lanes]] = [(0, end, None)]
        while stack:
            number, stop, lanes = stack.pop()
            if number == stop:
                continue
            taken, after = self.block(kernel.blocks[number], lanes), kernel.after(number)
            if len(after) == 1 or not taken.any():
                stack.append((after[-1], stop, lanes))
            elif (taken if lanes is None else taken | ~lanes).all():
                stack.append((after[0], stop, lanes))
            else:
                meeting = kernel.meetings[number]
                stack.append((meeting, stop, lanes))
                stack.append((after[1], meeting, ~taken if lanes is None else lanes & ~taken))
                stack.append((after[0], meeting, taken))
        self.counts.fetched += len(np.unique(np.concatenate(self.seen))) if self.seen else 0

    def block(self, instructions: list[Instruction], lanes: Lanes) -> Any:
        """Runs a block; returns who takes the branch at its end, of the lanes that are there."""
        self.here = self.everyone if lanes is None else self.warps(lanes).any(1)
        self.counts.instructions += int(self.here.sum()) * len(instructions)
        for instruction in instructions:
            some = lanes
            if instruction.guard is not None:
                predicate, negated = instruction.guard
                some = self.read(predicate) ^ negated
                some = some if lanes is None else some & lanes
            if instruction.run is None:
                return some
            try:
                instruction.run(self, some)
            except (Fault, ArithmeticError, IndexError, ValueError) as error:
                raise Fault(f"{self.kernel.name}, {instruction.line}, {instruction.text}: {error}") from error
        return None

    def access(
        self,
        space: str,
        what: str,
        addresses: Array,
        dtype: np.dtype,
        vector: int,
        lanes: Lanes,
        values: Sequence[Array] = (),
    ) -> list[Array]:
        """Loads a vector of each lane, stores it or adds it; returns what was loaded, 0 where no lane is."""
        size = dtype.itemsize * vector
        alone = what != "load" or space == "shared"  # each thread for itself, not once for those alike
        shape = self.shape
        if not alone:
            shape = np.broadcast_shapes(addresses.shape, () if lanes is None else lanes.shape)
        self.measure(space, what, addresses, size, lanes)
        active = None if lanes is None else np.broadcast_to(lanes, shape).ravel()
        if active is not None and not active.any():
            return [np.zeros((1, 1), dtype)] * vector
        chosen = np.broadcast_to(addresses, shape).ravel()
        chosen = chosen if active is None else chosen[active]
        if (chosen % np.uint64(size)).any():
            raise Fault(f"misaligned, at {chosen[chosen % np.uint64(size) != 0][0]:#x}")
        given = [np.broadcast_to(value, shape).ravel() for value in values]
        given = given if active is None else [value[active] for value in given]
        results = [np.zeros(len(chosen), dtype) for _ in range(vector)]
        if space == "shared":
            program = np.broadcast_to(np.arange(shape[0])[:, None], shape).ravel()
            offsets = chosen.astype(np.int64) - SHARED
            if (offsets < 0).any() or (offsets + size > self.kernel.shared).any():
                raise Fault("outside shared memory")
            offsets = offsets + self.kernel.shared * (program if active is None else program[active])
            _move(self.shared, offsets, slice(None), what, dtype, given, results)
        else:
            for buffer, which, offsets in self.memory.find(chosen, size):
                _move(buffer.data, offsets, which, what, dtype, given, results)
        if active is None:
            return [result.reshape(shape) for result in results]
        spread = [np.zeros(len(active), dtype) for _ in results]
        for whole, result in zip(spread, results):
            whole[active] = result
        return [whole.reshape(shape) for whole in spread]

    def measure(self, space: str, what: str, addresses: Array, size: int, lanes: Lanes) -> None:
        places = self.warps(addresses.astype(np.int64))
        asking: Any = self.here
        if lanes is not None:
            here = self.warps(lanes)
            asking = here.any(1)
            places, here = places[asking], here[asking]
            first = places[np.arange(len(places)), here.argmax(1)]
            places = np.where(here, places, first[:, None])
        if space == "shared":
            self.counts.exchanges += int(wavefronts(places, size, WORD).sum())
            return
        traffic = self.counts.traffic[what.split()[0]]
        sectors, new = traffic.add(places, size)
        idle = int((self.here & ~asking).sum())
        traffic.idle += idle
        traffic.wavefronts += idle
        if what == "load":
            program = np.flatnonzero(asking) // (self.shape[1] // WARP)
            self.seen.append((sectors | program[:, None] << 48)[new])  # 48 bits hold a sector's number


def _move(
    data: Array,
    offsets: Array,
    which: Any,
    what: str,
    dtype: np.dtype,
    given: list[Array],
    results: list[Array],
) -> None:
    """One vector a lane between registers and the bytes ``data``."""
    elements = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    index = offsets // dtype.itemsize
    for k, result in enumerate(results):
        if what == "load":
            result[which] = elements[index + k]
        elif what == "store":
            elements[index + k] = given[k][which]
        elif what == "add bf16":
            for at, value in zip(index + k, widened(given[k][which], "bf16")):
                elements[at] = narrowed(widened(elements[at : at + 1], "bf16") + value, "bf16")[0]
        else:
            np.add.at(elements, index + k, given[k][which])


def execute(
    kernel: Kernel,
    programs: int | Sequence[int],
    values: Sequence[np.generic],
    memory: Memory,
    lanes: int = 8192,
) -> Counts:
    """Runs programs (their number, or the numbers of some), about ``lanes`` threads at a time.

    ``values``: of the parameters in order, of their width.
    """
    if [np.dtype(type(value)).itemsize * 8 for value in values] != [int(bits) for bits, _ in kernel.params]:
        raise Fault(f"{[type(value).__name__ for value in values]} for the parameters {kernel.params}")
    params = {name: np.array([[value]]) for (_, name), value in zip(kernel.params, values)}
    numbers, counts = np.arange(programs) if isinstance(programs, int) else np.asarray(programs), Counts()
    step = max(1, lanes // kernel.threads)
    with np.errstate(all="ignore"):
        for start in range(0, len(numbers), step):
            Batch(kernel, memory, params, numbers[start : start + step], counts).run()
    counts.programs = len(numbers)
    return counts
