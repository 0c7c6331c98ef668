"""Additions of sm_90: tensor maps and their copies, mbarriers, products of warp groups (wgmma).

Everything asynchronous happens as late as it may. A box lands when its barrier is waited for; the
registers of a product may not be touched, nor what it reads overwritten, before its group is waited
for. What threads wrote themselves needs a proxy fence before a product may read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import formats
from .ampere import accumulator, fragment, product, spread
from .machine import Array, Block, Mask, Unsupported, handles
from .memory import EVERYBODY, NOBODY, SEVERAL, WARP, Fault, Region, since_barrier
from .parse import Instruction, Vector

CHUNK = 16  # bytes that a swizzle moves as one
GROUP = 4 * WARP


@dataclass
class TensorMap:
    """A matrix in global memory, copied in boxes.

    Attributes:
        region: Where it is.
        shape: Rows and columns.
        stride: Elements from row to row.
        box: Rows and columns of a copy.
        size: Bytes of an element.
        width: Bytes over which 16-byte chunks are swizzled in shared memory: 0, 32, 64 or 128.
    """

    region: Region
    shape: tuple[int, int]
    stride: int
    box: tuple[int, int]
    size: int
    width: int


@dataclass
class Barrier:
    """An mbarrier: `phase` has ended so often; `missing` arrivals and `bytes` end the next."""

    count: int
    missing: int
    epoch: int
    owner: int
    bytes: int = 0
    phase: int = 0
    copies: list[tuple[Array, Array]] = field(default_factory=list)
    arrivals: list[list[Any]] = field(default_factory=list)  # of sm_100's products under way


def swizzled(address: Array, width: int) -> Array:
    """Chunks change places within rows of 128 bytes (two of 64, four of 32)."""
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[width]
    return address ^ ((address >> 7 & bits) << 4)


@handles("elect.sync")
def _elect(b: Block, i: Instruction, mask: Mask) -> None:
    lane, chosen = i.operands[0].items
    b.write(lane, np.zeros(b.threads, np.uint32), mask)
    b.write(chosen, b.tid % WARP == 0, mask)


@handles("fence.proxy.async")
def _proxy_fence(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "reach the fence")
    b.note("fence", b.tid, 2, b.tid, False)
    b.shared.generic[:] = False


# Barriers in memory


def each(b: Block, address: Array, mask: Mask) -> list[tuple[int, int]]:
    """The address and number of every thread of the mask."""
    return [(int(address[t]), int(t)) for t in b.active(mask)]


def barrier_at(b: Block, address: int, thread: int | None) -> Barrier:
    threads = b.tid if thread is None else np.array([thread])
    b.note("shared", np.full(len(threads), address), 8, threads, False)
    if address not in b.barriers:
        raise Fault(f"no barrier was initialized at {address:#x}")
    barrier: Barrier = b.barriers[address]
    if since_barrier(barrier.epoch, b.epoch) and barrier.owner != thread:
        raise Fault("a barrier is used by another thread than initialized it, no bar.sync between")
    return barrier


@handles("mbarrier.init")
def _init(b: Block, i: Instruction, mask: Mask) -> None:
    for address, thread in each(b, b.address(i.operands[0]), mask):
        count = int(b.read(i.operands[1], "u32")[thread])
        b.note("shared", np.array([address]), 8, thread, True)
        index = b.shared.index(np.array([address]), 8)
        b.shared.check_write(index, np.array([thread]), b.epoch, "a barrier")
        b.barriers[address] = Barrier(count, count, b.epoch, thread)


@handles("mbarrier.inval")
def _invalidate(b: Block, i: Instruction, mask: Mask) -> None:
    for address, thread in each(b, b.address(i.operands[0]), mask):
        barrier = barrier_at(b, address, thread)
        if barrier.copies or barrier.arrivals:
            raise Fault("a barrier is invalidated while copies or products are under way")
        b.note("shared", np.array([address]), 8, thread, True)
        index = b.shared.index(np.array([address]), 8)
        b.shared.check_write(index, np.array([thread]), b.epoch, "the end of a barrier")
        del b.barriers[address]


@handles("mbarrier.arrive.expect_tx")
def _expect(b: Block, i: Instruction, mask: Mask) -> None:
    address, count = i.operands[-2:]
    for place, thread in each(b, b.address(address), mask):
        barrier = barrier_at(b, place, thread)
        barrier.bytes += int(b.read(count, "u32")[thread])
        barrier.missing -= 1
        if barrier.missing < 0:
            raise Fault("more arrivals at a barrier than it counts")


@handles("mbarrier.try_wait.parity")
def _try_wait(b: Block, i: Instruction, mask: Mask) -> None:
    """True once the phase of this parity is over; the copies and products that end it land now."""
    b.all(mask, "wait at the barrier")
    done, address, parity = i.operands
    places = b.address(address)
    if (places != places[0]).any():
        raise Unsupported("threads that wait at several barriers")
    barrier = barrier_at(b, int(places[0]), None)
    if barrier.phase % 2 == b.number(parity):
        on_the_way = sum(values.size for _, values in barrier.copies)
        if barrier.missing > len(barrier.arrivals) or on_the_way < barrier.bytes:
            raise Fault("a wait without end: too few arrivals or bytes are on the way")
        if on_the_way > barrier.bytes:
            raise Fault("more bytes arrive at a barrier than were announced")
        for index, values in barrier.copies:
            b.shared.end_copy(index, values, NOBODY, -1)  # all that wait see it
            b.shared.generic[index] = False
            b.landed(index, EVERYBODY, True)
        for products in barrier.arrivals:
            b.tensor.finish(b, products)
        barrier.copies, barrier.bytes, barrier.arrivals = [], 0, []
        barrier.missing = barrier.count
        barrier.phase += 1
    index = b.shared.index(places[:1], 8)
    b.shared.reader[index], b.shared.read[index] = SEVERAL, b.epoch
    b.write(done, np.ones(b.threads, bool), None)


@handles("cp.async.bulk.tensor.2d.shared.global.mbarrier::complete_tx::bytes")
def _tensor_copy(b: Block, i: Instruction, mask: Mask) -> None:
    """A box of a matrix to shared memory, zeros where the box leaves the matrix."""
    target, source, barrier = i.operands
    maps = b.read(source.base, "b64")
    columns, rows = (b.read(c, "s32") for c in source.coordinates)
    targets, barriers = b.address(target), b.address(barrier)
    for t in b.active(mask):
        tensor: TensorMap = b.memory.maps[int(maps[t])]
        y = np.arange(tensor.box[0]) + int(rows[t])
        x = np.arange(tensor.box[1]) + int(columns[t])
        inside = ((y >= 0) & (y < tensor.shape[0]))[:, None] & ((x >= 0) & (x < tensor.shape[1]))
        offsets = (y[:, None] * tensor.stride + x[None, :])[inside]
        values = np.zeros((*tensor.box, tensor.size), np.uint8)
        addresses = tensor.region.base + offsets * tensor.size
        if len(addresses):
            values[inside] = b.load("global", addresses, tensor.size, np.full(len(offsets), t))
        base = int(targets[t])
        if base % (128 if tensor.width < 64 else 8 * tensor.width):
            raise Fault(f"a box swizzled over {tensor.width} bytes starts at {base:#x}")
        places = swizzled(np.arange(base, base + values.size, CHUNK), tensor.width)
        b.note("shared", places, CHUNK, -1, True)
        index = b.shared.begin_copy(places, CHUNK, np.full(len(places), t), b.epoch)
        if b.shared.generic[index].any():
            raise Fault("a box lands on what threads wrote, without a proxy fence between")
        copies = barrier_at(b, int(barriers[t]), int(t)).copies
        copies.append((index, values.reshape(-1, CHUNK)))


# Products of a warp group


@dataclass
class Product:
    """Reads and writes of a product under way: registers, granules of shared memory."""

    results: list[str]
    operands: list[str]
    reads: list[Array] = field(default_factory=list)


@handles("wgmma.fence")
def _fence(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "reach the fence")
    b.touched, b.fenced = set(), True


@handles("wgmma.commit_group")
def _commit(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "commit their products")
    b.product_groups.append(b.products)
    b.products, b.fenced = [], False


@handles("wgmma.wait_group")
def _wait(b: Block, i: Instruction, mask: Mask) -> None:
    """Releases the products' operands after the next barrier: every warp waits for itself."""
    b.all(mask, "wait for their products")
    n = max(0, len(b.product_groups) - int(i.operands[0].text))
    done, b.product_groups = b.product_groups[:n], b.product_groups[n:]
    for index in (index for group in done for one in group for index in one.reads):
        b.shared.busy[index] -= 1
        b.landed(index, -1, False)
        b.shared.reader[index], b.shared.read[index] = SEVERAL, b.epoch
    left = [p for group in [*b.product_groups, b.products] for p in group]
    b.results = {name for p in left for name in p.results}
    b.operands = {name for p in left for name in p.operands}


@handles("wgmma.mma_async.sync.aligned")
def _wgmma(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "take part in the product")
    shape, kind = i.parts[4], i.parts[-1]
    columns, depth = (int(size) for size in shape.partition("n")[2].split("k"))
    d, left, right, adds, *rest = i.operands
    if rest[0].text != "1" or rest[1].text != "1":
        raise Unsupported("a negated operand")
    transposed = [item.text == "1" for item in rest[2:]]
    made = Product([item.name for item in d.items], [])
    groups = b.threads // GROUP
    if isinstance(left, Vector):
        made.operands = [item.name for item in left.items]
        _need_fence(b, made.operands)
        fenced, b.touched = b.touched, None  # a product's own access asks for no fence
        A = fragment([b.read(item, "b32") for item in left.items], kind).reshape(groups, 64, depth)
        b.touched = fenced
    else:
        turned = len(transposed) == 2 and transposed[0]
        A = _matrices(b, left, 64, depth, kind, turned, made)
    B = _matrices(b, right, columns, depth, kind, bool(transposed and transposed[-1]), made)
    # Products may follow one another in one accumulator; what else wrote it is fenced. One that
    # the product does not read (scale-d is false) needs no fence: LLVM sets such to zero behind it.
    under_way = [one for group in [*b.product_groups, b.products] for one in group]
    follows = any(one.results == made.results for one in under_way)
    if not follows and b.results & set(made.results):
        raise Fault("a product writes registers of another one of another shape")
    before: Array | float = 0.0
    if b.number(adds, "pred"):
        if not follows:
            _need_fence(b, made.results)
        before = accumulator([b.registers[name].view(np.float32) for name in made.results])
        before = before.reshape(groups, 64, columns)
    D = product(A, B, before).reshape(-1, 16, columns)
    for name, value in zip(made.results, spread(D), strict=True):
        b.registers[name] = value.view(np.uint32)
    b.products.append(made)
    b.results.update(made.results)
    b.operands.update(made.operands)


def _need_fence(b: Block, names: list[str]) -> None:
    assert b.touched is not None
    if late := b.touched & set(names):
        raise Fault(f"{min(late)} was accessed since the last wgmma.fence")


def _matrices(
    b: Block, operand: Any, rows: int, depth: int, kind: str, transposed: bool, made: Product
) -> Array:
    """`[groups, rows, depth]` of the matrix descriptor of every warp group."""
    descriptors = b.read(operand, "b64").reshape(-1, GROUP)
    if (descriptors != descriptors[:, :1]).any():
        raise Fault("a warp group's threads give different descriptors")
    found = []
    for bits in descriptors[:, 0].tolist():
        width = {0: 0, 1: 128, 2: 64, 3: 32}[bits >> 62]
        found.append(shared_matrix(b, bits, width, rows, depth, kind, transposed, made.reads))
    return np.stack(found)


def shared_matrix(
    b: Block,
    descriptor: int,
    width: int,
    rows: int,
    depth: int,
    kind: str,
    transposed: bool,
    reads: list[Array],
) -> Array:
    """The matrix `[rows, depth]` that a product reads from shared memory, swizzled over `width`.

    Its granules are busy from now on, and join `reads`. Transposed: rows are neighbors in memory.
    """
    if not width or descriptor >> 49 & 7:
        raise Unsupported(f"matrix descriptor {descriptor:#x}")
    size = 4 if kind == "tf32" else 2
    start, leading, stride = (16 * (descriptor >> at & 0x3FFF) for at in (0, 16, 32))
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:
        chunk = width // size
        address = row // chunk * leading + k // 8 * stride + k % 8 * width + row % chunk * size
    else:
        address = row // 8 * stride + row % 8 * width + k * size
    shared = b.shared
    places = swizzled(start + address, width).ravel()
    b.note("shared", places, size, -1, False)
    index = shared.index(places, size)
    if shared.pending[index].any():
        raise Fault("a product reads where an asynchronous copy is under way")
    if not shared.valid[index].all():
        raise Fault("a product reads what was never written")
    if shared.generic[index].any():
        raise Fault("a product reads what threads wrote, without a proxy fence between")
    if since_barrier(shared.written[index], b.epoch).any():
        raise Fault("a product reads what was written since the last barrier")
    shared.busy[index] += 1  # an element has one place, so that no index comes twice
    reads.append(index)
    words = np.ascontiguousarray(shared.words[index]).view(f"u{size}")
    return formats.operand(words, kind).reshape(rows, depth)
