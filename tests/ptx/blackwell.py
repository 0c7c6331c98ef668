"""Additions of sm_100: tensor memory, and products that one thread starts for the block (tcgen05).

A product ends when the barrier that it was committed to is waited for. Until then nothing may touch
its result, nor overwrite what it reads. What `tcgen05.ld` loads may be used at once (register
dependencies are respected); the tensor memory that it reads may not be reused before `wait::ld`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import formats
from .ampere import product
from .hopper import barrier_at, each, shared_matrix
from .machine import Array, Block, Mask, Unsupported, handles
from .memory import EVERYBODY, WARP, Fault, since_barrier
from .parse import Address, Instruction

LANES, COLUMNS = 128, 512
Cells = tuple[Array, ...]


@handles("fma.rn.f32.f16", "fma.rn.f32.bf16")
def _mixed_fma(b: Block, i: Instruction, mask: Mask) -> None:
    """`x * y + z` in float32, of which x and y have 16 bits; rounded once."""
    kind, (d, *sources) = i.parts[-1], i.operands
    types = kind, kind, "f32"
    x, y, z = (formats.lanes(b.read(s, t), t) for s, t in zip(sources, types, strict=True))
    with np.errstate(all="ignore"):
        b.write(d, formats.pack(formats.odd_sum(x * y, z), "f32"), mask)


class TensorMemory:
    """128 lanes of 512 words.

    Attributes:
        words: The contents.
        valid: What has been written.
        making, reading: How many products under way write and read it.
        storing, loading: Stored and loaded, and not yet waited for.
        stored, loaded: The epochs of the waits for that.
        allocated: Columns.
    """

    def __init__(self) -> None:
        shape = (LANES, COLUMNS)
        self.words = np.zeros(shape, np.uint32)
        self.valid = np.zeros(shape, bool)
        self.making, self.reading = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.storing, self.loading = np.zeros(shape, bool), np.zeros(shape, bool)
        self.stored, self.loaded = np.full(shape, -1), np.full(shape, -1)
        self.allocated = 0

    def finish(self, b: Block, products: list[Product]) -> None:
        """All threads know the products done, so that what they read may be overwritten."""
        for one in products:
            self.making[one.result] -= 1
            for cells in one.cells:
                self.reading[cells] -= 1
            for index in one.reads:
                b.shared.busy[index] -= 1
                b.landed(index, EVERYBODY, False)

    def waited(self, cells: Cells, what: str, writes: bool = True) -> None:
        """Faults if a store to these cells, or a load that a write would spoil, is under way."""
        if writes and self.loading[cells].any():
            raise Fault(f"{what} tensor memory before the load from it is waited for")
        if self.storing[cells].any():
            raise Fault(f"{what} tensor memory before the store to it is waited for")


@dataclass
class Product:
    """Reads and writes of a product under way."""

    result: Cells
    cells: list[Cells] = field(default_factory=list)
    reads: list[Array] = field(default_factory=list)


@handles("tcgen05.alloc")
def _alloc(b: Block, i: Instruction, mask: Mask) -> None:
    """Writes the first column's address; only one allocation at a time is known here."""
    if b.tensor.allocated:
        raise Unsupported("a second allocation of tensor memory")
    b.tensor.allocated = int(i.operands[1].text)
    if b.tensor.allocated > COLUMNS:
        raise Fault("tensor memory: more columns than there are")
    thread = b.active(mask)[:1]
    address = b.address(i.operands[0])[thread]
    b.note("shared", address, 4, -1, True)
    b.shared.store(address, np.zeros((1, 4), np.uint8), thread, b.epoch)
    b.shared.generic[b.shared.index(address, 4)] = False  # the hardware's write, no thread's


@handles("tcgen05.dealloc")
def _dealloc(b: Block, i: Instruction, mask: Mask) -> None:
    everything = np.ix_(np.arange(LANES), np.arange(COLUMNS))
    b.tensor.waited(everything, "dealloc of")
    if b.tensor.making.any() or b.tensor.reading.any():
        raise Fault("tensor memory is given back while a product uses it")
    if since_barrier(b.tensor.loaded, b.epoch).any():
        raise Fault("tensor memory is given back, loaded since the last barrier")
    b.tensor.allocated -= int(i.operands[1].text)


@handles("tcgen05.relinquish_alloc_permit")
def _relinquish(b: Block, i: Instruction, mask: Mask) -> None:
    pass


def _cells(b: Block, i: Instruction, address: Array, split: Any, threads: Array) -> Cells:
    """Lane and column `[threads, registers]` of each thread's words."""
    count = int(next(part for part in i.parts if part[0] == "x")[1:])
    lane, first = address[threads] >> 16, address[threads] & 0xFFFF
    offset = lane - threads // WARP % 4 * WARP  # half of a warp's lanes may be the upper half
    if not np.isin(offset, (0, 16) if "16x32bx2" in i.parts else (0,)).all():
        raise Fault("a warp reaches for tensor memory lanes that are not its own")
    within = threads % WARP
    if "32x32b" in i.parts:
        lane = lane + within
    elif "16x32bx2" in i.parts:
        lane, first = lane + within % 16, first + within // 16 * int(split[0].text)
    else:
        raise Unsupported("a shape of tensor memory")
    columns = first[:, None] + np.arange(count)
    if (columns >= b.tensor.allocated).any():
        raise Fault("tensor memory: a column that was not allocated")
    lanes = np.broadcast_to(lane[:, None], columns.shape)
    owners = np.broadcast_to(threads[:, None], columns.shape).ravel()
    b.note("tensor", (2 * (lanes * COLUMNS + columns)).ravel(), 2, owners, i.parts[1] == "st")
    return lanes, columns


@handles("tcgen05.ld.sync.aligned")
def _load(b: Block, i: Instruction, mask: Mask) -> None:
    d, address, *split = i.operands
    threads = b.active(mask)
    if not len(threads):
        return
    cells = _cells(b, i, b.address(address), split, threads)
    t = b.tensor
    if t.making[cells].any():
        raise Fault("the result of a product under way is loaded")
    if not t.valid[cells].all():
        raise Fault("tensor memory is loaded where nothing was written")
    if t.storing[cells].any():
        raise Fault("tensor memory is loaded before the store to it is waited for")
    t.loading[cells] = True
    values = np.zeros((b.threads, len(d.items)), np.uint32)
    values[threads] = t.words[cells]
    for n, item in enumerate(d.items):
        b.write(item, values[:, n], mask)


@handles("tcgen05.wait::ld")
def _wait_load(b: Block, i: Instruction, mask: Mask) -> None:
    b.tensor.loaded[b.tensor.loading] = b.epoch
    b.tensor.loading[:] = False


@handles("tcgen05.st.sync.aligned")
def _store(b: Block, i: Instruction, mask: Mask) -> None:
    address, *split, source = i.operands
    threads = b.active(mask)
    if not len(threads):
        return
    cells = _cells(b, i, b.address(address), split, threads)
    t = b.tensor
    if t.making[cells].any() or t.reading[cells].any():
        raise Fault("tensor memory is overwritten while a product under way uses it")
    t.waited(cells, "a store to")
    t.words[cells] = np.stack([b.read(item, "b32") for item in source.items], axis=1)[threads]
    t.valid[cells], t.storing[cells] = True, True


@handles("tcgen05.wait::st")
def _wait_store(b: Block, i: Instruction, mask: Mask) -> None:
    b.tensor.stored[b.tensor.storing] = b.epoch
    b.tensor.storing[:] = False


@handles("tcgen05.commit")
def _commit(b: Block, i: Instruction, mask: Mask) -> None:
    """The barrier gets an arrival when all products so far are done."""
    for address, thread in each(b, b.address(i.operands[0]), mask):
        barrier = barrier_at(b, address, thread)
        if barrier.missing == len(barrier.arrivals):
            raise Fault("a second product is committed to a barrier that nobody waited for")
        barrier.arrivals.append(b.products)
        b.products = []


@handles("tcgen05.mma.cta_group::1")
def _mma(b: Block, i: Instruction, mask: Mask) -> None:
    for thread in b.active(mask):
        _start(b, i, int(thread))


def _start(b: Block, i: Instruction, thread: int) -> None:
    d, left, right, descriptor, adds = i.operands
    bits = int(b.read(descriptor, "b32")[thread])
    kind = "tf32" if "kind::tf32" in i.parts else ("f16", "bf16")[bits >> 7 & 7]
    number = 2 if kind == "tf32" else ("f16", "bf16").index(kind)
    # Float32 sums; both operands of the kind; no sparsity, negation or saturation.
    if bits & 0x600F or [bits >> 4 & 3, bits >> 7 & 7, bits >> 10 & 7] != [1, number, number]:
        raise Unsupported(f"instruction descriptor {bits:#x}")
    rows, columns = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
    depth = 8 if kind == "tf32" else 16
    t = b.tensor
    lane, column = _place(b, d, thread)
    lanes = np.arange(rows) if rows == LANES else np.arange(rows) // 16 * 32 + np.arange(rows) % 16
    result = np.ix_(lanes + lane, column + np.arange(columns))
    made = Product(result)
    if isinstance(left, Address):
        lane, column = _place(b, left, thread)
        cells = np.ix_(lanes + lane, column + np.arange(8))  # 32 bits hold two of 16
        _check(b, cells, "reads")
        if t.making[cells].any():
            raise Fault("a product reads the result of another that is under way")
        t.reading[cells] += 1
        made.cells.append(cells)
        words = np.ascontiguousarray(t.words[cells])
        A = formats.operand(words if kind == "tf32" else words.view(np.uint16), kind)
    else:
        A = _matrix(b, left, thread, rows, depth, kind, bool(bits >> 15 & 1), made)
    B = _matrix(b, right, thread, columns, depth, kind, bool(bits >> 16 & 1), made)
    _check(b, result, "writes")
    if t.reading[result].any():
        raise Fault("a product writes what another under way reads")
    before: Array | float = 0.0
    if b.read(adds, "pred")[thread]:
        if not t.valid[result].all():
            raise Fault("a product adds to what was never written")
        before = t.words[result].view(np.float32).astype(np.float64)
    t.words[result], t.valid[result] = product(A, B, before).view(np.uint32), True
    t.making[result] += 1
    b.products.append(made)


def _place(b: Block, operand: Address, thread: int) -> tuple[int, int]:
    address = int(b.address(operand)[thread])
    return address >> 16, address & 0xFFFF


def _check(b: Block, cells: Cells, does: str) -> None:
    """Loads and stores of other threads are waited for, and a barrier is behind the wait."""
    t = b.tensor
    b.note("tensor", (2 * (cells[0] * COLUMNS + cells[1])).ravel(), 2, -1, does == "writes")
    t.waited(cells, f"a product {does}", does == "writes")
    if since_barrier(t.stored[cells], b.epoch).any():
        raise Fault(f"a product {does} tensor memory that was stored since the last barrier")
    if does == "writes" and since_barrier(t.loaded[cells], b.epoch).any():
        raise Fault("a product writes tensor memory that was loaded since the last barrier")


def _matrix(
    b: Block, operand: Any, thread: int, rows: int, depth: int, kind: str, turned: bool,
    made: Product,
) -> Array:  # fmt: skip
    bits = int(b.read(operand, "b64")[thread])
    width = {2: 128, 4: 64, 6: 32}.get(bits >> 61, 0)
    return shared_matrix(b, bits, width, rows, depth, kind, turned, made.reads)
