"""Stored weights in the kernels (docs/quantized.md): tiles of NF4, FP4 and int8, and W over them.

The weight kernel reads four bits a weight, multiplies by T and writes 16 bits, in one pass; the
reduction of G reads its tiles of W0 the same way. Where blocks lie within rows and W0 is read in 16
bits, a thread takes 16 bytes, which are 32 codes of one block, forms the block's 16 products with
the table, rounded as bitsandbytes rounds its weight, and looks them up by `prmt` in two planes, of
low and of high bytes.
"""

import functools
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FourBit, Stored
from ..formats.four_bit import TABLES
from ..formats.int8 import RECIPROCAL
from ..layer import dtype_name
from .tiles import within


def _look_up(table: tuple[float, ...], kind: str) -> str:
    """PTX from 4 words of codes and an absmax to 16 words, a pair of neighboring weights each.

    $0 ... $15 are the results (the first weight of a pair in the low half), $16 ... $19 the codes,
    $20 the absmax.
    """
    bits = [struct.unpack("<I", struct.pack("<f", value))[0] for value in table]
    products = ", ".join(f"f{i}" for i in range(16))
    words = ", ".join(
        [f"p{i}" for i in range(8)] + [f"{plane}{i}" for plane in "lh" for i in range(4)]
    )
    code = ["{", f".reg .f32 {products};", f".reg .b32 {words}, s, t, a, b, L, H;"]
    code += [f"mul.rn.f32 f{i}, $20, 0f{value:08x};" for i, value in enumerate(bits)]
    code += [f"cvt.rn.{kind}x2.f32 p{i}, f{2 * i + 1}, f{2 * i};" for i in range(8)]
    for i in range(4):  # the low bytes, and the high ones, of entries 4 i ... 4 i + 3
        code.append(f"prmt.b32 l{i}, p{2 * i}, p{2 * i + 1}, 0x6420;")
        code.append(f"prmt.b32 h{i}, p{2 * i}, p{2 * i + 1}, 0x7531;")
    for word in range(4):
        # prmt selects among 8 bytes by 3 bits of a code; byte j of the lower or upper 8 by the 4th.
        code.append(f"and.b32 s, ${16 + word}, 0x77777777;")
        code.append(f"and.b32 t, ${16 + word}, 0x88888888;")
        code += ["shr.u32 t, t, 1;", "or.b32 t, t, 0x32103210;"]
        for half in range(2):
            if half:
                code += ["shr.u32 s, s, 16;", "shr.u32 t, t, 16;"]
            for plane, out in (("l", "L"), ("h", "H")):
                code.append(f"prmt.b32 a, {plane}0, {plane}1, s;")
                code.append(f"prmt.b32 b, {plane}2, {plane}3, s;")
                code.append(f"prmt.b32 {out}, a, b, t;")
            # Bytes 0 ... 3 belong to weights 1, 0, 3, 2: the high half of a byte comes first.
            code.append(f"prmt.b32 ${4 * word + 2 * half}, L, H, 0x4051;")
            code.append(f"prmt.b32 ${4 * word + 2 * half + 1}, L, H, 0x6273;")
    return "\n".join([*code, "}"])


_NF4_BF16 = tl.constexpr(_look_up(TABLES["nf4"], "bf16"))
_NF4_FP16 = tl.constexpr(_look_up(TABLES["nf4"], "f16"))
_FP4_BF16 = tl.constexpr(_look_up(TABLES["fp4"], "bf16"))
_FP4_FP16 = tl.constexpr(_look_up(TABLES["fp4"], "f16"))
_LOOK_UP_OPERANDS = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 5))
_PAIRS = tl.constexpr((tl.int32,) * 16)
_RECIPROCAL = tl.constexpr(RECIPROCAL)


@triton.jit
def absmax_of(
    p_scales, p_map, p_scales2, p_offset, blocks, mask, NESTED: tl.constexpr, ASM: tl.constexpr
):
    """The absmax of some blocks, float32; NESTED codes share a scale of their own (0: no codes)."""
    if NESTED:
        code = tl.load(p_scales + blocks, mask=mask, other=0).to(tl.int32)
        value = tl.load(p_map + code)
        scale = tl.load(p_scales2 + blocks // NESTED, mask=mask, other=0.0)
        offset = tl.broadcast_to(tl.load(p_offset), value.shape)
        if ASM:  # two roundings, as the library has them: a plain expression would become an fma
            value = tl.inline_asm_elementwise(
                "mul.rn.f32 $0, $1, $2;", "=f,f,f", [value, scale],
                dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
            return tl.inline_asm_elementwise(
                "add.rn.f32 $0, $1, $2;", "=f,f,f", [value, offset],
                dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return value * scale + offset
    else:
        return tl.load(p_scales + blocks, mask=mask, other=0.0)


@triton.jit
def code_tile(
    p_w, p_scales, p_map, p_scales2, p_offset, o_o, pid_k, m_o, K, row_bytes,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The bytes of a tile and the absmax of each, `[BO, BK / 2]`, where blocks lie within rows."""
    o_byte = pid_k * (BK // 2) + tl.arange(0, BK // 2)
    p_q = p_w + o_o.to(tl.int64)[:, None] * row_bytes + o_byte[None, :]
    b_q = tl.load(p_q, mask=m_o[:, None] & (o_byte < row_bytes)[None, :], other=0)
    S: tl.constexpr = BK // BLOCK if BK > BLOCK else 1  # blocks of a row of the tile
    o_s = pid_k * BK // BLOCK + tl.arange(0, S)
    blocks = o_o.to(tl.int64)[:, None] * (K // BLOCK) + o_s[None, :]
    m_s = m_o[:, None] & (o_s < K // BLOCK)[None, :]
    b_s = absmax_of(p_scales, p_map, p_scales2, p_offset, blocks, m_s, NESTED, ASM)  # [BO, S]
    b_s = tl.reshape(tl.broadcast_to(b_s[:, :, None], (BO, S, BK // 2 // S)), (BO, BK // 2))
    return b_q, b_s


@triton.jit
def pair_tile(
    p_w, p_scales, p_map, p_scales2, p_offset, o_o, pid_k, m_o, K, row_bytes,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, BO: tl.constexpr,
    BK: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Two weights of a row in each word, `[BO, BK / 2]` int32, the first in the low half.

    An element of the look-up is 16 bytes of codes and their one absmax, so that it is right in
    whatever layout the compiler has it: with `pack` it would be in one layout only.
    """
    BF16: tl.constexpr = _NF4_BF16 if FORMAT == "nf4" else _FP4_BF16
    FP16: tl.constexpr = _NF4_FP16 if FORMAT == "nf4" else _FP4_FP16
    LOOK_UP: tl.constexpr = BF16 if dtype == tl.bfloat16 else FP16
    G: tl.constexpr = BK // 32
    o_g = pid_k * G + tl.arange(0, G)
    o_row = o_o.to(tl.int64)[:, None]
    m_g = tl.full((BO, G), 1, tl.int1) if WHOLE else m_o[:, None] & (o_g < K // 32)[None, :]
    p_q = (p_w + (o_row * row_bytes + 16 * o_g[None, :])).to(tl.pointer_type(tl.int32))  # [BO, G]
    p_q = p_q[:, :, None] + tl.arange(0, 4)[None, None, :]
    b_q = tl.load(p_q, mask=m_g[:, :, None], other=0)  # [BO, G, 4]
    blocks = o_row * (K // BLOCK) + (o_g * 32 // BLOCK)[None, :]
    b_s = absmax_of(p_scales, p_map, p_scales2, p_offset, blocks, m_g, NESTED, ASM)  # [BO, G]
    even, odd = tl.split(tl.reshape(b_q, (BO, G, 2, 2)))
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    b = tl.inline_asm_elementwise(
        LOOK_UP, _LOOK_UP_OPERANDS, [q0, q1, q2, q3, b_s], dtype=_PAIRS, is_pure=True, pack=1
    )
    # A join adds the last dimension: the highest bit of a pair's number first.
    even = tl.join(_four(b[0], b[8], b[4], b[12]), _four(b[2], b[10], b[6], b[14]))
    odd = tl.join(_four(b[1], b[9], b[5], b[13]), _four(b[3], b[11], b[7], b[15]))
    return tl.reshape(tl.join(even, odd), (BO, BK // 2))


@triton.jit
def _four(b_0, b_1, b_2, b_3):
    return tl.join(tl.join(b_0, b_1), tl.join(b_2, b_3))


@triton.jit
def unpaired(b_pairs, BO: tl.constexpr, BK: tl.constexpr, dtype: tl.constexpr):
    """`[BO, BK]` in a 16-bit type from `[BO, BK / 2]` pairs."""
    low = (b_pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (b_pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), (BO, BK))


@triton.jit
def modulate_pairs(b_pairs, b_t, BO: tl.constexpr, BK: tl.constexpr, dtype: tl.constexpr):
    """`fma(w, t, w)` of pairs of 16-bit weights with `[BO, BK]` increments, t rounded first."""
    BF16: tl.constexpr = dtype == tl.bfloat16
    PACK: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if BF16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    FMA: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $1;" if BF16 else "fma.rn.f16x2 $0, $1, $2, $1;"
    even, odd = tl.split(tl.reshape(b_t, (BO, BK // 2, 2)))
    # Packed where the product leaves them: from there to the look-up's layout they go as words.
    b_t = tl.inline_asm_elementwise(
        PACK, "=r,f,f", [even, odd], dtype=tl.int32, is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        FMA, "=r,r,r", [b_pairs, b_t], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def stored_tile(
    p_w, p_scales, p_map, p_scales2, p_offset, p_table, o_o, pid_k, m_o, K, row_bytes,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, IN_ROWS: tl.constexpr,
    PAIRS: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The tile `[BO, BK]` of W0 at rows o_o and column `pid_k * BK`, as the library rounds it.

    int8: BLOCK is 1 where codes are over 127 (bitsandbytes), NESTED where rows have zero points.
    IN_ROWS: blocks lie within rows, so that a byte's two codes do, and share one absmax.
    PAIRS: weights are looked up in pairs of 16 bits, rounded in the block's table.
    """
    o_k = pid_k * BK + tl.arange(0, BK)
    m_k = within(o_k, K, WHOLE)
    if FORMAT == "int8":
        o_w = o_o.to(tl.int64)[:, None] * K + o_k[None, :]
        b_q = tl.load(p_w + o_w, mask=m_o[:, None] & m_k[None, :], other=0).to(tl.float32)
        if NESTED:
            b_q -= tl.load(p_map + o_o, mask=m_o, other=0).to(tl.float32)[:, None]
        b_w = b_q * tl.load(p_scales + o_o, mask=m_o, other=0.0)[:, None]
        if BLOCK:
            b_w = b_w * _RECIPROCAL
        return b_w.to(dtype)
    elif IN_ROWS:
        if PAIRS:
            b_pairs = pair_tile(
                p_w, p_scales, p_map, p_scales2, p_offset, o_o, pid_k, m_o, K, row_bytes,
                FORMAT, BLOCK, NESTED, BO, BK, ASM, dtype, WHOLE,
            )  # fmt: skip
            return unpaired(b_pairs, BO, BK, dtype)
        else:
            b_q, b_s = code_tile(
                p_w, p_scales, p_map, p_scales2, p_offset, o_o, pid_k, m_o, K, row_bytes,
                BLOCK, NESTED, BO, BK, ASM,
            )  # fmt: skip
            q = b_q.to(tl.int32)
            even, odd = tl.load(p_table + (q >> 4)) * b_s, tl.load(p_table + (q & 15)) * b_s
            return tl.reshape(tl.join(even.to(dtype), odd.to(dtype)), (BO, BK))
    else:
        index = o_o.to(tl.int64)[:, None] * K + o_k[None, :]
        mask = m_o[:, None] & m_k[None, :]
        q = tl.load(p_w + index // 2, mask=mask, other=0).to(tl.int32)
        q = tl.where(index % 2 == 0, q >> 4, q & 15)
        b_s = absmax_of(p_scales, p_map, p_scales2, p_offset, index // BLOCK, mask, NESTED, ASM)
        return (tl.load(p_table + q) * b_s).to(dtype)


def stored_operands(weight: Stored) -> tuple[Tensor, ...]:
    """The kernels' pointers to a stored weight: codes, scales (or stand-ins) and table."""
    scales = *weight.scales, *(weight.scales[:1] * (4 - len(weight.scales)))
    four = isinstance(weight, FourBit)
    table = _table(weight.form.name, weight.device) if four else weight.data
    return weight.data, *scales, table


def stored_options(weight: Stored, dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs of a stored weight that is read in `dtype`."""
    compiled = not triton.knobs.runtime.interpret
    if not isinstance(weight, FourBit):
        return {
            "FORMAT": "int8",
            "BLOCK": weight.form.sizes[2],
            "NESTED": len(weight.scales) > 1,
            "IN_ROWS": True,
            "PAIRS": False,
            "ASM": compiled,
        }
    # Codes are loaded as words.
    aligned = weight.data.data_ptr() % 16 == 0
    return {
        "FORMAT": weight.form.name,
        "BLOCK": weight.block,
        "NESTED": weight.nested,
        "IN_ROWS": weight.in_rows,
        "PAIRS": weight.in_rows and compiled and aligned and dtype.itemsize == 2,
        "ASM": compiled,
    }


def weight_operands(weight: Tensor | Stored) -> tuple[Any, ...]:
    """The pointers of `stored_operands` and the bytes of a row; a dense weight has but a pointer.

    An argument of None is a constant: the kernel of a dense weight stays as it is without.
    """
    if isinstance(weight, Stored):
        return *stored_operands(weight), weight.shape[1] // 2
    return weight, *[None] * 6


def weight_options(weight: Tensor | Stored, dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs of a weight that a kernel reads dense or stored; None each for a dense one."""
    if isinstance(weight, Stored):
        return {**stored_options(weight, dtype), "DTYPE": getattr(tl, dtype_name(dtype))}
    return dict.fromkeys(("FORMAT", "BLOCK", "NESTED", "IN_ROWS", "PAIRS", "ASM", "DTYPE"))


@functools.cache
def _table(name: str, device: torch.device) -> Tensor:
    return torch.tensor(TABLES[name], device=device)
