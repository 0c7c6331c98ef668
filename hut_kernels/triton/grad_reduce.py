"""Chunked factor gradients: G for a block of rows from cuBLAS, reduced while it is in L2."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer import FactorGrads, Layer, Needs, cast, finish_factor_grads
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
from .partial_sums import PartialSums
from .tiles import add_up, expert_of, group_of, left_tile, load_2d, right_tile, within


@triton.jit
def hut_grad_reduce_kernel(
    p_G,
    p_w,
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
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Rows `start ... start + rows` of G; d hut_A's partials go on from one block to the next.

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
            if NEED_P and not UNIFORM_Q:
                if TWO_SIDED:
                    b_q = group_of(o_k, r, K)[:, None] == o_r[None, :]  # [BK, BR]
                else:
                    b_q = load_2d(p_a, o_k, stride_ak, o_r, stride_ar, m_k, m_r)
                b_q = b_q.to(OPERAND)
            b_Q = tl.zeros((BR, BK), tl.float32)
            for tile_o in range(0, min(tiles_o, tl.cdiv(rows, BO) - o_split * tiles_o)):
                first_row = (o_split * tiles_o + tile_o) * BO
                o_row = first_row + tl.arange(0, BO)
                o_o = start + o_row
                m_o = within(o_row, rows, WHOLE)
                b_G = load_2d(p_G, o_row, K, o_k, 1, m_o, m_k)  # [BO, BK]
                b_w = load_2d(p_w, o_o, stride_wo, o_k, stride_wk, m_o, m_k)  # [BO, BK]
                b_h = b_G * b_w.to(tl.float32)
                if NEED_SUMS and first_r == 0:
                    add_up(p_sums + o_o, m_o, tl.sum(b_h, 1), tile_k == 0, ONE_TILE)
                if NEED_Q:
                    b_right = b_h
                    if HAS_GAMMA:
                        b_gamma = tl.load(p_gamma + o_o, mask=m_o, other=0.0)
                        b_right *= b_gamma.to(tl.float32)[:, None]
                    if TWO_SIDED:
                        b_right *= right_tile(
                            p_b, o_o, o_k, r, O, K, stride_bo, stride_br, UNIFORM_Q
                        )
                    if UNIFORM_P:
                        here = (o_r == group_of(start + first_row, r, O)).to(tl.float32)
                        b_Q += here[:, None] * tl.sum(b_right, 0)[None, :]
                    else:
                        if TWO_SIDED:
                            b_p = group_of(o_o, r, O)[None, :] == o_r[:, None]  # [BR, BO]
                        else:
                            b_p = load_2d(p_b, o_r, stride_br, o_o, stride_bo, m_r, m_o)
                        b_Q = tl.dot(
                            b_p.to(OPERAND), b_right.to(OPERAND), b_Q, input_precision=THIN
                        )
                if NEED_P:
                    b_left = b_h
                    if TWO_SIDED:
                        b_left *= left_tile(p_a, o_o, o_k, r, O, K, stride_ar, stride_ak, UNIFORM_P)
                    if UNIFORM_Q:
                        here = (o_r == group_of(first_k, r, K)).to(tl.float32)
                        b_P = tl.sum(b_left, 1)[:, None] * here[None, :]  # [BO, BR]
                    else:
                        b_P = tl.dot(b_left.to(OPERAND), b_q, input_precision=THIN)
                    o_P = o_o.to(tl.int64)[:, None] * r + o_r[None, :]
                    add_up(p_P + o_P, m_o[:, None] & m_r[None, :], b_P, tile_k == 0, ONE_TILE)
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
    reduced = _with_operands(layer, x.dtype)
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
        self.reduced = _with_operands(layer, dtype)
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


def _with_operands(layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer with its factors as the kernel multiplies by them.

    H0, and with it the factors, may be rounded to bf16; fp16 has not the range of a scaled loss.
    """
    if layer.spec.transform == "two_sided":
        return layer
    operand = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    hut_B = layer.hut_B if layer.gamma is None else layer.hut_B * layer.gamma[..., None]
    return layer._replace(hut_A=cast(layer.hut_A, operand), hut_B=cast(hut_B, operand), gamma=None)


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
            layer.weight,
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
            **options,
            **config.meta(),
        )


def gram(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`left^T right` in float32 into `out`; on CUDA the 16-bit operands stay as they are."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.mm(left.t(), right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float().t(), right.float(), out=out)
