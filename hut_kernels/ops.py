"""The operators `torch.ops.hut.*`: schema, fake and implementation of each.

They take activations with any leading dimensions and flat scalars, return new tensors, and are not
differentiable by themselves: whatever the inputs, the outputs are detached (`HUTLinearFunction` is
the differentiable door). `backend` names the module that does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import torch_backend
from .definition import Needs, Spec, wide

_library = torch.library.Library("hut", "DEF")

_FACTORS = "Tensor weight, Tensor hut_A, Tensor hut_B"
_SPEC = "str transform, float offset, float scaling"
_GROUP = "Tensor[] weights, Tensor[] hut_A, Tensor[] hut_B"
_GROUP_FORM = "str transform, float offset, float[] scalings"


def _backend(name: str) -> ModuleType:
    if name == "triton":
        from .triton import backend as triton_backend

        return triton_backend
    if name == "cuda":
        from . import cuda

        return cuda
    if name == "planned":
        from . import planned

        return planned
    return torch_backend


def refuse_vmap(*args: Any) -> Any:
    """The rule, of every operator and function, for a dimension that vmap adds (RuntimeError)."""
    raise RuntimeError(
        "vmap over the fused hut_linear is not supported, nor over its backward (jacrev, "
        "vectorize=True, is_grads_batched=True): stack the batch into x's leading dimensions, or "
        "use fused=False"
    )


def _operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable], Any]:
    """Defines `hut::name` and registers the decorated function as its implementation everywhere."""

    def register(implementation: Callable[..., Any]) -> Any:
        def detached(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return implementation(*args)
            with torch.no_grad():
                return implementation(*args)

        def without_autocast(*args: Any) -> Any:
            with torch.autocast(args[0].device.type, enabled=False):
                return operator(*args)

        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        operator = getattr(torch.ops.hut, name).default
        for device in ("CPU", "CUDA", "XPU", "MPS"):
            _library.impl(name, detached, device)
            _library.impl(name, without_autocast, f"Autocast{device}")
        # Autograd has no part in these operators; falling through keeps the call cheap.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        for batched in ("FuncTorchBatched", "Batched"):
            _library.impl(name, refuse_vmap, batched)
        torch.library.register_fake(f"hut::{name}", fake, lib=_library)
        return operator

    return register


def _fake_forward(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_operator(
    "forward",
    f"(Tensor x, {_FACTORS}, Tensor? bias, Tensor? gamma, Tensor? beta, "
    f"{_SPEC}, str precision, str backend) -> Tensor",
    _fake_forward,
)
def forward(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    transform: str,
    offset: float,
    scaling: float,
    precision: str,
    backend: str,
) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, contiguous, in x's type."""
    spec = Spec(transform, offset, scaling, precision)
    y = _backend(backend).forward(x, weight, hut_A, hut_B, bias, gamma, beta, spec)
    # What folds leading dimensions returns a view, on which autograd refuses in-place operations.
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y


def _fake_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, hut_A: Tensor, hut_B: Tensor, *rest: Any
) -> list[Tensor]:
    need_x, need_A, need_B, need_gamma = rest[5:9]
    fakes = []
    if need_x:
        fakes.append(grad.new_empty((*grad.shape[:-1], weight.shape[1])))
    if need_A:
        fakes.append(hut_A.new_empty(hut_A.shape))
    if need_B:
        fakes.append(hut_B.new_empty(hut_B.shape))
    if need_gamma:
        fakes.append(hut_B.new_empty((weight.shape[0],), dtype=wide(grad.dtype)))
    return fakes


@_operator(
    "backward",
    f"(Tensor grad, Tensor? x, {_FACTORS}, Tensor? gamma, {_SPEC}, str precision, "
    "bool need_x, bool need_A, bool need_B, bool need_gamma, str backend) -> Tensor[]",
    _fake_backward,
)
def backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    transform: str,
    offset: float,
    scaling: float,
    precision: str,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_gamma: bool,
    backend: str,
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B` and `sum_i W[o, i] G[o, i]`, in this order.

    `dx = (gamma * grad) W` is `[..., in]`, contiguous, in grad's type; the factors' gradients have
    their types, the last is float32 (float64 for float64). `x` is needed for all but `dx`.
    """
    spec, needs = Spec(transform, offset, scaling, precision), Needs(need_A, need_B, need_gamma)
    module = _backend(backend)
    return module.backward(grad, x, weight, hut_A, hut_B, gamma, spec, need_x, needs)


def _fake_group_forward(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(len(weight) for weight in weights)))


@_operator(
    "group_forward",
    f"(Tensor x, {_GROUP}, Tensor?[] bias, Tensor?[] gamma, Tensor?[] beta, {_GROUP_FORM}) "
    "-> Tensor",
    _fake_group_forward,
)
def group_forward(
    x: Tensor,
    weights: list[Tensor],
    hut_A: list[Tensor],
    hut_B: list[Tensor],
    bias: list[Tensor | None],
    gamma: list[Tensor | None],
    beta: list[Tensor | None],
    transform: str,
    offset: float,
    scalings: list[float],
) -> Tensor:
    """The outputs of several layers that read the same x, side by side; the extension's alone."""
    from . import cuda

    return cuda.group_forward(
        x, weights, hut_A, hut_B, bias, gamma, beta, transform, offset, scalings
    )


def _fake_group_backward(
    grad: Tensor,
    x: Tensor | None,
    weights: list[Tensor],
    hut_A: list[Tensor],
    hut_B: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    need_x, need_A, need_B, need_gamma = rest[4:8]
    fakes = [grad.new_empty((*grad.shape[:-1], weights[0].shape[1]))] if need_x else []
    for j in range(len(weights)):
        if need_A[j]:
            fakes.append(hut_A[j].new_empty(hut_A[j].shape))
        if need_B[j]:
            fakes.append(hut_B[j].new_empty(hut_B[j].shape))
        if need_gamma[j]:
            fakes.append(hut_B[j].new_empty((len(weights[j]),), dtype=wide(grad.dtype)))
    return fakes


@_operator(
    "group_backward",
    f"(Tensor grad, Tensor? x, {_GROUP}, Tensor?[] gamma, {_GROUP_FORM}, "
    "bool need_x, bool[] need_A, bool[] need_B, bool[] need_gamma) -> Tensor[]",
    _fake_group_backward,
)
def group_backward(
    grad: Tensor,
    x: Tensor | None,
    weights: list[Tensor],
    hut_A: list[Tensor],
    hut_B: list[Tensor],
    gamma: list[Tensor | None],
    transform: str,
    offset: float,
    scalings: list[float],
    need_x: bool,
    need_A: list[bool],
    need_B: list[bool],
    need_gamma: list[bool],
) -> list[Tensor]:
    """One dx of all the layers, where asked for; then each layer's gradients as in `backward`."""
    from . import cuda

    return cuda.group_backward(
        grad, x, weights, hut_A, hut_B, gamma, transform, offset, scalings,
        need_x, need_A, need_B, need_gamma,
    )  # fmt: skip


def _fake_weight(weight: Tensor, *rest: Any) -> Tensor:
    dtype = rest[6]
    return torch.empty_like(weight, dtype=dtype)


@_operator(
    "weight",
    f"({_FACTORS}, Tensor? gamma, {_SPEC}, ScalarType dtype, str backend) -> Tensor",
    _fake_weight,
)
def weight(
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    transform: str,
    offset: float,
    scaling: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The merged weight `gamma[:, None] * W`, `[out, in]`, rounded once to `dtype`."""
    spec = Spec(transform, offset, scaling)
    return _backend(backend).weight(weight, hut_A, hut_B, gamma, spec, dtype)
