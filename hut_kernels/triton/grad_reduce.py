"""Chunked factor gradients: G for a block of rows from cuBLAS, reduced while it is in L2."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer import FactorGrads, Layer, Needs, finish_factor_grads
from .launch import (
    LaunchConfig,
    cdiv,
    expert_strides,
    layer_strides,
    on_device,
    optional,
    padded_rank,
    transform_options,
)
from .partial_sums import PartialSums, with_operands
from .stored import stored_tile, weight_operands, weight_options
from .tiles import add_up, columns_tile, expert_of, load_2d, reduce_columns, reduce_rows, within


@triton.jit
def hut_grad_reduce_kernel(
    p_G,
    p_w,
    p_scales,
    p_map,
    p_scales2,
    p_offset,
    p_table,
    row_bytes,
    p_a,
    p_b,
    p_gamma,
    p_experts,
    p_Q,
    p_P,
    p_sums,
    start,
    rows,
    K,
    O,
    r,
    stride_wo,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bo,
    stride_br,
    stride_we,
    stride_ae,
    stride_be,
    tiles_o,
    tiles_k,
    o_splits,
    k_splits,
    NEED_Q: tl.constexpr,
    NEED_P: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    THIN: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_R: tl.constexpr,
    OPERAND: tl.constexpr,
    ONE_TILE: tl.constexpr,
    STACK: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    IN_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Rows `start ... start + rows` of G; d hut_A's partials go on from one block to the next.

    W0 is dense without a FORMAT; else it is read as it is stored, and rounded to DTYPE.

    A program keeps a tile of columns while it goes down its rows, so that Q's tile stays in
    registers and P's are written once; several tiles of columns (not ONE_TILE) only where their
    partials would take too much memory, several pieces of r only where BR does not hold it. With
    STACK it is one of several experts, of which G holds all rows.
    """
    expert, place, pid = expert_of(p_experts, o_splits * k_splits, STACK)
    if STACK:
        p_G += place * O * K
        p_w += expert * stride_we
        p_a += expert * stride_ae
        p_b += expert * stride_be
        p_gamma += expert * O
        p_Q += place * o_splits * r * K
        p_P += place * k_splits * O * r
        p_sums += place * k_splits * O
    o_split = pid // k_splits
    k_split = pid % k_splits
    p_Q += o_split.to(tl.int64) * r * K
    p_P += k_split.to(tl.int64) * O * r
    p_sums += k_split.to(tl.int64) * O
    for tile_k in range(0, min(tiles_k, tl.cdiv(K, BK) - k_split * tiles_k)):
        first_k = (k_split * tiles_k + tile_k) * BK
        o_k = first_k + tl.arange(0, BK)
        m_k = within(o_k, K, WHOLE)
        for first_r in range(0, r, BR):
            o_r = first_r + tl.arange(0, BR)
            m_r = within(o_r, r, WHOLE_R)
            b_q = columns_tile(
                p_a, o_k, o_r, m_k, m_r, r, K, stride_ar, stride_ak, TWO_SIDED, OPERAND
            )  # [BK, BR]
            b_Q = tl.zeros((BR, BK), tl.float32)
            for tile_o in range(0, min(tiles_o, tl.cdiv(rows, BO) - o_split * tiles_o)):
                first_row = (o_split * tiles_o + tile_o) * BO
                o_row = first_row + tl.arange(0, BO)
                o_o = start + o_row
                m_o = within(o_row, rows, WHOLE)
                b_G = load_2d(p_G, o_row, K, o_k, 1, m_o, m_k)  # [BO, BK]
                if FORMAT is None:
                    b_w = load_2d(p_w, o_o, stride_wo, o_k, stride_wk, m_o, m_k)  # [BO, BK]
                else:
                    b_w = stored_tile(
                        p_w, p_scales, p_map, p_scales2, p_offset, p_table, o_o,
                        k_split * tiles_k + tile_k, m_o, K, row_bytes, FORMAT, BLOCK, NESTED,
                        IN_ROWS, PAIRS, BO, BK, ASM, DTYPE, WHOLE,
                    )  # fmt: skip
                b_h = b_G * b_w.to(tl.float32)
                if NEED_SUMS and first_r == 0:
                    add_up(p_sums + o_o, m_o, tl.sum(b_h, 1), tile_k == 0, ONE_TILE)
                if NEED_Q:
                    b_Q = reduce_rows(
                        b_h, b_Q, p_b, p_gamma, start + first_row, o_o, o_k, o_r, m_o, m_r, r, O, K,
                        stride_bo, stride_br, HAS_GAMMA, TWO_SIDED, UNIFORM_P, UNIFORM_Q, OPERAND,
                        THIN,
                    )  # fmt: skip
                if NEED_P:
                    reduce_columns(
                        b_h, b_q, p_a, p_P, first_k, o_o, o_k, o_r, m_o, m_r, tile_k == 0, r, O, K,
                        stride_ar, stride_ak, TWO_SIDED, UNIFORM_P, UNIFORM_Q, OPERAND, THIN,
                        ONE_TILE,
                    )  # fmt: skip
            if NEED_Q:
                o_Q = o_r.to(tl.int64)[:, None] * K + o_k[None, :]
                add_up(p_Q + o_Q, m_r[:, None] & m_k[None, :], b_Q, start == 0, False)
        if not ONE_TILE:
            tl.debug_barrier()  # the next visit may read through another thread of this program


def launch_grad_reduce(
    grad: Tensor,
    x: Tensor,
    layer: Layer,
    needs: Needs,
    config: LaunchConfig,
    splits: tuple[int, int],
    chunk: int,
) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W G` from grad `[N, O]` and x `[N, K]`, where needed.

    `chunk` is the rows of G made at a time (float32); a program takes one of the `splits` of a
    chunk's rows and of K.
    """
    O, K, _ = layer.sizes
    partials = PartialSums(x, layer, splits, needs)
    reduced = with_operands(layer, x.dtype)
    G = torch.empty((min(chunk, O), K), dtype=torch.float32, device=x.device)  # all that is alive
    for start in range(0, O, chunk):
        rows = min(chunk, O - start)
        gram(grad[:, start : start + rows], x, out=G[:rows])
        _launch(G, reduced, partials, x.dtype, config, splits, (start, rows, chunk))
    return partials.finish()


class ExpertsReduction:
    """The factor gradients of a stack of experts, reduced a group of them at a time.

    Args:
        layer: The stack's operands, `[experts, ...]` each.
        dtype: The compute type.
        needs: The gradients that are asked for.
        config: The launch config.
        splits: The programs of an expert, by rows and by columns.
    """

    def __init__(
        self,
        layer: Layer,
        dtype: torch.dtype,
        needs: Needs,
        config: LaunchConfig,
        splits: tuple[int, int],
    ) -> None:
        self.layer, self.dtype, self.needs = layer, dtype, needs
        self.config, self.splits = config, splits
        self.reduced = with_operands(layer, dtype)
        one = PartialSums(layer.weight, layer, (1, 1), needs, (len(layer.weight),))
        self.Q, self.P, self.sums = (None if t is None else t.zero_() for t in one.add())

    def add(self, G: Tensor, experts: Tensor) -> None:
        """Reduces `G = grad^T x`, `[group, O, K]`, of those experts, int64, in one launch."""
        O = self.layer.sizes[0]
        partials = PartialSums(G, self.layer, self.splits, self.needs, (len(experts),))
        rows = 0, O, O
        _launch(G, self.reduced, partials, self.dtype, self.config, self.splits, rows, experts)
        for total, part in zip((self.Q, self.P, self.sums), partials.add(), strict=True):
            if total is not None and part is not None:
                total.index_copy_(0, experts, part)

    def finish(self) -> FactorGrads:
        """`d hut_A`, `d hut_B`, `sum_i W G`, `[experts, ...]`: zeros where nothing was added."""
        return finish_factor_grads(self.Q, self.P, self.sums, self.layer, self.needs)


def _launch(
    G: Tensor,
    layer: Layer,
    partials: PartialSums,
    dtype: torch.dtype,
    config: LaunchConfig,
    splits: tuple[int, int],
    block: tuple[int, int, int],
    experts: Tensor | None = None,
) -> None:
    """Reduces rows of G: the first one's number, how many, and how many most launches have."""
    (O, K, r), (o_splits, k_splits) = layer.sizes, splits
    start, rows, chunk = block
    options = transform_options(layer, dtype, config)
    options["WHOLE"] &= chunk % config.BO == 0
    BR = min(padded_rank(r), config.BN)
    tiles_k = cdiv(cdiv(K, config.BK), k_splits)
    programs = o_splits * k_splits
    with on_device(G):
        hut_grad_reduce_kernel[(programs if experts is None else programs * len(experts),)](
            G,
            *weight_operands(layer.weight),
            layer.hut_A,
            layer.hut_B,
            optional(layer.gamma, G),
            optional(experts, G),
            partials.Q,
            partials.P,
            partials.sums,
            start,
            rows,
            K,
            O,
            r,
            *layer_strides(layer),
            *expert_strides(layer),
            cdiv(cdiv(chunk, config.BO), o_splits),
            tiles_k,
            o_splits,
            k_splits,
            NEED_Q=partials.NEED_Q,
            NEED_P=partials.NEED_P,
            NEED_SUMS=partials.NEED_SUMS,
            HAS_GAMMA=layer.gamma is not None,
            OPERAND=tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
            ONE_TILE=tiles_k == 1,
            STACK=experts is not None,
            BR=BR,
            WHOLE_R=r % BR == 0,
            **weight_options(layer.weight, dtype),
            **options,
            **config.meta(),
        )


def gram(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`left^T right` in float32 into `out`; on CUDA the 16-bit operands stay as they are."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.mm(left.t(), right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float().t(), right.float(), out=out)
