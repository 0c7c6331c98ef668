"""The weight kernel: `gamma (W0 * T)` materialized, for staged GEMMs and for merging."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer import Layer, cast
from .launch import (
    LaunchConfig,
    cdiv,
    expert_strides,
    layer_strides,
    multiplier_options,
    on_device,
    optional,
)
from .tiles import expert_of, factor_tile, load_2d, modulate, ordered_tile, two_sided_tile


@triton.jit
def hut_weight_kernel(
    p_w,
    p_a,
    p_b,
    p_gamma,
    p_experts,
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
    stride_we,
    stride_ae,
    stride_be,
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
    STACK: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of `gamma (W0 * (constant + t))`, with STACK of one of several experts."""
    tiles_o, tiles_k = tl.cdiv(O, BO), tl.cdiv(K, BK)
    expert, place, pid = expert_of(p_experts, tiles_o * tiles_k, STACK)
    if STACK:
        p_w += expert * stride_we
        p_a += expert * stride_ae
        p_b += expert * stride_be
        p_gamma += expert * O
        p_out += place * O * K
    pid_o, pid_k = ordered_tile(pid, tiles_o, tiles_k, GROUP)
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
    experts: Tensor | None = None,
) -> Tensor:
    """`gamma (W0 * T)`, `[O, K]`, rounded once to `dtype`, with weight's strides.

    Of a stack's layer it is those of `experts`, int64, one behind the other: `[group, O, K]`.

    With `subtract_identity` it is `gamma (W0 * (T - 1))`, the second matrix of `split`. `exact`
    forms T in float32 throughout, for weights that outlive the step; a step's own W may take T from
    tf32, or its increment from bf16.
    """
    O, K, r = layer.sizes
    like = layer.weight if experts is None else layer.weight[: len(experts)]
    out = torch.empty_like(like, dtype=dtype)
    rounds = not exact or dtype == torch.float32  # there an increment's form rounds nothing
    residual = layer.gamma is None and not subtract_identity and rounds
    options = multiplier_options(layer, dtype, config, residual)
    if exact:
        options["THIN"] = "ieee"
    scaling = layer.spec.scaling
    if options["FACTOR"] == tl.bfloat16 and not options["TWO_SIDED"] and experts is None:
        # Once a call: read in float32 and rounded by every program they are twice the bytes.
        hut_B = layer.hut_B if scaling == 1.0 else layer.hut_B * scaling
        hut_A, hut_B = cast(layer.hut_A, torch.bfloat16), cast(hut_B, torch.bfloat16)
        layer, scaling = layer._replace(hut_A=hut_A, hut_B=hut_B), 1.0
    with on_device(out):
        tiles = cdiv(O, config.BO) * cdiv(K, config.BK)
        hut_weight_kernel[(tiles if experts is None else tiles * len(experts),)](
            layer.weight,
            layer.hut_A,
            layer.hut_B,
            optional(layer.gamma, out),
            optional(experts, out),
            out,
            K,
            O,
            r,
            *layer_strides(layer),
            *out.stride()[-2:],
            *expert_strides(layer),
            layer.spec.constant - subtract_identity,
            scaling,
            HAS_GAMMA=layer.gamma is not None,
            STACK=experts is not None,
            GROUP=config.GROUP,
            **options,
            **config.meta(),
        )
    return out
