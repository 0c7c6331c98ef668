"""The instructions of sm_80: arithmetic, branches, loads and stores, cp.async, ldmatrix, mma.sync.

A handler gets the block, the instruction and the threads that execute it. A `cp.async` lands as
late as it may, at the wait for its group: until then its target may not be touched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import formats
from .machine import TYPES, Array, Block, Mask, Unsupported, by_warp, handles, registers
from .memory import WARP, Fault
from .parse import Instruction, Vector

# Integers


def _divide(a: Array, b: Array) -> Array:
    """Truncated, as C's."""
    x, y = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return (np.sign(x) * np.sign(y) * (abs(x) // abs(y))).astype(a.dtype)


def _shift(a: Array, n: Array, left: bool) -> Array:
    """Amounts past the width leave zeros, or the sign."""
    bits = 8 * a.dtype.itemsize
    least = np.minimum(n, bits - 1).astype(a.dtype)
    if left:
        return np.where(n >= bits, 0, a << least).astype(a.dtype)
    return np.where(n >= bits, np.where(a < 0, -1, 0).astype(a.dtype), a >> least)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@handles("add", "sub", "div.s32", "div.u32", "div.s64", "div.u64", "rem", "min", "max")
@handles("and", "or", "xor", "mul.f32", "mul.rn.f32")
def _binary(b: Block, i: Instruction, mask: Mask) -> None:
    name, kind, (d, *sources) = i.parts[0], i.parts[-1], i.operands
    if i.parts[1:-1] not in ((), ("rn",)) or "f16" in kind or "x2" in kind:
        raise Unsupported("a form of this operation")
    x, y = (b.read(source, kind) for source in sources)
    if name in ("div", "rem") and (y[b.active(mask)] == 0).any():
        raise Fault("division by zero")
    with np.errstate(all="ignore"):
        b.write(d, _BINARY[name](x, y), mask)


@handles("mul.lo", "mad.lo")
def _multiply(b: Block, i: Instruction, mask: Mask) -> None:
    kind, (d, *sources) = i.parts[-1], i.operands
    x, y, *z = (b.read(source, kind) for source in sources)
    b.write(d, x * y + z[0] if z else x * y, mask)


@handles("mul.wide", "mad.wide", "mul.hi")
def _multiply_wide(b: Block, i: Instruction, mask: Mask) -> None:
    kind, (d, x, y, *z) = i.parts[-1], i.operands
    bits = int(kind[1:])
    if bits == 64:
        raise Unsupported("a product of 128 bits")
    value = b.read(x, kind).astype(TYPES[f"{kind[0]}{2 * bits}"]) * b.read(y, kind)
    if i.parts[1] == "hi":
        value = (value >> value.dtype.type(bits)).astype(TYPES[kind])
    elif z:
        value = value + b.read(z[0], f"{kind[0]}{2 * bits}")
    b.write(d, value, mask)


@handles("neg", "not", "abs")
def _unary(b: Block, i: Instruction, mask: Mask) -> None:
    function = {"neg": np.negative, "not": np.invert, "abs": np.abs}[i.parts[0]]
    kind = i.parts[-1]
    if "f16" in kind or "x2" in kind:
        values = formats.lanes(b.read(i.operands[1], kind), kind)
        b.write(i.operands[0], formats.pack(function(values), kind), mask)
    else:
        b.write(i.operands[0], function(b.read(i.operands[1], kind)), mask)


@handles("shl", "shr")
def _shifts(b: Block, i: Instruction, mask: Mask) -> None:
    d, x, n = i.operands
    value = _shift(b.read(x, i.parts[-1]), b.read(n, "u32"), left=i.parts[0] == "shl")
    b.write(d, value, mask)


@handles("shf.l.wrap.b32", "shf.r.wrap.b32")
def _funnel(b: Block, i: Instruction, mask: Mask) -> None:
    d, low, high, amount = i.operands
    pair = b.read(high, "u32").astype(np.uint64) << np.uint64(32) | b.read(low, "u32")
    n = b.read(amount, "u32").astype(np.uint64) & np.uint64(31)
    value = pair << n >> np.uint64(32) if i.parts[1] == "l" else pair >> n
    b.write(d, value.astype(np.uint32), mask)


@handles("bfe")
def _field(b: Block, i: Instruction, mask: Mask) -> None:
    kind, (d, x, first, size) = i.parts[-1], i.operands
    bits, n = int(kind[1:]), b.read(size, "u32").astype(np.int64)
    left = bits - n - b.read(first, "u32").astype(np.int64)
    if (n < 1).any() or (left < 0).any():
        raise Unsupported("a field of no bits, or beyond the word")
    value = b.read(x, kind)
    b.write(d, value << left.astype(value.dtype) >> (bits - n).astype(value.dtype), mask)


@handles("bfi.b32")
def _insert(b: Block, i: Instruction, mask: Mask) -> None:
    d, field, into, first, size = i.operands
    at, n = b.read(first, "u32").astype(np.int64), b.read(size, "u32").astype(np.int64)
    where = (1 << n) - 1 << at
    value = b.read(into, "u32").astype(np.int64) & ~where
    value |= b.read(field, "u32").astype(np.int64) << at & where
    b.write(d, value.astype(np.uint32), mask)


@handles("lop3.b32")
def _lookup(b: Block, i: Instruction, mask: Mask) -> None:
    """Any function of three bits, by its table of eight."""
    d, *sources, table = i.operands
    x, y, z = (b.read(source, "b32") for source in sources)
    value = np.zeros_like(x)
    for n in range(8):
        if int(table.text, 0) >> n & 1:
            value |= (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
    b.write(d, value, mask)


@handles("prmt.b32")
def _permute(b: Block, i: Instruction, mask: Mask) -> None:
    """Four of eight bytes; with a selector's high bit the byte's sign instead of the byte."""
    d, x, y, selector = i.operands
    if len(i.parts) > 2:
        raise Unsupported("a mode of prmt")
    pair = np.stack([b.read(x, "b32"), b.read(y, "b32")], axis=1).view(np.uint8)
    selectors = b.read(selector, "b32").astype(np.int64)[:, None] >> np.arange(0, 16, 4)
    value = np.take_along_axis(pair, selectors & 7, axis=1)
    value = np.where(selectors & 8, np.where(value & 0x80, 0xFF, 0), value).astype(np.uint8)
    b.write(d, np.ascontiguousarray(value).view(np.uint32)[:, 0], mask)


_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


@handles(*(f"setp.{name}" for name in _COMPARE))
def _compare(b: Block, i: Instruction, mask: Mask) -> None:
    """Integers and float32; with NaN all but `ne` are false."""
    if len(i.parts) != 3 or "f16" in i.parts[2]:
        raise Unsupported("a form of comparison")
    d, x, y = i.operands
    b.write(d, _COMPARE[i.parts[1]](b.read(x, i.parts[2]), b.read(y, i.parts[2])), mask)


@handles("selp")
def _select(b: Block, i: Instruction, mask: Mask) -> None:
    d, x, y, p = i.operands
    kind = i.parts[-1]
    b.write(d, np.where(b.read(p, "pred"), b.read(x, kind), b.read(y, kind)), mask)


@handles("mov")
def _move(b: Block, i: Instruction, mask: Mask) -> None:
    """Of one register, or of several packed in one."""
    (d, s), kind = i.operands, i.parts[-1]
    size = TYPES[kind].itemsize
    if isinstance(d, Vector):
        value = np.ascontiguousarray(b.read(s, kind))
        parts = value.view(f"u{size // len(d.items)}").reshape(b.threads, -1)
        for n, item in enumerate(d.items):
            b.write(item, parts[:, n], mask)
    elif isinstance(s, Vector):
        # LLVM packs a value with an undefined half that nobody looks at.
        part = f"b{8 * size // len(s.items)}"
        pieces = [b.read(item, part) if b.knows(item) else b.poison(part) for item in s.items]
        b.write(d, np.stack(pieces, axis=1).view(f"u{size}")[:, 0], mask)
    else:
        b.write(d, b.read(s, kind), mask)
        # LLVM copies accumulators behind the fence; ptxas injects another, and says so (C7519).
        if b.touched is not None and b.fenced:
            b.touched.discard(d.name)


@handles("cvta")
def _to_generic(b: Block, i: Instruction, mask: Mask) -> None:
    b.write(i.operands[0], b.read(i.operands[1], i.parts[-1]), mask)


# Floating-point numbers


@handles("cvt")
def _convert(b: Block, i: Instruction, mask: Mask) -> None:
    (to, source), (d, *sources) = i.parts[-2:], i.operands
    floats = ("f16", "bf16", "f32")
    if "x2" in to and source == "f32":
        high, low = (formats.to_16(b.read(s, "f32"), to[:-2]) for s in sources)
        value = high.astype(np.uint32) << np.uint32(16) | low
    elif to not in floats and source not in floats:
        value = b.read(sources[0], source).astype(TYPES[to])
    elif to == "tf32" and "rna" in i.parts:
        bits = b.read(sources[0], "b32")
        value = bits + np.uint32(0x1000) & np.uint32(0xFFFFE000)  # ties away from zero
    elif len(sources) > 1 or (to not in floats and "rzi" not in i.parts):
        raise Unsupported("a conversion")
    else:
        value = b.read(sources[0], source)
        if source in ("f16", "bf16"):
            value = formats.from_16(value, source)
        if to in ("f16", "bf16"):
            value = formats.to_16(value.astype(np.float64), to)
        elif to == "f32":
            value = value.astype(np.float32)
        else:
            limits = np.iinfo(TYPES[to])
            value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
            value = np.trunc(value).astype(TYPES[to])
    b.write(d, value, mask)


@handles(*(f"{op}.{kind}" for kind in ("f16", "bf16", "f16x2", "bf16x2", "f32x2")
           for op in ("add", "sub", "mul", "add.rn", "sub.rn", "mul.rn", "fma.rn")))  # fmt: skip
@handles("fma.rn.f32")
def _rounded_once(b: Block, i: Instruction, mask: Mask) -> None:
    """`x * y + z`, `x * y`, `x + y`, `x - y`: exact, then rounded; the product fits float64."""
    kind, (d, *sources) = i.parts[-1], i.operands
    x, y, *z = (formats.lanes(b.read(s, kind), kind) for s in sources)
    with np.errstate(all="ignore"):
        if i.parts[0] in ("add", "sub"):
            value = formats.odd_sum(x, y if i.parts[0] == "add" else -y)
        else:
            value = formats.odd_sum(x * y, z[0]) if z else x * y
    b.write(d, formats.pack(value, kind), mask)


# Control


@handles("bra")
def _branch(b: Block, i: Instruction, mask: Mask) -> int | None:
    here = np.ones(b.threads, bool) if b.here is None else b.here
    taken = here if mask is None else mask
    if (taken == here).all():
        return i.target
    if taken.any():
        if (by_warp(taken).any(1) & by_warp(here & ~taken).any(1)).any():
            raise Unsupported("threads of a warp part at a branch")
        b.parked[i.target] = taken | b.parked.get(i.target, False)
        b.here = here & ~taken
    return None


@handles("ret", "exit")
def _return(b: Block, i: Instruction, mask: Mask) -> int:
    b.all(mask, "leave the kernel together")
    return len(b.program.kernel.code)


@handles("bar.sync", "barrier.sync")
def _barrier(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "reach the barrier")
    if len(i.operands) > 1:
        raise Unsupported("a barrier of some of the warps")
    b.next_epoch()


@handles("bar.warp.sync")
def _warp_barrier(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "reach the barrier of their warp")
    b.epoch += 1


# Loads, stores, copies


@handles("ld.param")
def _parameter(b: Block, i: Instruction, mask: Mask) -> None:
    d, source = i.operands
    value = np.full(b.threads, b.parameters[source.base.name])
    if value.dtype == np.int64:
        value = value.astype(TYPES[i.parts[-1]])
    b.write(d, value, mask)


def _form(i: Instruction) -> tuple[str, int, int]:
    """Space, bytes of an element, elements."""
    count = next((int(part[1:]) for part in i.parts if part in ("v2", "v4", "v8")), 1)
    return i.parts[1], TYPES[i.parts[-1]].itemsize, count


@handles("ld.global", "ld.shared")
def _load(b: Block, i: Instruction, mask: Mask) -> None:
    space, size, count = _form(i)
    d, source = i.operands
    threads = b.active(mask)
    values = np.zeros((b.threads, size * count), np.uint8)
    if len(threads):
        address = b.address(source)[threads]
        values[threads] = b.load(space, address, size * count, threads)
    elements = values.view(TYPES[i.parts[-1]])
    for n, item in enumerate(registers(d)):
        b.write(item, elements[:, n], mask)


@handles("st.global", "st.shared")
def _store(b: Block, i: Instruction, mask: Mask) -> None:
    space, size, _ = _form(i)
    target, source = i.operands
    threads = b.active(mask)
    if len(threads):
        values = np.stack([b.read(item, f"b{8 * size}") for item in registers(source)], 1)
        values = values.view(np.uint8)[threads]
        b.store(space, b.address(target)[threads], values, threads)


@handles("cp.async.ca", "cp.async.cg")
def _copy(b: Block, i: Instruction, mask: Mask) -> None:
    """All bytes of `size`, or zeros where the fourth operand says that none are to be read."""
    target, source, size = i.operands[:3]
    size = int(size.text, 0)
    threads = b.active(mask)
    counts = b.read(i.operands[3], "u32") if len(i.operands) > 3 else np.full(b.threads, size)
    if not np.isin(counts[threads], (0, size)).all():
        raise Unsupported("a copy of some of the bytes")
    values = np.zeros((b.threads, size), np.uint8)
    full = threads[counts[threads] != 0]
    if len(full):
        values[full] = b.load("global", b.address(source)[full], size, full)
    to = b.address(target)[threads]
    b.note("shared", to, size, threads, True)
    index = b.shared.begin_copy(to, size, threads, b.epoch)
    b.copies.append((index, values[threads], threads[:, None]))


@handles("cp.async.commit_group")
def _commit(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "commit their copies")
    b.groups.append(b.copies)
    b.copies = []


@handles("cp.async.wait_group")
def _wait(b: Block, i: Instruction, mask: Mask) -> None:
    """Makes a thread's copies its own; other threads see them after the next barrier."""
    b.all(mask, "wait for their copies")
    done = max(0, len(b.groups) - int(i.operands[0].text))
    for index, values, writer in (copy for group in b.groups[:done] for copy in group):
        b.shared.end_copy(index, values, writer, b.epoch)
        b.landed(index, writer, True)
    b.groups = b.groups[done:]


# Exchanges within a warp


@handles("shfl.sync")
def _shuffle(b: Block, i: Instruction, mask: Mask) -> None:
    d, value, lane, clamp, _ = i.operands
    b.all(mask, "take part in the exchange")
    lanes = b.read(lane, "u32").astype(np.int64) & 31
    own = b.tid % WARP
    if b.number(clamp) != 31 or i.parts[2] not in ("idx", "bfly"):
        raise Unsupported("a form of shfl")
    source = lanes if i.parts[2] == "idx" else own ^ lanes
    b.write(d, b.read(value, "b32")[b.tid - own + source], mask)


@handles("redux.sync.min", "redux.sync.max", "redux.sync.add")
def _reduce(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "take part in the reduction")
    d, value, _ = i.operands
    warps = b.read(value, i.parts[-1]).reshape(-1, WARP)
    functions: dict[str, Callable[..., Array]] = {"min": np.min, "max": np.max, "add": np.sum}
    of_warp = functions[i.parts[2]](warps, axis=1)
    b.write(d, np.repeat(of_warp, WARP).astype(warps.dtype), mask)


@handles("ldmatrix.sync.aligned.m8n8", "stmatrix.sync.aligned.m8n8")
def _matrices(b: Block, i: Instruction, mask: Mask) -> None:
    """8x8 tiles of 16 bits: lanes 8n to 8n+7 give the rows of tile n, a lane holds two neighbors.

    Every access is booked for the lane that gets or gives the element.
    """
    b.all(mask, "take part in the copy of tiles")
    if i.parts[-1] != "b16":
        raise Unsupported("tiles of another type")
    loads = i.parts[0] == "ldmatrix"
    tiles, memory = i.operands if loads else i.operands[::-1]
    rows = b.address(memory).reshape(-1, WARP)
    count, lane = len(tiles.items), np.arange(WARP)
    if (rows[:, : 8 * count] % 16).any():
        raise Fault("the row of a tile is not at a multiple of 16 bytes")
    first = 8 * np.arange(count)[:, None]  # [tiles, 1]; places are [warps, tiles, lanes, pieces]
    if "trans" in i.parts:
        pair = lane[:, None] % 4 * 2 + np.arange(2)
        places = rows[:, first[..., None] + pair] + lane[:, None] // 4 * 2
    else:
        places = (rows[:, first + lane // 4] + lane % 4 * 4)[..., None]
    n = places.shape[3]
    threads = np.broadcast_to(b.tid.reshape(-1, 1, WARP, 1), places.shape).ravel()
    if loads:
        loaded = b.load("shared", places.ravel(), 4 // n, threads).reshape(-1, count, WARP, 4)
        words = loaded.view(np.uint32).swapaxes(0, 1).reshape(count, b.threads)
        for register, word in zip(tiles.items, words, strict=True):
            b.write(register, word, None)
    else:
        given = np.stack([b.read(register, "b32") for register in tiles.items], axis=1)
        by_tile = given.reshape(-1, WARP, count).swapaxes(1, 2)
        values = np.ascontiguousarray(by_tile).view(np.uint8).reshape(-1, 4 // n)
        b.store("shared", places.ravel(), values, threads)


# Matrix products. The operands are exact in float64, and a sum is rounded to float32 once an
# instruction; tensor cores round or truncate in between, which no reference should rely on.


@handles("mma.sync.aligned.m16n8k16.row.col.f32", "mma.sync.aligned.m16n8k8.row.col.f32")
def _mma(b: Block, i: Instruction, mask: Mask) -> None:
    b.all(mask, "take part in the product")
    d, left, right, before = i.operands
    kind = i.parts[-2]
    A = fragment([b.read(item, "b32") for item in left.items], kind)
    B = np.concatenate([_quarter(b.read(item, "b32"), kind) for item in right.items], axis=2)
    C = accumulator([b.read(item, "f32") for item in before.items])
    for item, value in zip(d.items, spread(product(A, B, C)), strict=True):
        b.write(item, value, None)


def product(A: Array, B: Array, C: Array | float) -> Array:
    """`A B^T + C`, from float64 to float32."""
    with np.errstate(all="ignore"):
        return (A @ B.swapaxes(-1, -2) + C).astype(np.float32)


def _quarter(bits: Array, kind: str) -> Array:
    """`[warps, 8, 8]` (4 for tf32) of a register: the lane's row is lane / 4."""
    if kind == "tf32":
        return formats.operand(bits.reshape(-1, 8, 4), kind)
    return formats.operand(np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 8, 8), kind)


def fragment(bits: list[Array], kind: str) -> Array:
    """The left operand `[warps, 16, 16]` (8 for tf32) of four registers."""
    q = [_quarter(one, kind) for one in bits]
    rows = [np.concatenate(pair, axis=2) for pair in (q[0::2], q[1::2])]
    return np.concatenate(rows, axis=1)


def accumulator(values: list[Array]) -> Array:
    """`[warps, 16, 2 len(values)]` in float64: four registers for every eight columns."""
    tiles = np.stack(values, 1).reshape(-1, 8, 4, len(values) // 4, 2, 2)  # w, row, t, n, half, k
    return tiles.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 2 * len(values)).astype(np.float64)


def spread(D: Array) -> list[Array]:
    """The registers of an accumulator `[warps, 16, columns]`."""
    warps, _, columns = D.shape
    tiles = D.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(tiles.reshape(columns // 2, warps * WARP)))
