"""`HUTLinearFunction`: forward and backward of a HUT layer as a handful of operator calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .layer import Spec, acc_dtype, as_rows


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Applies the function to all of forward's arguments, by position.

        Outside functorch's transforms, which alone need it, torch's own `apply` is passed over: it
        binds the arguments to forward's signature, at a quarter of a small layer's forward.
        """
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    vmap = staticmethod(ops.refuse_vmap)


class _Once(_Function):
    """Calls a backward that is not differentiable itself, and refuses to be differentiated.

    torch's `once_differentiable` ties its refusal to the results alone, not to what they depend on:
    a second derivative that is asked for by its inputs, or by torch.func, is zero there.
    """

    @staticmethod
    def forward(gradients: Callable[..., tuple], ctx: Any, *tensors: Tensor | None) -> tuple:
        return gradients(ctx, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "the fused hut_linear is once differentiable (once_differentiable): second derivatives "
            "need fused=False"
        )


def _check_seen() -> None:
    """Refuses a forward that a transform of torch.func reaches; it ends at the function's `apply`.

    Within such a transform torch.compile looks at forward alone: the gradient would be zero.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.compile does not see the fused hut_linear's gradients within a transform of "
            "torch.func: use fused=False, or do not compile the transform"
        )


class HUTLinearFunction(_Function):
    """`y = gamma * (x (W0 * T)^T + bias) + beta` with the exact gradients of docs/definition.md.

    Saves x (where a factor or gamma is trained) and the parameters; nothing of size out x in. W is
    recomputed in backward. Only the gradients asked for are computed. Differentiable once.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        hut_A: Tensor,
        hut_B: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        spec: Spec,
        backend: str,
    ) -> Tensor:
        _check_seen()
        return ops.forward(x, weight, hut_A, hut_B, bias, gamma, beta, *spec, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, hut_A, hut_B, bias, gamma, _, ctx.spec, ctx.backend = inputs
        needs = ctx.needs_input_grad
        uses_G = needs[2] or needs[3] or needs[5]
        ctx.save_for_backward(x if uses_G else None, weight, hut_A, hut_B, bias, gamma)
        ctx.beta_dtype = None if inputs[6] is None else inputs[6].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Only under create_graph does anything depend on gradients; elsewhere the guard is spared.
        if torch.is_grad_enabled():
            return _Once.apply(_gradients, ctx, grad, *ctx.saved_tensors)
        return _gradients(ctx, grad, *ctx.saved_tensors)


def _gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients that are asked for, one for each argument of forward."""
    need_x, _, need_A, need_B, need_bias, need_gamma, need_beta, _, _ = ctx.needs_input_grad
    d_x = d_A = d_B = d_gamma = None
    if need_x or need_A or need_B or need_gamma:
        grads = iter(ops.backward(
            grad, x, weight, hut_A, hut_B, gamma,
            *ctx.spec, need_x, need_A, need_B, need_gamma, ctx.backend,
        ))  # fmt: skip
        d_x = next(grads) if need_x else None
        d_A = next(grads) if need_A else None
        d_B = next(grads) if need_B else None
        d_gamma = next(grads) if need_gamma else None
    wants = need_bias, need_gamma, need_beta
    d_bias, d_gamma, d_beta = _vector_gradients(grad, d_gamma, bias, gamma, ctx.beta_dtype, wants)
    return d_x, None, d_A, d_B, d_bias, d_gamma, d_beta, None, None


def _vector_gradients(
    grad: Tensor,
    d_gamma: Tensor | None,
    bias: Any,
    gamma: Any,
    beta_dtype: torch.dtype | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`d bias, d gamma, d beta` as wanted, from the part of d gamma that the operators give."""
    need_bias, need_gamma, need_beta = wants
    d_bias = d_beta = None
    if need_bias or need_beta or (need_gamma and bias is not None):
        sums = as_rows(grad).sum(0, dtype=acc_dtype(grad.dtype))
        if d_gamma is not None and bias is not None:
            d_gamma = d_gamma + bias * sums
        if need_beta:
            d_beta = sums.to(beta_dtype)
        if need_bias:
            d_bias = (sums if gamma is None else gamma * sums).to(bias.dtype)
    if d_gamma is not None:
        d_gamma = d_gamma.to(gamma.dtype)
    return d_bias, d_gamma, d_beta


class FrozenLinearFunction(torch.autograd.Function):
    """`x weight^T` with the weight cast to x's type in each pass, so that no copy is kept."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None


class HUTGroupedFunction(_Function):
    """What `HUTLinearFunction` is, of a stack of experts: saves x, the parameters and the offsets.

    Nothing of the size of an expert's weight is saved.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        hut_A: Tensor | None,
        hut_B: Tensor | None,
        offsets: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        spec: Spec,
        backend: str,
    ) -> Tensor:
        _check_seen()
        return ops.grouped_forward(
            x, weight, hut_A, hut_B, offsets, bias, gamma, beta, *spec[:3], backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, hut_A, hut_B, offsets, bias, gamma, beta, ctx.spec, ctx.backend = inputs
        needs = ctx.needs_input_grad
        uses_G = needs[2] or needs[3] or needs[6]
        ctx.save_for_backward(x if uses_G else None, weight, hut_A, hut_B, offsets, bias, gamma)
        ctx.beta_dtype = None if beta is None else beta.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _Once.apply(_grouped_gradients, ctx, grad, *ctx.saved_tensors)
        return _grouped_gradients(ctx, grad, *ctx.saved_tensors)


def _grouped_gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients that are asked for, one for each argument of forward."""
    need_x, _, need_A, need_B, _, need_bias, need_gamma, need_beta, _, _ = ctx.needs_input_grad
    need_sums = need_bias or need_beta or (need_gamma and bias is not None)
    made = iter(ops.grouped_backward(
        grad, x, weight, hut_A, hut_B, offsets, gamma, *ctx.spec[:3],
        need_x, need_A, need_B, need_gamma, need_sums, ctx.backend,
    ))  # fmt: skip
    d_x, d_A, d_B, d_gamma, sums = (
        next(made) if needed else None for needed in (need_x, need_A, need_B, need_gamma, need_sums)
    )
    d_bias = d_beta = None
    if sums is not None:
        if d_gamma is not None and bias is not None:
            d_gamma = d_gamma + bias * sums
        if need_beta:
            d_beta = sums.to(ctx.beta_dtype)
        if need_bias and bias is not None:
            d_bias = (sums if gamma is None else gamma * sums).to(bias.dtype)
    if d_gamma is not None and gamma is not None:
        d_gamma = d_gamma.to(gamma.dtype)
    return d_x, None, d_A, d_B, None, d_bias, d_gamma, d_beta, None, None
