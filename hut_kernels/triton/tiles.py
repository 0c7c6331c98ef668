"""The kernels' shared device functions: groups, multiplier and weight tiles, the reduction.

Sizes: N tokens, K in_features, O out_features, r the rank and BR its padding to a power of two of
at least 16 (the least inner size of `tl.dot`). Names: `p_` pointer, `b_` block value, `o_` offsets,
`m_` mask. Offsets are int64 wherever a stride multiplies them.
"""

import triton
import triton.language as tl


@triton.jit
def group_of(index, r, size):
    """The group functions q(i) and p(o): `floor(index * r / size)`."""
    return index * r // size


@triton.jit
def ordered_tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of a 1-D grid, in column order within groups of GROUP tile rows, for L2 reuse."""
    width = GROUP * tiles_n
    first = pid // width * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + pid % width % rows, pid % width // rows


@triton.jit
def expert_of(p_experts, programs, STACK: tl.constexpr):
    """A program's place: expert in the stack, expert in the group, number among an expert's own.

    Each expert of the group has as many `programs`; without STACK there is one, a layer.
    """
    pid = tl.program_id(0)
    if STACK:
        place = pid // programs
        return tl.load(p_experts + place), place.to(tl.int64), pid % programs
    else:
        return 0, 0, pid


@triton.jit
def within(o, size, WHOLE: tl.constexpr):
    """The mask `o < size`; with WHOLE a constant, which the compiler drops."""
    if WHOLE:
        return tl.full(o.shape, 1, tl.int1)
    else:
        return o < size


@triton.jit
def load_2d(p, o_rows, stride_row, o_columns, stride_column, m_rows, m_columns):
    """A tile `[len(o_rows), len(o_columns)]`, zero outside the masks."""
    o_rows = o_rows.to(tl.int64)
    o_columns = o_columns.to(tl.int64)
    offsets = o_rows[:, None] * stride_row + o_columns[None, :] * stride_column
    return tl.load(p + offsets, mask=m_rows[:, None] & m_columns[None, :], other=0.0)


@triton.jit
def load_tile(
    p, row, column, rows, columns, stride_row, stride_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr = False,
    WRAP: tl.constexpr = False,
):  # fmt: skip
    """The tile `[HEIGHT, WIDTH]` at (row, column) of a `[rows, columns]` matrix, zero outside.

    WHOLE: no tile reaches past the end, so that the loop over tiles holds no masks. WRAP: rows may,
    and begin again at the first, for their results are not stored; nor do they need a mask.
    """
    if TMA:
        return p.load([row, column])
    else:
        o_rows = row + tl.arange(0, HEIGHT)
        o_columns = column + tl.arange(0, WIDTH)
        if WHOLE:
            # Rows as a scalar, which no thread multiplies. Columns not: an index that two products
            # have in common would tell Triton that one feeds the other (`unchain`).
            if WRAP:
                o_rows %= rows
            else:
                o_rows = tl.arange(0, HEIGHT)
                p += tl.cast(row, tl.int64) * stride_row
            o_rows = o_rows.to(tl.int64)
            o_columns = o_columns.to(tl.int64)
            return tl.load(p + o_rows[:, None] * stride_row + o_columns[None, :] * stride_column)
        else:
            return load_2d(
                p, o_rows, stride_row, o_columns, stride_column, o_rows < rows, o_columns < columns
            )


@triton.jit
def factor_tile(
    p, row, column, rows, columns, stride_row, stride_column, scaling,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A tile of a low-rank factor in `dtype`, `scaling` folded in (before any rounding)."""
    b = load_tile(
        p, row, column, rows, columns, stride_row, stride_column, HEIGHT, WIDTH, False
    )  # fmt: skip
    return (b.to(tl.float32) * scaling).to(dtype)


@triton.jit
def two_sided_tile(
    p_a, p_b, o_o, o_k, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
    UNIFORM_P: tl.constexpr, UNIFORM_Q: tl.constexpr,
):  # fmt: skip
    """`B[o, q(i)] * A[p(o), i]`, `[BO, BK]` in float32.

    UNIFORM_P, UNIFORM_Q: all rows (columns) of each tile lie in one group, so a vector serves.
    """
    return (
        right_tile(p_b, o_o, o_k, r, O, K, stride_bo, stride_br, UNIFORM_Q)
        * left_tile(p_a, o_o, o_k, r, O, K, stride_ar, stride_ak, UNIFORM_P)
    )  # fmt: skip


@triton.jit
def left_tile(p_a, o_o, o_k, r, O, K, stride_ar, stride_ak, UNIFORM_P: tl.constexpr):
    """`A[p(o), i]`, float32: `[1, BK]` where all rows are in one group, else `[BO, BK]`."""
    if UNIFORM_P:
        p = group_of(tl.min(o_o, 0), r, O).to(tl.int64)
        o_a = p * stride_ar + o_k.to(tl.int64) * stride_ak
        b_a = tl.load(p_a + o_a, mask=o_k < K, other=0.0)[None, :]
    else:
        b_a = load_2d(p_a, group_of(o_o, r, O), stride_ar, o_k, stride_ak, o_o < O, o_k < K)
    return b_a.to(tl.float32)


@triton.jit
def right_tile(p_b, o_o, o_k, r, O, K, stride_bo, stride_br, UNIFORM_Q: tl.constexpr):
    """`B[o, q(i)]`, float32: `[BO, 1]` where all columns are in one group, else `[BO, BK]`."""
    if UNIFORM_Q:
        q = group_of(tl.min(o_k, 0), r, K).to(tl.int64)
        o_b = o_o.to(tl.int64) * stride_bo + q * stride_br
        b_b = tl.load(p_b + o_b, mask=o_o < O, other=0.0)[:, None]
    else:
        b_b = load_2d(p_b, o_o, stride_bo, group_of(o_k, r, K), stride_br, o_o < O, o_k < K)
    return b_b.to(tl.float32)


@triton.jit
def modulate(b_w, b_t, constant, RESIDUAL: tl.constexpr, dtype: tl.constexpr):
    """`w * (constant + t)` rounded once to `dtype`; RESIDUAL is the case `fma(w, t, w)`.

    Rounding the increment t to 16 bits leaves its relative error small; rounding T first would not.
    """
    if RESIDUAL:
        if b_w.dtype == dtype:
            return tl.fma(b_w, b_t.to(dtype), b_w)
        else:
            w = b_w.to(tl.float32)
            return tl.fma(w, b_t, w).to(dtype)
    else:
        return (b_w.to(tl.float32) * (constant + b_t)).to(dtype)


@triton.jit
def keep_wgmma_async(acc, WGMMA_ASYNC: tl.constexpr):
    """A use of the accumulator right behind `tl.dot`, without effect.

    With a register operand computed in the loop, ptxas for sm_90 otherwise serializes the wgmma's
    (C7515). The interpreter has no inline assembly, hence the switch.
    """
    if WGMMA_ASYNC:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return acc


@triton.jit
def unchain(b, UNCHAIN: tl.constexpr):
    """The tile as it is, hidden from the product that it comes from.

    Of two products of which one feeds the other Triton arranges the warps alike, all along one
    dimension: where T has few rows, several warps make the same tile of it. It does not look across
    a transpose, and the assembly, without effect, keeps two from canceling each other out. The
    interpreter has none, hence the switch.
    """
    if UNCHAIN:
        pack: tl.constexpr = 32 // b.dtype.primitive_bitwidth
        b = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [tl.trans(b)], dtype=b.dtype, is_pure=True, pack=pack
        )
        return tl.trans(b)
    else:
        return b


@triton.jit
def add_up(p, mask, value, first, ONLY: tl.constexpr):
    """`*p = value` on the first visit (all there is with ONLY), `*p += value` later."""
    if ONLY or first:
        tl.store(p, value, mask=mask)
    else:
        tl.store(p, tl.load(p, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def columns_tile(
    p_a, o_k, o_r, m_k, m_r, r, K, stride_ar, stride_ak, TWO_SIDED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """The right side of a tile of H0 in its piece of P, `[BK, BR]`: `A^T`, or a one-hot tile."""
    if TWO_SIDED:
        b_q = group_of(o_k, r, K)[:, None] == o_r[None, :]
    else:
        b_q = load_2d(p_a, o_k, stride_ak, o_r, stride_ar, m_k, m_r)
    return b_q.to(OPERAND)


# The reductions of a tile of `H0 = G * W0`, `[BO, BK]` float32, zero in rows past O and columns
# past K. low_rank:  `P = H0 A^T`, `Q = (gamma B)^T H0`.
# two_sided: `P[o, k] = sum_{q(i)=k} H0 A[p(o), i]`, `Q[k, i] = sum_{p(o)=k} H0 gamma B[o, q(i)]`;
# a plain sum where the tile lies in one group, else a product with a one-hot tile.


@triton.jit
def reduce_rows(
    b_h, b_Q, p_b, p_gamma, first_o, o_o, o_k, o_r, m_o, m_r, r, O, K, stride_bo, stride_br,
    HAS_GAMMA: tl.constexpr, TWO_SIDED: tl.constexpr, UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr, OPERAND: tl.constexpr, THIN: tl.constexpr,
):  # fmt: skip
    """The tile `b_Q`, `[BR, BK]`, with that of H0 added to it."""
    b_right = b_h
    if HAS_GAMMA:
        b_gamma = tl.load(p_gamma + o_o, mask=m_o, other=0.0)
        b_right *= b_gamma.to(tl.float32)[:, None]
    if TWO_SIDED:
        b_right *= right_tile(p_b, o_o, o_k, r, O, K, stride_bo, stride_br, UNIFORM_Q)
    if UNIFORM_P:
        here = (o_r == group_of(first_o, r, O)).to(tl.float32)
        return b_Q + here[:, None] * tl.sum(b_right, 0)[None, :]
    else:
        if TWO_SIDED:
            b_p = group_of(o_o, r, O)[None, :] == o_r[:, None]  # [BR, BO]
        else:
            b_p = load_2d(p_b, o_r, stride_br, o_o, stride_bo, m_r, m_o)
        return tl.dot(b_p.to(OPERAND), b_right.to(OPERAND), b_Q, input_precision=THIN)


@triton.jit
def reduce_columns(
    b_h, b_q, p_a, p_P, first_k, o_o, o_k, o_r, m_o, m_r, first_visit, r, O, K, stride_ar,
    stride_ak, TWO_SIDED: tl.constexpr, UNIFORM_P: tl.constexpr, UNIFORM_Q: tl.constexpr,
    OPERAND: tl.constexpr, THIN: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Writes a tile of P, or adds to it, in `p_P`, `[O, r]`: this program's own partials, float32.

    b_q: of `columns_tile`. first_visit: whether it is the program's first to these rows; with
    ONE_TILE there is no other.
    """
    b_left = b_h
    if TWO_SIDED:
        b_left *= left_tile(p_a, o_o, o_k, r, O, K, stride_ar, stride_ak, UNIFORM_P)
    if UNIFORM_Q:
        here = (o_r == group_of(first_k, r, K)).to(tl.float32)
        b_P = tl.sum(b_left, 1)[:, None] * here[None, :]  # [BO, BR]
    else:
        b_P = tl.dot(b_left.to(OPERAND), b_q, input_precision=THIN)
    o_P = o_o.to(tl.int64)[:, None] * r + o_r[None, :]
    add_up(p_P + o_P, m_o[:, None] & m_r[None, :], b_P, first_visit, ONE_TILE)


@triton.jit
def scale_shift(acc, p_bias, p_gamma, p_beta, o_o, m_o,
    HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
):  # fmt: skip
    """`gamma * (acc + bias) + beta` along the columns, `[BN, BO]`."""
    if HAS_BIAS:
        acc += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    if HAS_GAMMA:
        acc *= tl.load(p_gamma + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    if HAS_BETA:
        acc += tl.load(p_beta + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    return acc
