"""The operators' rules beyond their devices: autograd's key, forward mode and vmap, all refused.

The gradients are `HUTLinearFunction`'s, which goes past these rules by `call`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("hut", "DEF")
# By operator; filled where they are defined.
implementations: dict[Any, Callable[..., Any]] = {}

_PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_PLAIN_OPTIONS = frozenset({type(None), bool, float, str, torch.dtype})
# A dense tensor's on a CPU: no wrapper's (vmap, functionalization), no lazy conjugate or negative.
_PLAIN_KEYS = torch._C._dispatch_keys(torch.empty(0)).raw_repr()


def refuse_vmap(*args: Any) -> Any:
    """Refuses a dimension that vmap adds: a rule of all operators and functions (RuntimeError)."""
    raise RuntimeError(
        "vmap over the fused hut_linear is not supported, nor over its backward (jacrev, "
        "vectorize=True, is_grads_batched=True): stack the batch into x's leading dimensions, or "
        "use fused=False"
    )


def refuse_forward_mode(*args: Any) -> Any:
    """Refuses dual numbers: the rule of every operator and function (RuntimeError)."""
    raise RuntimeError(
        "the fused hut_linear has no forward-mode derivative (jvp, jacfwd, linearize, dual "
        "numbers): use fused=False"
    )


def is_exporting() -> bool:
    """True within `torch.export`, which keeps a function's forward alone, under `no_grad`.

    The flag itself: in PyTorch 2.10 `torch.compiler.is_exporting()` is true in all that Dynamo
    traces, `torch.compile` included.
    """
    return torch.compiler._is_exporting_flag


def call(operator: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator whose gradients its caller has: past the rule for all other calls."""
    if torch.compiler.is_compiling():  # Dynamo does not know the guard
        if torch._C._are_functorch_transforms_active():
            # It would look at forward alone.
            raise RuntimeError(
                "torch.compile does not see the fused hut_linear's gradients within a transform of "
                "torch.func: use fused=False, or do not compile the transform"
            )
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        if _nobody_looks(args):
            return implementations[operator](*args)
        return operator(*args)


def _nobody_looks(args: tuple[Any, ...]) -> bool:
    """True for plain tensors on a CPU with no mode, autocast or profiler to see the operator.

    The dispatcher would call the implementation with just these arguments, and take a tenth of a
    small layer's host time for it.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_autocast_enabled("cpu")
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN_TENSORS:
            if torch._C._dispatch_keys(arg).raw_repr() != _PLAIN_KEYS:
                return False
        elif kind not in _PLAIN_OPTIONS:
            return False
    return True


class _Undifferentiated(torch.autograd.Function):
    """An operator where nobody has its gradients: computes, and refuses them in backward."""

    @staticmethod
    def forward(ctx: Any, operator: Callable[..., Any], *args: Any) -> Any:
        ctx.layouts = [
            (arg.shape, arg.dtype) if needed else None
            for arg, needed in zip((operator, *args), ctx.needs_input_grad, strict=True)
        ]
        with torch._C._AutoDispatchBelowAutograd():
            out = operator(*args)
        return tuple(out) if isinstance(out, list) else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # By an operator: a graph of forward and backward is traced before anybody asks for this.
        refuse = torch.ops.hut.refuse_gradient.default
        return tuple(
            None if layout is None else refuse(grads[0], *layout) for layout in ctx.layouts
        )

    jvp = staticmethod(refuse_forward_mode)  # type: ignore[assignment]


def undifferentiated(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule at autograd's key of an operator that is called outside `HUTLinearFunction`."""
    apply = super(torch.autograd.Function, _Undifferentiated).apply

    def rule(*args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return apply(operator, *args)
        for tensor in args:
            if isinstance(tensor, Tensor):
                if forward_ad.unpack_dual(tensor).tangent is not None:
                    refuse_forward_mode()
                if torch.is_grad_enabled() and tensor.requires_grad:
                    _refuse_gradient()
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return rule


def _refuse_gradient(*args: Any) -> Any:
    raise RuntimeError(
        "an operator of hut_kernels that hut_linear did not call, as in an exported program, has "
        "no gradients: train the module itself, or export it with fused=False"
    )


library.define(
    "refuse_gradient(Tensor grad, SymInt[] size, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("refuse_gradient", _refuse_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "hut::refuse_gradient",
    lambda grad, size, dtype: grad.new_empty(size, dtype=dtype),
    lib=library,
)
