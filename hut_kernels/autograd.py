"""`HUTLinearFunction`: forward and backward of a HUT layer as a handful of operator calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import formats, ops
from .layer import Spec, acc_dtype, as_rows
from .rules import call, is_exporting, refuse_forward_mode, refuse_vmap

# A stored weight's scales and the text of its layout, beside its codes; empty for a dense one.
Storage = tuple[()] | tuple[tuple[Tensor, ...], str]


class _Function(torch.autograd.Function):
    """A function in three forms: Dynamo sees the class itself, all calls go to one of two others.

    Outside functorch that is a `forward(ctx, ...)`: torch binds the arguments of a function with a
    `setup_context`, which functorch and Dynamo need, to forward's signature in every call, at a
    quarter of a small layer's forward. Both have the rule of `forward_mode`, as a `jvp`, which
    Dynamo refuses in a function that it compiles.
    """

    _plain: type[torch.autograd.Function]
    _transformed: type[torch.autograd.Function]

    def __init_subclass__(cls) -> None:
        compute, keep = cls.forward, cls.setup_context

        def forward(ctx: Any, *args: Any) -> Any:
            output = compute(*args)
            keep(ctx, args, output)
            return output

        def form(**methods: Any) -> type[torch.autograd.Function]:
            methods |= {"backward": cls.backward, "jvp": cls.forward_mode}
            static: dict[str, Any] = {
                name: staticmethod(method) for name, method in methods.items()
            }
            static["generate_vmap_rule"] = cls.generate_vmap_rule
            return type(cls.__name__, (torch.autograd.Function,), static)

        cls._plain = form(forward=forward)
        cls._transformed = form(forward=compute, setup_context=keep, vmap=cls.vmap)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Applies the function to all of forward's arguments, by position."""
        if torch._C._are_functorch_transforms_active():
            return cls._transformed.apply(*args)
        return super(torch.autograd.Function, cls._plain).apply(*args)  # type: ignore[misc]

    vmap = staticmethod(refuse_vmap)
    forward_mode = staticmethod(refuse_forward_mode)


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


class HUTLinearFunction(_Function):
    """`y = gamma * (x (W0 * T)^T + bias) + beta` with the exact gradients of docs/definition.md.

    Saves x (where a factor or gamma is trained) and the parameters; nothing of size out x in. W is
    recomputed in backward. Only the gradients asked for are computed. Differentiable once.
    `hut_linear` checks its arguments and calls it; `apply` itself checks nothing, and takes them
    all by position:

    Args:
        x: `[..., in_features]`.
        weight: W0, `[out_features, in_features]`; it has no gradient.
        hut_A: `[r, in_features]`.
        hut_B: `[out_features, r]`.
        bias: `[out_features]` or None.
        gamma: `[out_features]` or None.
        beta: `[out_features]` or None.
        spec: The options, a `hut_kernels.layer.Spec`.
        backend: `"torch"`, `"triton"`, `"cuda"` or `"auto"`, Triton and the extension each at its
            parts.
        stored: How a quantized weight is stored; nothing for a dense one.

    Examples:
        >>> import torch
        >>> from hut_kernels import HUTLinearFunction
        >>> from hut_kernels.layer import Spec
        >>> x, weight, A, B = (torch.ones(*s) for s in ((2, 4), (3, 4), (1, 4), (3, 1)))
        >>> HUTLinearFunction.apply(x, weight, A, B, None, None, None, Spec(), "torch")[0]
        tensor([8., 8., 8.])
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
        stored: Storage = (),
    ) -> Tensor:
        weight, args = formats.dense(weight), (*spec, backend, *stored)
        return call(ops.forward, x, weight, hut_A, hut_B, bias, gamma, beta, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, hut_A, hut_B, bias, gamma, _, ctx.spec, ctx.backend, *stored = inputs
        needs = ctx.needs_input_grad
        uses_G = needs[2] or needs[3] or needs[5]
        scales, ctx.form = (stored and stored[0]) or ((), "")
        ctx.save_for_backward(x if uses_G else None, weight, hut_A, hut_B, bias, gamma, *scales)
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
    *scales: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients that are asked for, one for each argument of forward."""
    need_x, _, need_A, need_B, need_bias, need_gamma, need_beta, *rest = ctx.needs_input_grad
    d_x = d_A = d_B = d_gamma = None
    if need_x or need_A or need_B or need_gamma:
        stored: Storage = (scales, ctx.form) if ctx.form else ()
        grads = iter(call(
            ops.backward, grad, x, formats.dense(weight), hut_A, hut_B, gamma,
            *ctx.spec, need_x, need_A, need_B, need_gamma, ctx.backend, *stored,
        ))  # fmt: skip
        d_x = next(grads) if need_x else None
        d_A = next(grads) if need_A else None
        d_B = next(grads) if need_B else None
        d_gamma = next(grads) if need_gamma else None
    wants = need_bias, need_gamma, need_beta
    d_bias, d_gamma, d_beta = _vector_gradients(grad, d_gamma, bias, gamma, ctx.beta_dtype, wants)
    return d_x, None, d_A, d_B, d_bias, d_gamma, d_beta, *(None for _ in rest)


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


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` with the weight cast to x's type in each pass, so that no copy is kept."""
    if is_exporting():
        return F.linear(x, formats.dense(weight).to(x.dtype))
    return FrozenLinearFunction.apply(x, weight)


class FrozenLinearFunction(_Function):
    """`frozen_linear` with every derivative, for the eager layer has it too."""

    generate_vmap_rule = True
    vmap = staticmethod(torch.autograd.Function.vmap)

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, formats.dense(weight).to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ formats.dense(weight).to(grad.dtype), None

    @staticmethod
    def forward_mode(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (weight,) = ctx.saved_tensors
        return F.linear(tangent, formats.dense(weight).to(tangent.dtype))


class StoredLinearFunction(_Function):
    """`x W0^T + bias` of a stored W0, which is made dense in each pass."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, backend: str, stored: Storage
    ) -> Tensor:
        W0 = call(ops.dequantize, weight, *stored, x.dtype, backend)
        return F.linear(x, W0, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, weight, bias, ctx.backend, (scales, ctx.form) = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *scales)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *scales = ctx.saved_tensors
        need_x, _, need_bias, *_ = ctx.needs_input_grad
        d_x = d_bias = None
        if need_x:
            d_x = grad @ call(ops.dequantize, weight, scales, ctx.form, grad.dtype, ctx.backend)
        if need_bias:
            d_bias = as_rows(grad).sum(0, dtype=acc_dtype(grad.dtype)).to(ctx.bias_dtype)
        return d_x, None, d_bias, None, None


class HUTGroupedFunction(_Function):
    """The same as `HUTLinearFunction` for a stack of experts; saves the offsets as well.

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
        return call(
            ops.grouped_forward,
            *(x, weight, hut_A, hut_B, offsets, bias, gamma, beta, *spec[:3], backend),
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
    made = iter(call(
        ops.grouped_backward, grad, x, weight, hut_A, hut_B, offsets, gamma, *ctx.spec[:3],
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
