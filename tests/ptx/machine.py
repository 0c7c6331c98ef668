"""Executes a kernel, one block at a time: every instruction for all threads of the block at once.

A register is a NumPy array over the block's threads, unsigned and as wide as the register. Threads
go in lockstep; what another schedule could do is not tried but excluded, by the rules of `memory`.
A branch may part warps, which wait at its target for the others, but not the threads of a warp.

The instructions are in `ampere`, `hopper` and `blackwell`, a handler each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .memory import WARP, WITHIN, Fault, Region, Space
from .parse import Address, Immediate, Instruction, Kernel, Register, Symbol, Vector

Array = NDArray[Any]
Mask = Array | None  # the threads that execute an instruction; None for all
Handler = Callable[["Block", Instruction, Mask], "int | None"]

SHARED_BASE = 1024  # what TMA's swizzle needs; the driver keeps the first KiB for itself, too
TYPES = {
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    **{f"{c}{n}": np.dtype(f"u{n // 8}") for c in "ub" for n in (8, 16, 32, 64)},
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "f16": np.dtype("u2"),
    "bf16": np.dtype("u2"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "f32x2": np.dtype("u8"),
    "pred": np.dtype(bool),
}
# What a masked-off thread's register holds: NaN, and an address in no tensor.
_POISON = {2: 0x7FFF, 4: 0x7FFFDEAD, 8: 0x7FFFDEAD7FFFDEAD}


class Unsupported(Exception):
    """An instruction, or a form of one, that the executor does not know."""


class _Apart(Exception):
    """An instruction for all warps is reached by some, while others are elsewhere."""


_HANDLERS: dict[tuple[str, ...], Handler] = {}


def handles(*opcodes: str) -> Callable[[Handler], Handler]:
    """Registers a handler for all opcodes that begin so; the longest beginning decides."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update((tuple(opcode.split(".")), handler) for opcode in opcodes)
        return handler

    return register


@functools.cache
def handler_of(parts: tuple[str, ...]) -> Handler | None:
    beginnings = (parts[:n] for n in range(len(parts), 0, -1))
    return next((_HANDLERS[part] for part in beginnings if part in _HANDLERS), None)


class Access(NamedTuple):
    """Accesses of an instruction.

    Attributes:
        line: Of the PTX.
        space: `"global"`, `"shared"`, `"tensor"`; `"landing"` where what is asynchronous ends,
            `"barrier"` for a barrier of the block, its beginning and its end; `"fence"` for a
            proxy fence.
        address: Where, one for each of `threads`.
        size: Bytes (in tensor memory each address is two).
        threads: Their numbers; -1 for what runs asynchronously, `EVERYBODY` for its end where all
            threads wait for that.
        write: Whether it writes.
    """

    line: int
    space: str
    address: Array
    size: int
    threads: Array | int
    write: bool


class Program:
    """A kernel with its handlers looked up, ready to run the blocks of a grid.

    Args:
        kernel: As parsed.
        shared: Bytes of shared memory.
        watch: Called with each `Access` before it is made.

    Raises:
        Unsupported: An opcode that no handler knows.
    """

    def __init__(
        self, kernel: Kernel, shared: int, watch: Callable[[Access], None] | None = None
    ) -> None:
        self.kernel, self.shared, self.watch = kernel, shared, watch
        self.executed: set[int] = set()  # lines
        self.instructions = 0
        for instruction in kernel.code:
            instruction.run = handler_of(instruction.parts)
            if instruction.run is None:
                raise Unsupported(
                    f"{kernel.name}, line {instruction.line}: no handler for "
                    f"{instruction.op}; write one in tests/ptx/ampere.py, or in hopper.py or "
                    f"blackwell.py what only sm_90 or sm_100 has ({instruction.text})"
                )
        self.granule = min((_granule(one) for one in kernel.code), default=4)

    def uses(self, opcode: str) -> bool:
        return any(one.parts[0] == opcode for one in self.kernel.code)

    def run(self, block: int, grid: int, parameters: dict[str, Any], memory: Space) -> None:
        """Runs one block of a grid.

        Raises:
            Fault: With kernel, block, the line of PTX and that of Python.
        """
        Block(self, block, grid, parameters, memory).run()


def _granule(instruction: Instruction) -> int:
    """The bytes of the smallest element that an instruction accesses in shared memory."""
    parts = instruction.parts
    if parts[0] in ("ldmatrix", "stmatrix", "wgmma", "tcgen05"):
        return 4 if "tf32" in instruction.op else 2
    if parts[0] in ("ld", "st") and "shared" in parts[1]:
        return TYPES[parts[-1]].itemsize
    return 4


class Block:
    """The state of one thread block, and what handlers ask of it.

    Attributes:
        epoch: See `memory`.
        line: The line of the instruction that runs.
        here: The threads at this line; None for all. Others are `parked` at theirs, to go on from
            there, or `waiting` there for the rest of the block.
        copies, groups: `cp.async` not yet committed, and committed but not waited for.
        barriers: sm_90's mbarriers, by address.
        products, product_groups: Products under way, not yet committed, and committed.
        results, operands: The registers that these write and read.
        touched: The registers accessed since the last `wgmma.fence`; None without wgmma.
        fenced: Whether there was one since the last products were committed.
        tensor: sm_100's tensor memory.
    """

    def __init__(
        self, program: Program, block: int, grid: int, parameters: dict[str, Any], memory: Space
    ) -> None:
        self.program, self.block = program, block
        self.parameters, self.memory = parameters, memory
        self.threads = program.kernel.threads
        self.tid = np.arange(self.threads)
        zero = np.zeros(self.threads, np.uint32)
        self.registers: dict[str, Array] = {
            "%tid.x": self.tid.astype(np.uint32),
            "%ctaid.x": zero + np.uint32(block),
            "%nctaid.x": zero + np.uint32(grid),
        }
        self.constants: dict[tuple[str, str], Array] = {}
        words = np.zeros(program.shared // program.granule, f"u{program.granule}")
        self.shared = Region("shared memory", SHARED_BASE, words, False)
        self.epoch = self.line = 0
        self.here: Mask = None
        self.parked: dict[int, Array] = {}
        self.waiting: dict[int, Array] = {}
        self.copies: list[Any] = []
        self.groups: list[list[Any]] = []
        self.barriers: dict[int, Any] = {}
        self.products: list[Any] = []
        self.product_groups: list[list[Any]] = []
        self.results: set[str] = set()
        self.operands: set[str] = set()
        self.touched: set[str] | None = set() if program.uses("wgmma") else None
        self.fenced = False
        self.tensor: Any = None
        if program.uses("tcgen05"):
            from .blackwell import TensorMemory

            self.tensor = TensorMemory()

    def run(self) -> None:
        code, pc = self.program.kernel.code, 0
        self.note("barrier", self.tid, 2, self.tid, False)  # nothing lies between two blocks
        while pc < len(code):
            if self.here is not None:
                pc = self._meet(pc)
            instruction = code[pc]
            self.line = instruction.line
            self.program.executed.add(instruction.line)
            self.program.instructions += 1
            try:
                assert instruction.run is not None
                after = instruction.run(self, instruction, self.mask(instruction))
            except _Apart:
                assert self.here is not None
                self._park(self.waiting, pc, self.here)
                after = min(self.parked)
                self.here = self.parked.pop(after)
            except (Fault, Unsupported) as error:
                where = f"{self.program.kernel.name}, block {self.block}, line {instruction.line}"
                text = f"{error} [{where}: {instruction.text}; {instruction.source}]"
                raise type(error)(text) from None
            pc = pc + 1 if after is None else after
        self.note("barrier", self.tid, 2, self.tid, False)
        self._end()

    def _meet(self, pc: int) -> int:
        """Goes on with the warps that are furthest behind, and all that are at the same place."""
        assert self.here is not None
        self._park(self.parked, pc, self.here)
        pc = min(self.parked)
        here = self.parked.pop(pc) | self.waiting.pop(pc, False)
        self.here = None if here.all() else here
        return pc

    def _park(self, places: dict[int, Array], pc: int, warps: Array) -> None:
        places[pc] = warps | places.get(pc, False)

    def _end(self) -> None:
        under_way = {
            "asynchronous copies are": [*self.copies, *(c for g in self.groups for c in g)],
            "copies of boxes are": [c for one in self.barriers.values() for c in one.copies],
            "products are": [*self.products, *(p for g in self.product_groups for p in g)],
            "columns of tensor memory are": self.tensor is not None and self.tensor.allocated,
        }
        for what, left in under_way.items():
            if left:
                end = "never given back" if "memory" in what else "never waited for"
                raise Fault(f"{what} {end} [{self.program.kernel.name}, block {self.block}]")

    # Operands

    def mask(self, instruction: Instruction) -> Mask:
        mask = self.here
        if instruction.guard is not None:
            guard = self.read(instruction.guard, "pred") ^ instruction.negated
            mask = guard if mask is None else mask & guard
        return None if mask is None or mask.all() else mask

    def read(self, operand: Any, kind: str) -> Array:
        """The operand's values as a type; of a wider register the low bits."""
        dtype = TYPES[kind]
        if isinstance(operand, Register):
            value = self.registers.get(operand.name)
            if value is None:
                raise Fault(f"register {operand.name} is read before it is written")
            if operand.name in self.results:
                raise Fault(f"{operand.name} is read before its product is waited for")
            if self.touched is not None:
                self.touched.add(operand.name)
            if value.dtype.itemsize > dtype.itemsize:
                value = value.astype(f"u{dtype.itemsize}")
            elif value.dtype.itemsize < dtype.itemsize:
                raise Unsupported(f"{operand.name} of {operand.bits} bits read as {kind}")
            return value.view(dtype)
        if isinstance(operand, Immediate):
            key = operand.text, kind
            if key not in self.constants:
                self.constants[key] = np.full(self.threads, _number(operand.text, dtype))
            return self.constants[key]
        if isinstance(operand, Symbol) and operand.name == "global_smem":
            return np.full(self.threads, SHARED_BASE, dtype)
        if isinstance(operand, Symbol) and operand.name in self.parameters:  # a tensor map
            return np.full(self.threads, self.parameters[operand.name], dtype)
        raise Unsupported(f"operand {operand}")

    def knows(self, operand: Any) -> bool:
        """True where an operand has a value; a register that was never written has none."""
        return not isinstance(operand, Register) or operand.name in self.registers

    def poison(self, kind: str) -> Array:
        """The stand-in for an undefined value."""
        return np.full(self.threads, _POISON[TYPES[kind].itemsize], TYPES[kind])

    def number(self, operand: Any, kind: str = "u32") -> int:
        """The value of an operand that is the same for all threads."""
        values = self.read(operand, kind)
        if (values != values[0]).any():
            raise Unsupported("an operand that differs between threads")
        return int(values[0])

    def write(self, register: Any, value: Array, mask: Mask) -> None:
        """Writes a register; a value narrower than it is extended by its sign, or by zeros."""
        name = register.name
        if name == "_":
            return
        if name in self.results or name in self.operands:
            raise Fault(f"{name} is written while a product under way uses it")
        if self.touched is not None:
            self.touched.add(name)
        size = value.dtype.itemsize
        if value.dtype != bool and 8 * size < register.bits:
            size = register.bits // 8
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{size}")
        bits = value if value.dtype == bool else np.ascontiguousarray(value).view(f"u{size}")
        if mask is not None:
            before = self.registers.get(name)
            if before is None:
                before = np.full(self.threads, _POISON.get(bits.itemsize, 0), bits.dtype)
            bits = np.where(mask, bits, before)
        self.registers[name] = bits

    def address(self, operand: Address) -> Array:
        """Byte addresses, `[threads]` int64."""
        if isinstance(operand.base, Symbol):
            return np.full(self.threads, SHARED_BASE + operand.offset, np.int64)
        kind = f"b{operand.base.bits}"
        return self.read(operand.base, kind).astype(np.int64) + operand.offset

    def active(self, mask: Mask) -> Array:
        """The numbers of the threads in a mask."""
        return self.tid if mask is None else np.flatnonzero(mask)

    def all(self, mask: Mask, what: str) -> None:
        """Faults unless all threads of the block execute the instruction; warps wait for others."""
        if self.here is not None and self.parked:
            raise _Apart
        if mask is not None:
            code = self.program.kernel.code
            others = "".join(f"; some wait at line {code[pc].line}" for pc in self.waiting)
            raise Fault(f"not all threads {what}{others}")

    # Memory

    def note(
        self, space: str, address: Array, size: int, threads: Array | int, write: bool
    ) -> None:
        """Tells the program's watcher of an access; thread -1 is the hardware."""
        if self.program.watch:
            self.program.watch(Access(self.line, space, address, size, threads, write))

    def landed(self, index: Array, threads: Array | int, write: bool) -> None:
        """Tells the watcher that an asynchronous access of granules in shared memory has ended."""
        address = self.shared.base + index * self.shared.granule
        owners = np.broadcast_to(threads, address.shape).ravel()
        self.note("landing", address.ravel(), self.shared.granule, owners, write)

    def load(self, space: str, address: Array, size: int, threads: Array) -> Array:
        """The bytes `[threads, size]` at an address for each."""
        self.note(space, address, size, threads, False)
        if space == "shared":
            return self.shared.load(address, size, threads, self.epoch)
        return self.memory.load(address, size, threads, self.epoch, self.block)

    def store(self, space: str, address: Array, values: Array, threads: Array) -> None:
        self.note(space, address, values.shape[1], threads, True)
        if space == "shared":
            self.shared.store(address, values, threads, self.epoch)
        else:
            self.memory.store(address, values, threads, self.epoch, self.block)

    def next_epoch(self) -> None:
        """A barrier of the block."""
        self.note("barrier", self.tid, 2, self.tid, False)
        self.epoch = (self.epoch >> WITHIN) + 1 << WITHIN


def registers(operand: Any) -> tuple[Any, ...]:
    """The items of a vector, or the operand itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def by_warp(mask: Array) -> Array:
    return mask.reshape(-1, WARP)


def _number(text: str, dtype: np.dtype[Any]) -> Any:
    floating = text[:2].lower() in ("0f", "0d")
    value = int(text[2:], 16) if floating else int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return value != 0
    bits = value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)
