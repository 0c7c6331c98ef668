"""Fused input gradient: `dx = (gamma * g) W` with W made again tile by tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition import Spec
from .launch import Row, cdiv, multiplier_options, on_device, optional, product_precision
from .tiles import factor_tile, load_2d, modulate, multiplier_tile, ordered_tile, settle


@triton.jit
def hut_grad_input_kernel(
    p_g,
    p_w,
    p_a,
    p_b,
    p_gamma,
    p_dx,
    N,
    K,
    O,
    r,
    stride_gn,
    stride_go,
    stride_wo,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bo,
    stride_br,
    constant,
    scaling,
    HAS_GAMMA: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr,
    THIN: tl.constexpr,
    PRECISION: tl.constexpr,
    SETTLE: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid_n, pid_k = ordered_tile(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(K, BK), GROUP)
    o_n = pid_n * BN + tl.arange(0, BN)
    o_k = pid_k * BK + tl.arange(0, BK)
    m_n = o_n < N
    m_k = o_k < K
    dtype: tl.constexpr = p_g.dtype.element_ty

    acc = tl.zeros((BN, BK), tl.float32)
    for o in range(0, O, BO):
        o_o = o + tl.arange(0, BO)
        m_o = o_o < O
        b_g = load_2d(p_g, o_n, stride_gn, o_o, stride_go, m_n, m_o)  # [BN, BO]
        b_w = load_2d(p_w, o_o, stride_wo, o_k, stride_wk, m_o, m_k)  # [BO, BK]
        b_b = factor_tile(p_b, o_o, r, O, stride_bo, stride_br, scaling, BR, FACTOR)  # [BO, BR]
        b_t = multiplier_tile(
            b_b, p_a, p_b, o_o, o_k, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
            TWO_SIDED, UNIFORM_P, UNIFORM_Q, BR, THIN,
        )  # fmt: skip
        if HAS_GAMMA:
            # gamma joins the multiplier in float32, so that W is still rounded once.
            gamma = tl.load(p_gamma + o_o, mask=m_o, other=0.0).to(tl.float32)
            b_t = (constant + b_t) * gamma[:, None]
            b_W = modulate(b_w, b_t, 0.0, False, dtype)
        else:
            b_W = modulate(b_w, b_t, constant, RESIDUAL, dtype)
        acc = tl.dot(b_g, b_W, acc, input_precision=PRECISION)
        acc = settle(acc, SETTLE)

    o_dx = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_dx + o_dx, acc.to(dtype), mask=m_n[:, None] & m_k[None, :])


def grad_input(
    grad: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    row: Row,
) -> Tensor:
    """`[N, K]` from grad `[N, O]`, any strides; one launch of `row`'s tiles."""
    (N, O), K = grad.shape, weight.shape[1]
    dx = torch.empty((N, K), dtype=grad.dtype, device=grad.device)
    grid = (cdiv(N, row.BN) * cdiv(K, row.BK),)
    with on_device(grad):
        hut_grad_input_kernel[grid](
            grad,
            weight,
            hut_A,
            hut_B,
            optional(gamma, grad),
            dx,
            N,
            K,
            O,
            len(hut_A),
            *grad.stride(),
            *weight.stride(),
            *hut_A.stride(),
            *hut_B.stride(),
            spec.constant,
            spec.scaling,
            HAS_GAMMA=gamma is not None,
            PRECISION=product_precision(grad.dtype),
            SETTLE=row.settle,
            BN=row.BN,
            GROUP=row.GROUP,
            **multiplier_options(weight, hut_A, spec, grad.dtype, row, residual=gamma is None),
            **row.meta(),
        )
    return dx
