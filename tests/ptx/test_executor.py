"""The executor against the PTX manual: layouts lane by lane, roundings, and each of its rules.

A rule is shown by a snippet of PTX that passes, and faults without the line marked `!`.
"""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from . import (
    Fault,
    Program,
    Unsupported,
    ampere,
    formats,
    parse,
)
from .hopper import TensorMap, swizzled
from .memory import Space

THREADS = 128


def assemble(body, threads=THREADS, parameters=4):
    """A module of one kernel, as Triton writes it."""
    listed = ", ".join(f".param .u64 k_param_{n}" for n in range(parameters))
    return (
        f".visible .entry k({listed})\n.reqntid {threads}\n{{\n\t.reg .pred %p<99>;\n"
        "\t.reg .b16 %rs<99>;\n\t.reg .b32 %r<999>;\n\t.reg .b64 %rd<99>;\n"
        + "".join(f"\t{line.strip()}\n" for line in body.strip().splitlines())
        + "\tret;\n}\n"
    )


def run(body, *arrays, threads=THREADS, shared=65536, blocks=1, box=None):
    """Runs a snippet: `%rd1` … are the arrays' addresses, `%r1` the thread; returns the arrays.

    NaN is memory that was never written. With `box`, `%rd9` is a tensor map of the first array.
    """
    names = [f"array {n}" for n in range(len(arrays))]
    space, regions = Space(), []
    for name, array in zip(names, arrays, strict=True):
        words = np.ascontiguousarray(array)
        region = space.add(name, words.view(f"u{words.itemsize}").ravel().copy(), 0)
        region.valid[:] = ~np.isnan(words.ravel()) if words.dtype.kind == "f" else True
        regions.append(region)
    loads = "\n".join(f"ld.param.b64 %rd{n + 1}, [k_param_{n}];" for n in range(4))
    body = f"{loads}\nmov.u32 %r1, %tid.x;\nmov.b32 %r2, global_smem;\n{body}"
    values = [np.int64(region.base) for region in regions]
    if box:
        size = arrays[0].itemsize
        columns = arrays[0].shape[1]
        space.maps[77] = TensorMap(regions[0], arrays[0].shape, columns, box[:2], size, box[2])
        body = f"mov.b64 %rd9, 77;\n{body}"
    values += [np.int64(0)] * (4 - len(values))
    program = Program(parse(assemble(body, threads)), shared)
    parameters = dict(zip(program.kernel.parameters, values, strict=True))
    for block in range(blocks):
        program.run(block, blocks, parameters, space)
    return [r.words.view(a.dtype).reshape(a.shape) for r, a in zip(regions, arrays, strict=True)]


def filled(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def empty(*shape):
    return np.full(shape, math.nan, np.float32)


# Layouts, written out from the manual's figures. Of lane l: g = l / 4, t = l % 4.


def lane_of(thread):
    return thread // 32, thread % 32 // 4, thread % 4


def random_bits(n):
    return np.random.default_rng(n).integers(0, 2**30, 64, dtype=np.uint32)


def test_the_left_operand_of_16_bits_lies_as_the_manual_shows():
    """a_i of lane l: row g (+ 8 where i is 2, 3, 6, 7), column 2 t + i % 2 (+ 8 from i = 4 on)."""
    registers = [random_bits(n) for n in range(4)]
    A = ampere.fragment(registers, "bf16")
    for thread in range(64):
        warp, g, t = lane_of(thread)
        for i in range(8):
            half = registers[i // 2][thread] >> np.uint32(16 * (i % 2)) & np.uint32(0xFFFF)
            row, column = g + 8 * (i % 4 // 2), 2 * t + i % 2 + 8 * (i // 4)
            assert A[warp, row, column] == formats.from_16(np.array([half], np.uint16), "bf16")[0]


def test_the_left_operand_of_tf32_lies_as_the_manual_shows():
    """a_i: row g (+ 8 where i is odd), column t (+ 4 from i = 2 on)."""
    registers = [random_bits(n) for n in range(4)]
    A = ampere.fragment(registers, "tf32")
    for thread in range(64):
        warp, g, t = lane_of(thread)
        for i in range(4):
            value = formats.from_tf32(registers[i][thread : thread + 1])[0]
            assert A[warp, g + 8 * (i % 2), t + 4 * (i // 2)] == value


def test_an_accumulator_lies_as_the_manual_shows():
    """c_i: row g (+ 8 where i is 2, 3), column 2 t + i % 2, eight columns for four registers."""
    values = [filled(64) + n for n in range(8)]
    C = ampere.accumulator(values)
    for thread in range(64):
        warp, g, t = lane_of(thread)
        for i in range(8):
            column = 2 * t + i % 2 + 8 * (i // 4)
            assert C[warp, g + 8 * (i % 4 // 2), column] == values[i][thread]
    back = ampere.spread(C.astype(np.float32))
    assert all(np.array_equal(a, b) for a, b in zip(back, values, strict=True))


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma_is_the_product_of_its_fragments(kind):
    """b_i of 16 bits: row 2 t + i % 2 (+ 8 from i = 2), column g; of tf32: row t + 4 i."""
    depth = 8 if kind == "tf32" else 16
    A, B, C = filled(16, depth), filled(depth, 8), filled(16, 8)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    bits = torch.int32 if kind == "tf32" else torch.int16
    a, b = (torch.from_numpy(m).to(dtype).view(bits).numpy() for m in (A, B))
    left, right, before = np.zeros((4, 32), np.uint32), np.zeros((2, 32), np.uint32), empty(4, 32)
    for thread in range(32):
        _, g, t = lane_of(thread)
        for i in range(4):
            row, column = g + 8 * (i % 2), (1 if kind == "tf32" else 2) * t + depth // 2 * (i // 2)
            left[i, thread] = pack(a[row, column : column + 2], kind)
            before[i, thread] = C[g + 8 * (i // 2), 2 * t + i % 2]
        for i in range(2):
            row = (1 if kind == "tf32" else 2) * t + depth // 2 * i
            right[i, thread] = pack(b[row : row + 2, g], kind)
    out = run(
        load(4, 1, 10) + load(2, 2, 20) + load(4, 3, 30) +
        f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%r40, %r41, %r42, %r43}}, "
        "{%r10, %r11, %r12, %r13}, {%r20, %r21}, {%r30, %r31, %r32, %r33};" + save(4, 4, 40),
        left, right, before, empty(4, 32), threads=32,
    )[3]  # fmt: skip
    left64, right64 = (
        formats.operand(m.view(np.uint32 if kind == "tf32" else np.uint16), kind) for m in (a, b)
    )
    D = (left64 @ right64 + C).astype(np.float32)
    for thread in range(32):
        _, g, t = lane_of(thread)
        for i in range(4):
            assert out[i, thread] == D[g + 8 * (i // 2), 2 * t + i % 2]


def pack(pair, kind):
    """A register's bits: one element of tf32, two of 16 bits."""
    if kind == "tf32":
        return int(pair[0]) & 0xFFFFFFFF
    return int(pair[0]) & 0xFFFF | (int(pair[1]) & 0xFFFF) << 16


def load(count, array, first, threads=32):
    """`count` rows of an array, a word for each thread, into registers."""
    lines = [f"mad.wide.u32 %rd10, %r1, 4, %rd{array};"]
    lines += [f"ld.global.b32 %r{first + n}, [%rd10+{4 * threads * n}];" for n in range(count)]
    return "\n".join(lines) + "\n"


def save(count, array, first, threads=32):
    lines = [f"\nmad.wide.u32 %rd10, %r1, 4, %rd{array};"]
    lines += [f"st.global.b32 [%rd10+{4 * threads * n}], %r{first + n};" for n in range(count)]
    return "\n".join(lines)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_gives_each_lane_two_neighbors_of_a_row(trans):
    """Tile n's row g is where lane 8 n + g points; lane l gets its elements 2 t, 2 t + 1."""
    tiles = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = run(
        "mad.wide.u32 %rd10, %r1, 16, %rd1; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd10];\n"
        "mad.lo.s32 %r3, %r1, 16, %r2; st.shared.v4.b32 [%r3], {%r10, %r11, %r12, %r13};\n"
        "bar.sync 0;\n"
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r3];"
        + save(4, 2, 20),
        tiles, np.zeros((4, 32), np.uint32), threads=32,
    )[1]  # fmt: skip
    for n in range(4):
        tile = tiles[n].T if trans else tiles[n]
        for thread in range(32):
            _, g, t = lane_of(thread)
            assert out[n, thread] == int(tile[g, 2 * t]) | int(tile[g, 2 * t + 1]) << 16


def test_stmatrix_puts_back_what_ldmatrix_gives():
    tiles = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    for trans in ("", ".trans"):
        out = run(
            "mad.wide.u32 %rd10, %r1, 16, %rd1;\n"
            "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd10];\n"
            "mad.lo.s32 %r3, %r1, 16, %r2; st.shared.v4.b32 [%r3], {%r10, %r11, %r12, %r13};\n"
            f"bar.sync 0;\nldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, "
            "%r23}, [%r3];\nbar.sync 0;\n"
            f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], "
            "{%r20, %r21, %r22, %r23};\nbar.sync 0;\n"
            "mad.wide.u32 %rd10, %r1, 16, %rd2;\n"
            "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3+512];\n"
            "st.global.v4.b32 [%rd10], {%r10, %r11, %r12, %r13};",
            tiles, np.zeros_like(tiles), threads=32,
        )[1]  # fmt: skip
        assert np.array_equal(out, tiles)


def test_swizzles_move_chunks_of_16_bytes():
    """Within 8 rows of 128 bytes chunk c of row r goes to c ^ r; over 64 bytes two rows share r."""
    for row in range(8):
        for chunk in range(8):
            start = 1024 + 128 * row
            for width, rows in ((128, 8), (64, 4), (32, 2)):
                moved = start + 16 * (chunk ^ row % rows)
                assert swizzled(start + 16 * chunk, width) == moved


# Numbers


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_round_as_pytorch_does(kind, dtype):
    values = torch.randn(100_000) * torch.exp2(torch.randint(-30, 20, (100_000,)))
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65520.0, 3.4e38, 1e-45, 1.00390625])
    values = torch.cat([values, special])
    expected = values.to(dtype).view(torch.int16).numpy()
    assert np.array_equal(formats.to_16(values.numpy(), kind).view(np.int16), expected)
    assert np.isnan(formats.from_16(formats.to_16(np.array([math.nan]), kind), kind)).all()


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_fma_rounds_once(kind):
    """Against exact fractions: no neighbor of the result is nearer."""
    rng = np.random.default_rng(0)

    def draw(spread):
        values = rng.normal(size=2000) * 2.0 ** rng.integers(-spread, spread, 2000)
        return formats.lanes(formats.pack(values[:, None], kind), kind)

    a, b, c = draw(2), draw(2), draw(8 if kind == "f16" else 40)
    got = formats.pack(formats.odd_sum(a * b, c), kind)
    for i in range(len(got)):
        exact = Fraction(a[i, 0]) * Fraction(b[i, 0]) + Fraction(c[i, 0])
        near = np.array([got[i], got[i] + 1, got[i] - 1], got.dtype)
        finite = [v for v in formats.lanes(near, kind)[:, 0] if np.isfinite(v)]
        errors = [abs(Fraction(v) - exact) for v in finite]
        assert errors[0] == min(errors)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_mixed_fma_multiplies_16_bits_and_adds_32(kind):
    """Of sm_100 and sm_120: only the factors have 16 bits."""
    x, y = (formats.pack(draw.astype(np.float64), kind) for draw in filled(2, THREADS, 1))
    z = filled(THREADS)
    body = "cvt.u16.u32 %rs1, %r10; cvt.u16.u32 %rs2, %r11;\n"
    body += f"fma.rn.f32.{kind} %r30, %rs1, %rs2, %r20;"
    loads = load(1, 1, 10) + load(1, 2, 11) + load(1, 3, 20)
    given = x.astype(np.uint32), y.astype(np.uint32), z, empty(THREADS)
    out = run(loads + body + save(1, 4, 30), *given)[3]
    exact = formats.lanes(x, kind) * formats.lanes(y, kind) + z[:, None].astype(np.float64)
    assert np.array_equal(out, exact[:, 0].astype(np.float32))


INTEGERS = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: a * b >> 32,
    "div.s32": lambda a, b: int(a / b) if b else None,
    "rem.s32": lambda a, b: a - int(a / b) * b if b else None,
    "min.s32": min,
    "max.s32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers_wrap_and_divide_as_c_does(opcode):
    values = [0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 12345]
    pairs = [(a, b) for a in values for b in values if INTEGERS[opcode](a, b) is not None]
    a, b = (np.zeros(128, np.int32) + 1 for _ in range(2))
    for n, (x, y) in enumerate(pairs):
        a[n], b[n] = x, y
    body = f"{opcode} %r30, %r10, %r20;"
    out = run(load(1, 1, 10) + load(1, 2, 20) + body + save(1, 3, 30), a, b, a * 0)[2]
    for n, (x, y) in enumerate(pairs):
        wrapped = (INTEGERS[opcode](x, y) + 2**31) % 2**32 - 2**31
        assert out[n] == wrapped, (x, y)


BITS = {  # a = 0x89ABCDEF, b = 0x01234567, by hand from the manual
    "shl.b32 %r30, %r10, 4;": 0x9ABCDEF0,
    "shl.b32 %r30, %r10, 32;": 0,
    "shr.u32 %r30, %r10, 8;": 0x0089ABCD,
    "shr.s32 %r30, %r10, 8;": 0xFF89ABCD,
    "shr.s32 %r30, %r10, 40;": 0xFFFFFFFF,
    "bfe.u32 %r30, %r10, 8, 8;": 0xCD,
    "bfe.s32 %r30, %r10, 8, 8;": 0xFFFFFFCD,
    "mov.b64 %rd8, {%r10, %r11}; bfe.s64 %rd8, %rd8, 4, 28; cvt.u32.u64 %r30, %rd8;": 0xF89ABCDE,
    "mov.b64 %rd8, {%r10, %r11}; bfe.u64 %rd8, %rd8, 4, 28; cvt.u32.u64 %r30, %rd8;": 0x089ABCDE,
    "bfi.b32 %r30, %r11, %r10, 8, 16;": 0x894567EF,
    "shf.l.wrap.b32 %r30, %r10, %r11, 8;": 0x23456789,
    "shf.r.wrap.b32 %r30, %r10, %r11, 8;": 0x6789ABCD,
    "prmt.b32 %r30, %r10, %r11, 0x7531;": 0x014589CD,
    "prmt.b32 %r30, %r10, %r11, 0x000B;": 0xEFEFEFFF,
    "lop3.b32 %r30, %r10, %r11, %r10, 0x3c;": 0x89ABCDEF ^ 0x01234567,
    "not.b32 %r30, %r10;": 0x76543210,
    "{ .reg .b32 t; mov.b32 t, %r10; mov.b32 %r30, t; }": 0x89ABCDEF,
    "mov.b64 %rd12, {%r10, %r11}; mov.b64 {%r30, %r31}, %rd12;": 0x89ABCDEF,
    "cvt.u16.u32 %rs1, %r10; cvt.s32.s16 %r30, %rs1;": 0xFFFFCDEF,
    "cvt.rn.f32.s32 %r12, %r11; cvt.rzi.s32.f32 %r30, %r12;": 0x01234568,
    "cvt.rna.tf32.f32 %r30, %r11;": 0x01234000,
    "selp.b32 %r30, %r10, %r11, %p1;": 0x01234567,
}


@pytest.mark.parametrize("body", BITS)
def test_bits(body):
    setup = "mov.b32 %r10, 0x89ABCDEF; mov.b32 %r11, 0x01234567; setp.lt.u32 %p1, %r10, %r11;\n"
    out = run(setup + body + save(1, 1, 30), np.zeros(128, np.uint32))[0]
    assert out.tolist() == [BITS[body]] * 128


def test_lanes_of_a_warp_exchange():
    body = load(1, 1, 10) + "shfl.sync.bfly.b32 %r30, %r10, 4, 31, -1;" + save(1, 2, 30)
    values = np.arange(128, dtype=np.uint32)
    assert np.array_equal(run(body, values, values * 0)[1], values ^ 4)
    body = load(1, 1, 10) + "shfl.sync.idx.b32 %r30, %r10, 3, 31, -1;" + save(1, 2, 30)
    assert np.array_equal(run(body, values, values * 0)[1], values // 32 * 32 + 3)
    body = load(1, 1, 10) + "redux.sync.max.s32 %r30, %r10, -1;" + save(1, 2, 30)
    assert np.array_equal(run(body, values, values * 0)[1], values // 32 * 32 + 31)


def test_warps_that_part_at_a_branch_meet_again():
    """Warp 3 goes another way, through code that stands behind the end of the others'."""
    body = """
        mov.b32 %r10, 1; setp.gt.u32 %p1, %r1, 95;
        @%p1 bra $other;
        add.s32 %r10, %r10, 1;
        $meet:
        bar.sync 0;
        bra.uni $end;
        $other:
        add.s32 %r10, %r10, 10;
        bra.uni $meet;
        $end:
    """
    out = run(body + save(1, 1, 10), np.zeros(128, np.uint32))[0]
    assert out.tolist() == [2] * 96 + [11] * 32
    with pytest.raises(Unsupported, match="of a warp part"):
        run(body.replace("95", "100"), np.zeros(128, np.uint32))
    with pytest.raises(Fault, match=r"not all threads leave .* wait at line 16"):
        run("setp.gt.u32 %p1, %r1, 95;\n@%p1 bra $end;\nbar.sync 0;\n$end:\nmov.b32 %r3, 0;")


def test_an_unknown_instruction_is_named_with_the_place_for_it():
    with pytest.raises(
        Unsupported, match=r"k, line 14: .*sin\.approx\.f32; write one in tests/ptx"
    ):
        run("sin.approx.f32 %r3, %r1;")


def test_a_fault_names_kernel_block_and_both_lines():
    body = ".loc 1 90 21 // tiles.py:33:4 @[ forward.py:90:21 ]\nst.global.b32 [%rd1+512], %r1;"
    place = r"k, block 0, line 15: st.global.b32 .*; tiles.py:33 @\[ forward.py:90 \]"
    with pytest.raises(Fault, match=place):
        run(body, np.zeros(128, np.uint32))


# Rules

COPY = "mad.wide.u32 %rd10, %r1, 4, %rd1; shl.b32 %r4, %r1, 2; add.s32 %r3, %r2, %r4;\n"
NEXT = "xor.b32 %r5, %r4, 128; add.s32 %r5, %r5, %r2;\n"  # what a thread of another warp wrote
NEAR = "xor.b32 %r5, %r4, 4; add.s32 %r5, %r5, %r2;\n"  # what a thread of this warp wrote
READ = "ld.shared.b32 %r6, [%r3];"
ASYNC = "cp.async.ca.shared.global [%r3], [%rd10], 4;"
INIT = """
    setp.eq.s32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2+32768], 1;
"""
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2+32768],"
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2+32768], 0;"
BOX = (
    "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
    "[%r2], [%rd9, {0, 0}], [%r2+32768];"
)
# 128 rows of 128 bytes (bf16) that threads fill with ones, one each: swizzled they stay ones.
FILL = "shl.b32 %r3, %r1, 7; add.s32 %r3, %r3, %r2; mov.b32 %r6, 0x3F803F80;\n" + "\n".join(
    f"st.shared.v4.b32 [%r3+{16 * n}], {{%r6, %r6, %r6, %r6}};" for n in range(8)
)
# Start 1024, 1024 bytes from eight rows to the next, swizzled over 128 bytes.
DESCRIPTOR = f"mov.b64 %rd12, {1 << 62 | 64 << 32 | 64};"
ZERO = "mov.b32 %r40, 0; mov.b32 %r41, 0; mov.b32 %r42, 0; mov.b32 %r43, 0;"
RESULT = "{%r40, %r41, %r42, %r43}"
WGMMA = (
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {RESULT}, %rd12, %rd12, %p9, 1, 1, 0, 0;"
)
FROM_REGISTERS = (
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {RESULT}, {{%r20, %r21, %r22, %r23}}, "
    "%rd12, %p9, 1, 1, 0;"
)
ONES = "mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;"
READY = f"{FILL}\nfence.proxy.async;\nbar.sync 0;\nsetp.eq.s32 %p9, 0, 0;\n{DESCRIPTOR}\n"
COMMIT = "wgmma.commit_group.sync.aligned;"
DONE = "wgmma.wait_group.sync.aligned 0;"
USE = "add.f32 %r50, %r40, %r41;"
# Tensor memory: 64 columns, one product of 128 x 8 with operands in shared memory (bf16, float32
# sums); the descriptors have version 1 and swizzle mode 2 (128 bytes).
ALLOC = """
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2+40000], 64;
    bar.sync 0;
    ld.shared.b32 %r60, [%r2+40000];
"""
FREE = "bar.sync 0;\ntcgen05.dealloc.cta_group::1.sync.aligned.b32 %r60, 64;"
FIVE = f"mov.b64 %rd12, {2 << 61 | 1 << 46 | 64 << 32 | 64};\n"
KIND = f"mov.b32 %r61, {8 << 24 | 1 << 17 | 1 << 10 | 1 << 7 | 1 << 4};\n"
MMA5 = "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r60+0], %rd12, %rd12, %r61, %p9;"
COMMIT5 = "@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+32768];"
LANE = "shr.u32 %r62, %r1, 5; shl.b32 %r62, %r62, 21; add.s32 %r63, %r62, %r60;\n"
LD = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r70, %r71}, [%r63+0];"
ST = "tcgen05.st.sync.aligned.32x32b.x2.b32 [%r63+0], {%r1, %r1};"
WAITLD = "tcgen05.wait::ld.sync.aligned;"
BEGIN5 = f"{INIT}\n{ALLOC}\n{FILL}\nfence.proxy.async;\nbar.sync 0;\n{FIVE}{KIND}{LANE}"
BEGIN5 += "setp.ne.s32 %p9, 0, 0;\n"
RULES = {
    "a read waits for the copy": (
        f"{COPY}{ASYNC}\ncp.async.commit_group;\n!cp.async.wait_group 0;\n{READ}",
        "read while an asynchronous copy",
    ),
    "a wait covers committed copies only": (
        f"{COPY}{ASYNC}\n!cp.async.commit_group;\ncp.async.wait_group 0;\n{READ}",
        "read while an asynchronous copy",
    ),
    "a copy is its own thread's until a barrier": (
        f"{COPY}{NEXT}{ASYNC}\ncp.async.commit_group;\ncp.async.wait_group 0;\n!bar.sync 0;\n"
        "ld.shared.b32 %r6, [%r5];",
        "another thread's write, no barrier",
    ),
    "a copy is waited for before the kernel ends": (
        f"{COPY}{ASYNC}\ncp.async.commit_group;\n!cp.async.wait_group 0;\n",
        "copies are never waited for",
    ),
    "a write waits for the copy": (
        f"{COPY}{ASYNC}\ncp.async.commit_group;\n!cp.async.wait_group 0;\nst.shared.b32 [%r3], %r1;"
        "\ncp.async.wait_group 0;",
        "write where an asynchronous copy is under way",
    ),
    "a copy over what others read": (
        f"{COPY}{NEXT}st.shared.b32 [%r3], %r1;\nbar.sync 0;\nld.shared.b32 %r6, [%r5];\n"
        f"!bar.sync 0;\n{ASYNC}\ncp.async.commit_group;\ncp.async.wait_group 0;",
        "asynchronous copy over what another thread reads",
    ),
    "reading what another warp wrote": (
        f"{COPY}{NEXT}st.shared.b32 [%r3], %r1;\n!bar.sync 0;\nld.shared.b32 %r6, [%r5];",
        "another thread's write",
    ),
    "reading what this warp wrote": (
        f"{COPY}{NEAR}st.shared.b32 [%r3], %r1;\n!bar.warp.sync -1;\nld.shared.b32 %r6, [%r5];",
        "another thread's write",
    ),
    "writing what another warp read": (
        f"{COPY}{NEXT}st.shared.b32 [%r3], %r1;\nbar.sync 0;\nld.shared.b32 %r6, [%r5];\n"
        "!bar.sync 0;\nst.shared.b32 [%r3], %r1;",
        "write over what another thread reads",
    ),
    "writing what another warp wrote": (
        f"{COPY}{NEXT}st.shared.b32 [%r3], %r1;\n!bar.sync 0;\nst.shared.b32 [%r5], %r1;",
        "two threads write one address",
    ),
    "one address of several threads": (
        "!setp.eq.s32 %p1, %r1, 0;\n@%p1 st.shared.b32 [%r2], %r1;",
        "read before it is written|twice, with different values",
    ),
    "a barrier in memory is seen behind bar.sync": (
        f"{INIT}!bar.sync 0;\n{EXPECT} 0;\n{WAIT}",
        "another thread than initialized it",
    ),
    "a box is waited for": (
        f"{INIT}bar.sync 0;\n{EXPECT} 1024;\n{BOX}\n!{WAIT}\nld.shared.b32 %r6, [%r2];",
        "read while an asynchronous copy",
    ),
    "a box's bytes are announced": (
        f"{INIT}bar.sync 0;\n!{EXPECT} 1024;\n{BOX}\n{WAIT}",
        "a wait without end",
    ),
    "a box lands behind a proxy fence": (
        f"{INIT}@%p1 st.shared.b32 [%r2], %r1;\nbar.sync 0;\n!fence.proxy.async;\n"
        f"{EXPECT} 1024;\n{BOX}\n{WAIT}",
        "a box lands on what threads wrote",
    ),
    "wgmma reads behind a proxy fence": (
        f"{READY}wgmma.fence.sync.aligned;\n{ZERO}\nwgmma.fence.sync.aligned;\n{WGMMA}\n{COMMIT}\n"
        f"{DONE}\n{USE}".replace("fence.proxy.async", "!fence.proxy.async"),
        "without a proxy fence",
    ),
    "wgmma reads behind a barrier": (
        f"{READY}{ZERO}\nwgmma.fence.sync.aligned;\n{WGMMA}\n{COMMIT}\n{DONE}".replace(
            "bar.sync", "!bar.sync"
        ),
        "written since the last barrier",
    ),
    "wgmma's accumulator is fenced": (
        f"{READY}{ZERO}\nwgmma.fence.sync.aligned;\nadd.f32 %r41, %r41, %r41;\n"
        f"!wgmma.fence.sync.aligned;\n{WGMMA}\n{COMMIT}\n{DONE}",
        "since the last wgmma.fence",
    ),
    "wgmma's register operand is fenced": (
        f"{READY}{ZERO}\n{ONES}\n!wgmma.fence.sync.aligned;\n{FROM_REGISTERS}\n{COMMIT}\n{DONE}",
        "since the last wgmma.fence",
    ),
    "a product's result is waited for": (
        f"{READY}{ZERO}\nwgmma.fence.sync.aligned;\n{WGMMA}\n{COMMIT}\n!{DONE}\n{USE}\n{DONE}",
        "read before its product",
    ),
    "a product's register operand stays": (
        f"{READY}{ZERO}\n{ONES}\nwgmma.fence.sync.aligned;\n{FROM_REGISTERS}\n{COMMIT}\n!{DONE}\n"
        f"mov.b32 %r22, 1;\n{DONE}",
        "written while a product under way uses it",
    ),
    "a product's shared operand stays": (
        f"{READY}{ZERO}\nwgmma.fence.sync.aligned;\n{WGMMA}\n{COMMIT}\n!{DONE}\nbar.sync 0;\n"
        f"st.shared.b32 [%r3], %r1;\n{DONE}",
        "a product under way still reads",
    ),
    "every warp waits for a product alone": (
        f"{READY}{ZERO}\nwgmma.fence.sync.aligned;\n{WGMMA}\n{COMMIT}\n{DONE}\n!bar.sync 0;\n"
        "st.shared.b32 [%r3], %r1;",
        "over what another thread reads",
    ),
    "a wait covers committed products only": (
        f"{READY}{ZERO}\nwgmma.fence.sync.aligned;\n{WGMMA}\n!{COMMIT}\n{DONE}\n{USE}",
        "read before its product",
    ),
    "tcgen05 reads behind a proxy fence": (
        f"{BEGIN5}{MMA5}\n{COMMIT5}\n{WAIT}\n{FREE}".replace("fence.proxy", "!fence.proxy"),
        "without a proxy fence",
    ),
    "tcgen05's result is waited for": (
        f"{BEGIN5}{MMA5}\n{COMMIT5}\n!{WAIT}\n{LD}\n{WAITLD}\n{FREE}",
        "result of a product under way is loaded",
    ),
    "tcgen05's operand stays": (
        f"{BEGIN5}{MMA5}\n{COMMIT5}\n!{WAIT}\nbar.sync 0;\nst.shared.b32 [%r3], %r1;\n{FREE}",
        "a product under way still reads",
    ),
    "tcgen05's product is committed": (
        f"{BEGIN5}{MMA5}\n!{COMMIT5}\n{WAIT}\n{FREE}",
        "a wait without end",
    ),
    "tensor memory is reused behind wait::ld": (
        f"{BEGIN5}{MMA5}\n{COMMIT5}\n{WAIT}\n{LD}\n!{WAITLD}\nbar.sync 0;\n{MMA5}\n{COMMIT5}\n"
        f"{WAIT.replace(', 0;', ', 1;')}\n{FREE}",
        "before the load from it is waited for",
    ),
    "tensor memory is reused behind a barrier": (
        f"{BEGIN5}{MMA5}\n{COMMIT5}\n{WAIT}\n{LD}\n{WAITLD}\n!bar.sync 0;\n{MMA5}\n{COMMIT5}\n"
        f"{WAIT.replace(', 0;', ', 1;')}\n{FREE}",
        "loaded since the last barrier",
    ),
    "tensor memory is loaded behind wait::st": (
        f"{BEGIN5}{ST}\n!tcgen05.wait::st.sync.aligned;\n{LD}\n{WAITLD}\n"
        f"tcgen05.wait::st.sync.aligned;\n{FREE}",
        "before the store to it is waited for",
    ),
    "tensor memory is given back behind wait::ld": (
        f"{BEGIN5}{ST}\ntcgen05.wait::st.sync.aligned;\n{LD}\n!{WAITLD}\n{FREE}",
        "before the load from it is waited for",
    ),
    "tensor memory is given back": (
        f"{BEGIN5}bar.sync 0;\n!tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r60, 64;",
        "never given back",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_holds_with_the_marked_line_and_not_without(rule):
    body, fault = RULES[rule]
    assert len(re.findall(r"^!", body, re.MULTILINE)) == 1
    arrays = (filled(64, 64, dtype=np.float32).astype(np.float16),)
    run(body.replace("\n!", "\n").removeprefix("!"), *arrays, box=(8, 64, 128))
    with pytest.raises(Fault, match=fault):
        run(re.sub(r"^!.*$", "", body, flags=re.MULTILINE), *arrays, box=(8, 64, 128))


PLACES = {
    "out of bounds": "mad.wide.u32 %rd10, %r1, 4, %rd1; ld.global.b32 %r6, [%rd10+4];",
    "not a multiple of 4": "ld.global.b32 %r6, [%rd1+2];",
    "never written": "ld.shared.b32 %r6, [%r2];",
    "array 1: read of what was never written": "ld.global.b32 %r6, [%rd2];",
    "is in no tensor": "mov.b64 %rd11, 64; ld.global.b32 %r6, [%rd11];",
    "%r99 is read before it is written": "add.s32 %r6, %r99, 1;",
    "division by zero": "mov.b32 %r6, 0; div.s32 %r7, %r1, %r6;",
}


@pytest.mark.parametrize("fault", PLACES)
def test_forbidden_accesses_are_found(fault):
    with pytest.raises(Fault, match=fault):
        run(PLACES[fault], filled(128), empty(128))


def test_a_masked_off_access_does_nothing():
    run("setp.lt.s32 %p1, %r1, 0;\n@%p1 ld.global.b32 %r6, [%rd1+9999];", filled(4))


def test_blocks_share_no_address_that_one_writes():
    own = "mov.u32 %r7, %ctaid.x; mad.wide.u32 %rd10, %r7, 4, %rd1; setp.eq.s32 %p1, %r1, 0;\n"
    out = run(own + "@%p1 st.global.b32 [%rd10], %r7;", np.zeros(2, np.uint32), blocks=2)
    assert out[0].tolist() == [0, 1]
    for body in ("@%p1 st.global.b32 [%rd1], %r7;", "ld.global.b32 %r8, [%rd1];\nbar.sync 0;\n"
                 "@%p1 st.global.b32 [%rd10], %r7;"):  # fmt: skip
        with pytest.raises(Fault, match="another block"):
            run(own + body, np.zeros(2, np.uint32), blocks=2)


def test_a_box_is_zero_outside_the_matrix_and_swizzled():
    matrix = filled(5, 64, dtype=np.float32).astype(np.float16)
    body = (
        f"{INIT}bar.sync 0;\n{EXPECT} 1024;\n"
        f"{BOX}\n{WAIT}\nmad.lo.s32 %r3, %r1, 8, %r2; mad.wide.u32 %rd10, %r1, 8, %rd2;\n"
        "ld.shared.v2.b32 {%r6, %r7}, [%r3]; st.global.v2.b32 [%rd10], {%r6, %r7};"
    )
    out = run(body, matrix, np.zeros((8, 64), np.float16), box=(8, 64, 128))[1]
    for row in range(8):
        for chunk in range(8):
            expected = matrix[row, 8 * chunk : 8 * chunk + 8] if row < 5 else np.zeros(8)
            at = chunk ^ row
            assert np.array_equal(out[row, 8 * at : 8 * at + 8], expected)


def test_wgmma_multiplies_what_the_descriptors_show():
    """Ones times ones, 16 deep, twice into one accumulator."""
    body = f"{READY}{ZERO}\nwgmma.fence.sync.aligned;\n{WGMMA}\n{WGMMA}\n{COMMIT}\n{DONE}"
    out = run(body + save(4, 1, 40, THREADS), empty(4, THREADS))[0]
    assert (out == 32).all()


def test_tcgen05_multiplies_what_the_descriptors_show():
    """Ones times ones, 16 deep."""
    body = f"{BEGIN5}{MMA5}\n{COMMIT5}\n{WAIT}\n{LD}\n{WAITLD}{save(1, 1, 70)}\n{FREE}"
    assert (run(body, empty(128))[0] == 16).all()
