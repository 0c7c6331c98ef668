"""The operators `torch.ops.hut.*`: schema, fake and implementation of each.

They take activations with any leading dimensions and flat scalars, and return new tensors. The
gradients are `HUTLinearFunction`'s: an operator that is differentiated by itself (in an exported
program, called directly) computes its outputs, and raises in backward. `backend` names the module
that does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import formats, grouped_backend, torch_backend
from .layer import Layer, Needs, Spec, acc_dtype
from .rules import implementations, library, refuse_vmap, undifferentiated

_DEVICES = ("CPU", "CUDA", "XPU", "MPS")
_DEVICE_KEYS = frozenset(getattr(torch._C.DispatchKey, device) for device in _DEVICES)

_FACTORS = "Tensor weight, Tensor hut_A, Tensor hut_B"
_STACK = "Tensor weight, Tensor? hut_A, Tensor? hut_B"
# Of a stored weight, whose codes are `weight`, its scales and `Layout.text`; by default left out.
_STORED = "Tensor[]? scales=None, str form=''"
_SPEC = "str transform, float offset, float scaling"


def _backend(name: str, *tensors: Tensor) -> Any:
    """The module that does the work; PyTorch's where a tensor is empty: there is none to launch."""
    if name == "torch" or not all(tensor.numel() for tensor in tensors):
        return torch_backend
    if name == "cuda":
        from . import cuda

        return cuda
    from . import auto

    return auto.PLANNED[name]


def _operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable], Any]:
    """Defines `hut::name` and registers the decorated function as its implementation everywhere."""

    def register(implementation: Callable[..., Any]) -> Any:
        def detached(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return implementation(*args)

        def at_autograd(keys: Any, *args: Any) -> Any:
            recording = torch.is_grad_enabled() or forward_ad._current_level >= 0
            following = (keys & torch._C._after_ADInplaceOrView_keyset).highestPriorityTypeId()
            if recording or following not in _DEVICE_KEYS:
                return refused(*args)
            return detached(*args)  # a compiled graph's usual way, without a second dispatch

        def without_autocast(*args: Any) -> Any:
            with torch.autocast(args[0].device.type, enabled=False):
                return operator(*args)

        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        operator = getattr(torch.ops.hut, name).default
        refused = undifferentiated(operator)
        implementations[operator] = implementation
        for device in _DEVICES:
            library.impl(name, detached, device)
            library.impl(name, without_autocast, f"Autocast{device}")
        library.impl(name, at_autograd, "Autograd", with_keyset=True)
        for batched in ("FuncTorchBatched", "Batched"):
            library.impl(name, refuse_vmap, batched)
        torch.library.register_fake(f"hut::{name}", fake, lib=library)
        return operator

    return register


def _fake_forward(x: Tensor, weight: Tensor, hut_A: Tensor, hut_B: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], hut_B.shape[0]))


@_operator(
    "forward",
    f"(Tensor x, {_FACTORS}, Tensor? bias, Tensor? gamma, Tensor? beta, "
    f"{_SPEC}, str precision, str backend, {_STORED}) -> Tensor",
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
    scales: list[Tensor] | None = None,
    form: str = "",
) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, contiguous, in x's type."""
    spec = Spec(transform, offset, scaling, precision)
    layer = Layer(formats.restore(weight, scales, form), hut_A, hut_B, bias, gamma, beta, spec)
    y = _backend(backend, x, weight).linear_forward(x, layer)
    # What folds leading dimensions returns a view, on which autograd refuses in-place operations.
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y


def _fake_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, hut_A: Tensor, hut_B: Tensor, *rest: Any
) -> list[Tensor]:
    need_x, need_A, need_B, need_gamma = rest[5:9]
    fakes = []
    if need_x:
        fakes.append(grad.new_empty((*grad.shape[:-1], hut_A.shape[1])))
    if need_A:
        fakes.append(hut_A.new_empty(hut_A.shape))
    if need_B:
        fakes.append(hut_B.new_empty(hut_B.shape))
    if need_gamma:
        fakes.append(hut_B.new_empty((hut_B.shape[0],), dtype=acc_dtype(grad.dtype)))
    return fakes


@_operator(
    "backward",
    f"(Tensor grad, Tensor? x, {_FACTORS}, Tensor? gamma, {_SPEC}, str precision, "
    f"bool need_x, bool need_A, bool need_B, bool need_gamma, str backend, {_STORED}) -> Tensor[]",
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
    scales: list[Tensor] | None = None,
    form: str = "",
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B` and `sum_i W[o, i] G[o, i]`, in this order.

    `dx = (gamma * grad) W` is `[..., in]`, contiguous, in grad's type; the factors' gradients have
    their types, the last is float32 (float64 for float64). `x` is needed for all but `dx`.
    """
    spec, needs = Spec(transform, offset, scaling, precision), Needs(need_A, need_B, need_gamma)
    layer = Layer(formats.restore(weight, scales, form), hut_A, hut_B, None, gamma, None, spec)
    return _backend(backend, grad, weight).linear_backward(grad, x, layer, need_x, needs)


def _fake_weight(weight: Tensor, hut_A: Tensor, hut_B: Tensor, *rest: Any) -> Tensor:
    dtype = rest[4]
    if any(rest[7:]):  # the form of a stored weight
        return weight.new_empty((hut_B.shape[0], hut_A.shape[1]), dtype=dtype)
    return torch.empty_like(weight, dtype=dtype)


@_operator(
    "weight",
    f"({_FACTORS}, Tensor? gamma, {_SPEC}, ScalarType dtype, str backend, {_STORED}) -> Tensor",
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
    scales: list[Tensor] | None = None,
    form: str = "",
) -> Tensor:
    """The merged weight `gamma[:, None] * W`, `[out, in]`, rounded once to `dtype`."""
    W0, spec = formats.restore(weight, scales, form), Spec(transform, offset, scaling)
    layer = Layer(W0, hut_A, hut_B, None, gamma, None, spec)
    return _backend(backend, weight).merged_weight(layer, dtype)


def _fake_grouped_forward(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@_operator(
    "grouped_forward",
    f"(Tensor x, {_STACK}, Tensor offsets, Tensor? bias, Tensor? gamma, Tensor? beta, "
    f"{_SPEC}, str backend) -> Tensor",
    _fake_grouped_forward,
)
def grouped_forward(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor | None,
    hut_B: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    transform: str,
    offset: float,
    scaling: float,
    backend: str,
) -> Tensor:
    """`forward` of each expert, `[S, out]`: its rows of x end at its offset.

    Without factors it is the plain product.
    """
    spec = Spec(transform, offset, scaling)
    layer = grouped_backend.Stack(weight, hut_A, hut_B, bias, gamma, beta, spec)
    return grouped_backend.forward(x, layer, offsets, _backend(backend, x, weight))


def _fake_grouped_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, hut_A: Any, hut_B: Any, *rest: Any
) -> list[Tensor]:
    need_x, need_A, need_B, need_gamma, need_sums = rest[5:10]
    acc = acc_dtype(grad.dtype)
    fakes = [grad.new_empty((grad.shape[0], weight.shape[2]))] if need_x else []
    fakes += [factor.new_empty(factor.shape) for factor in (hut_A,) if need_A]
    fakes += [factor.new_empty(factor.shape) for factor in (hut_B,) if need_B]
    vectors = int(need_gamma) + int(need_sums)
    return fakes + [grad.new_empty(weight.shape[:2], dtype=acc) for _ in range(vectors)]


@_operator(
    "grouped_backward",
    f"(Tensor grad, Tensor? x, {_STACK}, Tensor offsets, Tensor? gamma, {_SPEC}, bool need_x, "
    "bool need_A, bool need_B, bool need_gamma, bool need_sums, str backend) -> Tensor[]",
    _fake_grouped_backward,
)
def grouped_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    hut_A: Tensor | None,
    hut_B: Tensor | None,
    offsets: Tensor,
    gamma: Tensor | None,
    transform: str,
    offset: float,
    scaling: float,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_gamma: bool,
    need_sums: bool,
    backend: str,
) -> list[Tensor]:
    """The gradients of `backward` for each expert and, with `need_sums`, `sum_n grad`, in order."""
    spec, needs = Spec(transform, offset, scaling), Needs(need_A, need_B, need_gamma)
    layer = grouped_backend.Stack(weight, hut_A, hut_B, None, gamma, None, spec)
    module = _backend(backend, grad, weight)
    return grouped_backend.backward(grad, x, layer, offsets, need_x, needs, need_sums, module)


def _fake_dequantize(
    weight: Tensor, scales: list[Tensor], form: str, dtype: torch.dtype, backend: str
) -> Tensor:
    return weight.new_empty(formats.Layout.parse(form).sizes[:2], dtype=dtype)


@_operator(
    "dequantize",
    "(Tensor weight, Tensor[] scales, str form, ScalarType dtype, str backend) -> Tensor",
    _fake_dequantize,
)
def dequantize(
    weight: Tensor, scales: list[Tensor], form: str, dtype: torch.dtype, backend: str
) -> Tensor:
    """A stored W0, `[out, in]`, in `dtype`."""
    stored = formats.restore(weight, scales, form)
    assert isinstance(stored, formats.Stored)
    return _backend(backend, weight).dequantize(stored, dtype)
