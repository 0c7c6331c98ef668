"""The second stage of split-K: the partial sums of a GEMM added in order, and its epilogue."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import FP_FUSION, cdiv, optional
from .tiles import scale_shift


@triton.jit(do_not_specialize=["N", "num_splits"])
def hut_split_k_kernel(
    p_partials,
    p_bias,
    p_gamma,
    p_beta,
    p_y,
    N,
    O,
    num_splits,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
):
    """One tile of y: the epilogue of its partial sums, p_partials [num_splits, N, O]."""
    pid_n, pid_o = tl.program_id(0) // tl.cdiv(O, BO), tl.program_id(0) % tl.cdiv(O, BO)
    o_n = pid_n * BN + tl.arange(0, BN)
    o_o = pid_o * BO + tl.arange(0, BO)
    m_o = o_o < O
    mask = (o_n < N)[:, None] & m_o[None, :]
    acc = tl.zeros((BN, BO), tl.float32)
    for split_k in range(num_splits):
        o_partial = (split_k * N + o_n).to(tl.int64)[:, None] * O + o_o[None, :]
        acc += tl.load(p_partials + o_partial, mask=mask, other=0.0)
    acc = scale_shift(acc, p_bias, p_gamma, p_beta, o_o, m_o, HAS_BIAS, HAS_GAMMA, HAS_BETA)
    o_y = o_n.to(tl.int64)[:, None] * O + o_o[None, :]
    tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), mask=mask)


def add_partial_sums(
    partials: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> None:
    """`y = gamma * (sum of partials + bias) + beta`, from partials `[num_splits, N, O]` float32."""
    num_splits, N, O = partials.shape
    BN, BO = 4, 128
    hut_split_k_kernel[(cdiv(N, BN) * cdiv(O, BO),)](
        partials,
        optional(bias, y),
        optional(gamma, y),
        optional(beta, y),
        y,
        N,
        O,
        num_splits,
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        HAS_BETA=beta is not None,
        BN=BN,
        BO=BO,
        num_warps=4,
        **FP_FUSION,
    )
