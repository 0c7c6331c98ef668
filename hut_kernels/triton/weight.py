"""The weight kernel: `gamma (W0 * T)` materialized, for staged GEMMs and for merging."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer import Layer
from .launch import LaunchConfig, cdiv, layer_strides, multiplier_options, on_device, optional
from .tiles import factor_tile, load_2d, modulate, ordered_tile, two_sided_tile


@triton.jit
def hut_weight_kernel(
    p_w,
    p_a,
    p_b,
    p_gamma,
    p_out,
    K,
    O,
    r,
    stride_wo,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bo,
    stride_br,
    stride_oo,
    stride_ok,
    constant,
    scaling,
    HAS_GAMMA: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_R: tl.constexpr,
    THIN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of `gamma (W0 * (constant + t))`."""
    pid_o, pid_k = ordered_tile(tl.program_id(0), tl.cdiv(O, BO), tl.cdiv(K, BK), GROUP)
    o_o = pid_o * BO + tl.arange(0, BO)
    o_k = pid_k * BK + tl.arange(0, BK)
    m_o = o_o < O
    m_k = o_k < K
    dtype: tl.constexpr = p_out.dtype.element_ty

    b_w = load_2d(p_w, o_o, stride_wo, o_k, stride_wk, m_o, m_k)  # [BO, BK]
    if TWO_SIDED:
        b_t = two_sided_tile(
            p_a, p_b, o_o, o_k, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
            UNIFORM_P, UNIFORM_Q,
        )  # fmt: skip
    else:
        b_b = factor_tile(
            p_b, pid_o * BO, 0, O, r, stride_bo, stride_br, scaling, BO, BR, FACTOR
        )  # [BO, BR]
        b_a = factor_tile(p_a, 0, pid_k * BK, r, K, stride_ar, stride_ak, 1.0, BR, BK, FACTOR)
        b_t = tl.dot(b_b, b_a, input_precision=THIN)  # [BO, BK]
    if HAS_GAMMA:
        gamma = tl.load(p_gamma + o_o, mask=m_o, other=0.0).to(tl.float32)
        b_t = (constant + b_t) * gamma[:, None]
        b_W = modulate(b_w, b_t, 0.0, False, dtype)
    else:
        b_W = modulate(b_w, b_t, constant, RESIDUAL, dtype)
    offsets = o_o.to(tl.int64)[:, None] * stride_oo + o_k.to(tl.int64)[None, :] * stride_ok
    tl.store(p_out + offsets, b_W, mask=m_o[:, None] & m_k[None, :])


def launch_weight(
    layer: Layer,
    dtype: torch.dtype,
    config: LaunchConfig,
    subtract_identity: bool = False,
    exact: bool = False,
) -> Tensor:
    """`gamma (W0 * T)`, `[O, K]`, rounded once to `dtype`, with weight's strides.

    With `subtract_identity` it is `gamma (W0 * (T - 1))`, the second matrix of `split`. `exact`
    forms T in float32 throughout, for weights that outlive the step; a step's own W may take T from
    tf32, or its increment from bf16.
    """
    O, K, r = layer.sizes
    out = torch.empty_like(layer.weight, dtype=dtype)
    rounds = not exact or dtype == torch.float32  # there an increment's form rounds nothing
    residual = layer.gamma is None and not subtract_identity and rounds
    options = multiplier_options(layer, dtype, config, residual)
    if exact:
        options["THIN"] = "ieee"
    with on_device(out):
        hut_weight_kernel[(cdiv(O, config.BO) * cdiv(K, config.BK),)](
            layer.weight,
            layer.hut_A,
            layer.hut_B,
            optional(layer.gamma, out),
            out,
            K,
            O,
            r,
            *layer_strides(layer),
            *out.stride(),
            layer.spec.constant - subtract_identity,
            layer.spec.scaling,
            HAS_GAMMA=layer.gamma is not None,
            GROUP=config.GROUP,
            **options,
            **config.meta(),
        )
    return out
