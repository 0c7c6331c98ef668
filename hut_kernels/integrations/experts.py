"""HUT on the stacked experts of transformers' MoE models, through its `ExpertsInterface`.

A module's choice is its config's, so the name of ours says which one was there before:
`hut_kernels:grouped_mm` hands modules without active factors on to `grouped_mm`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers.integrations import moe
except ImportError as error:
    raise ImportError(
        "adapting experts' parameters needs a transformers that has ExpertsInterface: version 5 or "
        "newer"
    ) from error

from ..adapters import near_matches
from ..errors import HUTBackendError
from ..experts import Factors, HUTExperts, merged_stack
from ..grouped import check_stack, grouped_product, hut_grouped_linear
from ..layer import FLOATS, effective_bias
from ..nn import check_data, named

_PREFIX = "hut_kernels:"
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
# These lay the weights out anew on first use, or read them by kernels of their own.
_REFUSED = ("deepgemm", "deepgemm_megamoe", "sonicmoe")


class Adapted(Protocol):
    """The object by which an experts module finds the factors of one of its parameters."""

    def active_factors(self) -> list[Factors]:
        """The adapters that apply now; none where they are off or merged."""
        ...


def attach(experts: Any, parameter: str, adapted: Adapted) -> None:
    """Lets `experts` find a parameter's factors, and chooses the implementation that reads them.

    Raises:
        HUTBackendError: as `check_experts`.
    """
    # No submodule: a wrapper holds the module that would hold it.
    experts.__dict__.setdefault("_hut_factors", {})[parameter] = adapted
    choose(experts)


def detach(experts: Any, parameter: str) -> None:
    """Undoes `attach`; with the last parameter the module has its former implementation again."""
    factors = experts.__dict__.get("_hut_factors", {})
    factors.pop(parameter, None)
    if not factors:
        experts.__dict__.pop("_hut_factors", None)
        experts.config._experts_implementation = {"": _former(experts)}


def choose(experts: Any) -> None:
    """Makes ours the implementation of `experts`, also after it was set to another.

    Raises:
        HUTBackendError: the former implementation is one that HUT cannot stand in for.
    """
    chosen = experts.config._experts_implementation
    if isinstance(chosen, str) and chosen.startswith(_PREFIX):
        return
    _check_implementation(chosen)
    name = f"{_PREFIX}{chosen or 'eager'}"
    if name not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(name, _experts_forward)
    experts.config._experts_implementation = {"": name}


def _check_implementation(chosen: str | None) -> None:
    if chosen in _REFUSED:
        raise HUTBackendError(
            f"the experts implementation {chosen!r} reads the weights by kernels of its own: call "
            f'model.set_experts_implementation("grouped_mm") before HUT adapts its experts'
        )


def check_experts(name: str, experts: Any, parameter: str) -> None:
    """Refuses a parameter that is no stack of experts that this module can multiply.

    Raises:
        ValueError: the module is not behind transformers' interface, or the parameter is no
            projection of its experts.
        HUTBackendError: quantized, sharded, partitioned or offloaded weights, expert parallelism,
            or an implementation that reads weights by kernels of its own.
    """
    kind, weight = type(experts).__name__, getattr(experts, parameter)
    if not _is_dispatched(experts):
        hint = "" if weight.dtype in FLOATS else "; its weights are quantized: load it dequantized"
        raise ValueError(
            f"{name}.{parameter}: {kind} computes its experts by itself, not through transformers' "
            f"ExpertsInterface, so that an adapter would have no effect{hint}"
        )
    if parameter not in _PROJECTIONS or (weight.ndim != 3 and not hasattr(weight, "ds_shape")):
        raise ValueError(
            f"{name}.{parameter} is no stack of experts' weights; HUT adapts "
            f"{', '.join(p for p in _PROJECTIONS if hasattr(experts, p))} of {kind}"
        )
    if hasattr(weight, "ds_shape"):
        raise HUTBackendError(
            f"{name}.{parameter} is partitioned by DeepSpeed ZeRO-3, under which no rank has the "
            f"experts' weights: use ZeRO-2, or FSDP2"
        )
    if experts._is_expert_parallel or hasattr(weight, "_local_tensor"):
        raise HUTBackendError(
            f"{name}.{parameter} is sharded (expert parallelism, DTensor): HUT adapts experts "
            f"before they are sharded by FSDP2, and not under expert parallelism"
        )
    _check_implementation(experts.config._experts_implementation)
    with named(f"{name}.{parameter}"):
        check_stack(weight)
    if weight.dtype not in FLOATS:
        raise HUTBackendError(f"{name}.{parameter} is {weight.dtype}: dequantize the experts first")
    if weight.is_meta and hasattr(experts, "_hf_hook"):
        raise HUTBackendError(f"{name}.{parameter} is offloaded: load the model without offloading")


def find_stacks(
    model: nn.Module, target_parameters: Collection[str]
) -> list[tuple[str, nn.Module, str]]:
    """The stacks that names or dot-separated ends of names stand for: name, module, parameter.

    Raises:
        TypeError: one string instead of a list of names.
        ValueError: a name that no parameter has; and as `check_experts`.
        HUTBackendError: as `check_experts`.
    """
    if isinstance(target_parameters, str):
        raise TypeError(f"target_parameters must be a list of names; got {target_parameters!r}")
    parameters = [
        (f"{name}.{parameter}", name, module, parameter)
        for name, module in model.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
    ]
    ends = {target: f".{target}" for target in target_parameters}
    names = [f".{found[0]}" for found in parameters]
    missing = sorted(t for t, end in ends.items() if not any(n.endswith(end) for n in names))
    if missing:
        raise ValueError(
            f"no parameter matches {missing} of target_parameters"
            f"{near_matches(missing, (found[0] for found in parameters))}"
        )
    stacks = [
        (name, module, parameter)
        for full, name, module, parameter in parameters
        if f".{full}".endswith(tuple(ends.values()))
    ]
    for name, module, parameter in stacks:
        check_experts(name, module, parameter)
    return stacks


def new_factors(experts: Any, parameter: str, r: int, **options: Any) -> HUTExperts:
    """Fresh factors for a stack, on its device.

    Raises:
        ValueError, TypeError: as for `HUTExperts`; ValueError also for dropout, `precision="split"`
            and `scale_by_rms`, which stacks of experts do not have.
    """
    absent = {"dropout": 0.0, "precision": "merged", "scale_by_rms": False}
    for name, none in absent.items():
        given = options.pop(name, none)
        if given != none:
            raise ValueError(f"HUT on experts' parameters has no {name}; got {given!r}")
    weight = getattr(experts, parameter)
    num_experts, out_features, in_features = (
        weight.mT.shape if experts.is_transposed else weight.shape
    )
    return HUTExperts(num_experts, in_features, out_features, r, device=weight.device, **options)


def adapt(experts: nn.Module, parameter: str, factors: HUTExperts) -> None:
    """Gives a module the factors of one of its parameters."""
    setattr(experts, f"hut_{parameter}", factors)
    attach(experts, parameter, factors)
    if _keep_chosen not in experts._forward_pre_hooks.values():
        experts.register_forward_pre_hook(_keep_chosen)


def merge_experts(experts: Any) -> None:
    """Puts a module's factors into its stacks and biases, and takes them out of the module.

    Raises:
        ValueError: a shift without a bias to put it into. The module is unchanged.
    """
    check_merge(experts)
    for name, adapted in list(vars(experts)["_hut_factors"].items()):
        (factors,) = adapted.active_factors()
        weight = merged_stack(getattr(experts, name), factors, experts.is_transposed)
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        bias = getattr(experts, f"{name}_bias", None)
        if bias is not None:
            shift = effective_bias(bias, factors.gamma, factors.beta, bias.dtype)
            assert shift is not None
            shift = nn.Parameter(shift.detach().clone(), requires_grad=False)
            setattr(experts, f"{name}_bias", shift)
        delattr(experts, f"hut_{name}")
        detach(experts, name)
    for key, hook in list(experts._forward_pre_hooks.items()):
        if hook is _keep_chosen:
            del experts._forward_pre_hooks[key]


def check_merge(experts: Any) -> None:
    """Refuses a module whose factors cannot be merged (ValueError, HUTBackendError)."""
    for name, adapted in vars(experts)["_hut_factors"].items():
        check_data(experts, name)
        check_mergeable(experts, name, *adapted.active_factors())


def check_mergeable(experts: Any, parameter: str, *factors: Factors) -> None:
    """Refuses to merge a shift into experts that have no bias (ValueError)."""
    if any(one.beta is not None for one in factors) and not experts.has_bias:
        raise ValueError(
            f"{type(experts).__name__}.{parameter} has no bias, so that the shift of scale_shift "
            f"cannot be merged: keep the adapter, or train without scale_shift"
        )


def _keep_chosen(experts: nn.Module, args: tuple) -> None:
    choose(experts)


def _is_dispatched(experts: Any) -> bool:
    """Tell a module whose forward asks the interface that ours is registered in.

    A class that writes forward anew asks none; FP8 experts ask one of their own.
    """
    forward: Any = getattr(type(experts), "forward", None)
    code = getattr(forward, "__code__", None)
    if code is None or getattr(forward, "__globals__", {}).get("__name__") != moe.__name__:
        return False
    cells = zip(code.co_freevars, forward.__closure__ or (), strict=True)
    asked = {name: cell.cell_contents for name, cell in cells}
    return (
        asked.get("experts_interface") is moe.ALL_EXPERTS_FUNCTIONS
        and hasattr(forward, "__wrapped__")
        and hasattr(experts, "is_transposed")
        and hasattr(getattr(experts, "config", None), "_experts_implementation")
    )


def _former(experts: Any) -> str:
    chosen: str = experts.config._experts_implementation
    return chosen.removeprefix(_PREFIX)


def _implementation(experts: Any) -> Callable[..., Tensor]:
    """The function of the former implementation."""
    former = _former(experts)
    if former == "eager":
        return type(experts).forward.__wrapped__
    return moe.ALL_EXPERTS_FUNCTIONS[former]


def _experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of `[tokens, hidden]` under their active factors, in hidden_states' type."""
    found = {}
    for name, adapted in self.__dict__.get("_hut_factors", {}).items():
        factors = adapted.active_factors()
        if factors:
            found[name] = factors
    if not found:
        return _implementation(self)(self, hidden_states, top_k_index, top_k_weights)
    if self._is_expert_parallel:
        raise HUTBackendError("HUT does not adapt experts under expert parallelism")
    route = _route(top_k_index, self.num_experts)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    x = hidden_states.to(getattr(self, first).dtype)
    with torch.autocast(x.device.type, enabled=False):
        x = _Dispatch.apply(x, route.token, route.place)
        x = _project(self, first, x, route.offsets, found)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    with torch.autocast(x.device.type, enabled=False):
        y = _project(self, "down_proj", x.to(self.down_proj.dtype), route.offsets, found)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    return _Combine.apply(y, top_k_weights, *route[:3]).to(hidden_states.dtype)


def _project(
    self: Any, name: str, x: Tensor, offsets: Tensor, found: dict[str, list[Factors]]
) -> Tensor:
    """One projection of every row: the base, plus what each adapter adds to it."""
    weight = getattr(self, name)
    bias = getattr(self, f"{name}_bias") if self.has_bias else None
    weight = weight.mT if self.is_transposed else weight
    adapted = [
        hut_grouped_linear(
            x, weight, hut_A, hut_B, offsets, bias, gamma=gamma, beta=beta, **options
        )
        for hut_A, hut_B, gamma, beta, options in found.get(name, ())
    ]
    if len(adapted) == 1:
        return adapted[0]
    base = grouped_product(x, weight, offsets, bias)
    if not adapted:
        return base
    acc = torch.promote_types(base.dtype, torch.float32)
    total = base.to(acc)
    for one in adapted:
        total = total + (one - base.to(acc))
    return total.to(base.dtype)


class _Route(NamedTuple):
    """The tokens' way to their experts.

    Attributes:
        token: the token of each row, `[S]`.
        order: each row's place in the flattened choices, `[S]`.
        place: the row of each token's k choices, `[tokens, k]`.
        offsets: the end of each expert's rows, `[experts]`.
    """

    token: Tensor
    order: Tensor
    place: Tensor
    offsets: Tensor


def _route(top_k_index: Tensor, num_experts: int) -> _Route:
    k = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    bounds = torch.arange(num_experts, device=order.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, bounds, right=True, out_int32=True)
    return _Route(order // k, order, place.view(-1, k), offsets)


class _Dispatch(torch.autograd.Function):
    """Copies each token to the rows of its experts; backward sums them, without atomics."""

    @staticmethod
    def forward(x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        return x.index_select(0, token)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return F.embedding_bag(place, grad, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """Sums each token's rows under its weights, in one pass and one rounding."""

    @staticmethod
    def forward(y: Tensor, weights: Tensor, token: Tensor, order: Tensor, place: Tensor) -> Tensor:
        dtype = torch.promote_types(y.dtype, weights.dtype)
        weights = weights.to(dtype)
        return F.embedding_bag(place, y.to(dtype), per_sample_weights=weights, mode="sum")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        y, weights, token, order, place = inputs
        needs_y = ctx.needs_input_grad[1]
        ctx.save_for_backward(y if needs_y else None, weights, token, order, place)
        ctx.dtype = y.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, token, order, place = ctx.saved_tensors
        d_y = d_weights = None
        if ctx.needs_input_grad[0]:
            d_y = grad.index_select(0, token)
            d_y.mul_(weights.reshape(-1)[order].to(grad.dtype)[:, None])
            d_y = d_y.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            rows = [(y[at] * grad).sum(1) for at in place.unbind(1)]
            d_weights = torch.stack(rows, 1).to(weights.dtype)
        return d_y, d_weights, None, None, None


for _name in ("eager", "grouped_mm", "batched_mm"):
    moe.ALL_EXPERTS_FUNCTIONS.register(f"{_PREFIX}{_name}", _experts_forward)
