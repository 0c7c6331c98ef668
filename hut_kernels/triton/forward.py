"""Fused forward: `y = gamma * (x W^T + bias) + beta` with W made tile by tile, never stored.

Where few tokens leave most of the device idle, several programs share K: each writes a float32
partial of its tile, and a second kernel adds them in order, so that two runs agree to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition import Spec
from .launch import Row, cdiv, multiplier_options, on_device, optional, product_precision
from .tiles import factor_tile, load_2d, modulate, multiplier_tile, ordered_tile, settle


@triton.jit
def hut_forward_kernel(
    p_x,
    p_w,
    p_a,
    p_b,
    p_bias,
    p_gamma,
    p_beta,
    p_y,
    N,
    K,
    O,
    r,
    stride_xn,
    stride_xk,
    stride_wo,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bo,
    stride_br,
    constant,
    scaling,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr,
    THIN: tl.constexpr,
    PRECISION: tl.constexpr,
    SETTLE: tl.constexpr,
    W_FIRST: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of y; with SPLIT > 1 its sum over one of SPLIT parts of K, to p_y [SPLIT, N, O]."""
    pid = tl.program_id(0) // SPLIT
    split = tl.program_id(0) % SPLIT
    pid_n, pid_o = ordered_tile(pid, tl.cdiv(N, BN), tl.cdiv(O, BO), GROUP)
    o_n = pid_n * BN + tl.arange(0, BN)
    o_o = pid_o * BO + tl.arange(0, BO)
    m_n = o_n < N
    m_o = o_o < O
    dtype: tl.constexpr = p_x.dtype.element_ty
    b_b = factor_tile(p_b, o_o, r, O, stride_bo, stride_br, scaling, BR, FACTOR)  # [BO, BR]

    acc = tl.zeros((BO, BN) if W_FIRST else (BN, BO), tl.float32)
    part = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    for k in range(split * part, min(K, (split + 1) * part), BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < K
        b_w = load_2d(p_w, o_o, stride_wo, o_k, stride_wk, m_o, m_k)  # [BO, BK]
        b_t = multiplier_tile(
            b_b, p_a, p_b, o_o, o_k, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
            TWO_SIDED, UNIFORM_P, UNIFORM_Q, BR, THIN,
        )  # fmt: skip
        b_W = modulate(b_w, b_t, constant, RESIDUAL, dtype)
        if W_FIRST:
            b_x = load_2d(p_x, o_k, stride_xk, o_n, stride_xn, m_k, m_n)  # [BK, BN]
            acc = tl.dot(b_W, b_x, acc, input_precision=PRECISION)
        else:
            b_x = load_2d(p_x, o_n, stride_xn, o_k, stride_xk, m_n, m_k)  # [BN, BK]
            acc = tl.dot(b_x, tl.trans(b_W), acc, input_precision=PRECISION)
        acc = settle(acc, SETTLE)

    if W_FIRST:
        acc = tl.trans(acc)
    if SPLIT == 1:
        acc = affine(acc, p_bias, p_gamma, p_beta, o_o, m_o, HAS_BIAS, HAS_GAMMA, HAS_BETA)
    o_y = (split * N + o_n).to(tl.int64)[:, None] * O + o_o[None, :]
    tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), mask=m_n[:, None] & m_o[None, :])


@triton.jit
def hut_forward_finish_kernel(
    p_partial,
    p_bias,
    p_gamma,
    p_beta,
    p_y,
    N,
    O,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
):
    """The second stage: the SPLIT partials of a tile added in order, then the epilogue."""
    tiles_o = tl.cdiv(O, BO)
    o_n = tl.program_id(0) // tiles_o * BN + tl.arange(0, BN)
    o_o = tl.program_id(0) % tiles_o * BO + tl.arange(0, BO)
    m_o = o_o < O
    mask = (o_n < N)[:, None] & m_o[None, :]
    acc = tl.zeros((BN, BO), tl.float32)
    for split in tl.static_range(SPLIT):
        o_partial = (split * N + o_n).to(tl.int64)[:, None] * O + o_o[None, :]
        acc += tl.load(p_partial + o_partial, mask=mask, other=0.0)
    acc = affine(acc, p_bias, p_gamma, p_beta, o_o, m_o, HAS_BIAS, HAS_GAMMA, HAS_BETA)
    o_y = o_n.to(tl.int64)[:, None] * O + o_o[None, :]
    tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def affine(
    acc,
    p_bias,
    p_gamma,
    p_beta,
    o_o,
    m_o,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
):
    """The epilogue `gamma * (acc + bias) + beta` on a tile `[BN, BO]`."""
    if HAS_BIAS:
        acc += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    if HAS_GAMMA:
        acc *= tl.load(p_gamma + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    if HAS_BETA:
        acc += tl.load(p_beta + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    return acc


def forward(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    spec: Spec,
    row: Row,
    split: int = 1,
) -> Tensor:
    """`[N, O]` from x `[N, K]`, any strides, with `split` programs over K for each tile."""
    (N, K), O = x.shape, len(weight)
    y = torch.empty((N, O), dtype=x.dtype, device=x.device)
    out = y if split == 1 else torch.empty((split, N, O), dtype=torch.float32, device=x.device)
    tiles = cdiv(N, row.BN) * cdiv(O, row.BO)
    vectors = tuple(optional(vector, x) for vector in (bias, gamma, beta))
    has = {
        "HAS_BIAS": bias is not None,
        "HAS_GAMMA": gamma is not None,
        "HAS_BETA": beta is not None,
        "SPLIT": split,
        "BN": row.BN,
    }
    with on_device(x):
        hut_forward_kernel[(tiles * split,)](
            x,
            weight,
            hut_A,
            hut_B,
            *vectors,
            out,
            N,
            K,
            O,
            len(hut_A),
            *x.stride(),
            *weight.stride(),
            *hut_A.stride(),
            *hut_B.stride(),
            spec.constant,
            spec.scaling,
            PRECISION=product_precision(x.dtype),
            SETTLE=row.settle,
            W_FIRST=row.W_FIRST,
            GROUP=row.GROUP,
            **has,
            **multiplier_options(weight, hut_A, spec, x.dtype, row, residual=True),
            **row.meta(),
        )
        if split > 1:
            hut_forward_finish_kernel[(tiles,)](out, *vectors, y, N, O, BO=row.BO, **has)
    return y
