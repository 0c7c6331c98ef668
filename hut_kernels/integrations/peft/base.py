"""Questions to a base layer: its weight as a matrix, its bias, hooks and dropout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import formats
from ...nn import HOOKS, check_linear, is_conv1d, is_replaced


def check_base(base: nn.Module) -> None:
    """Refuse a base layer whose weight HUT cannot multiply.

    Raises:
        TypeError: not an `nn.Linear` or a Conv1D, or a subclass with a `forward` of its own.
        HUTBackendError: a quantized, sharded or computed weight.
    """
    if hasattr(base, "_old_forward"):  # an accelerate hook wraps the class's own forward
        wrapped = vars(base).pop("forward", None)
        try:
            check_linear(base)
        finally:
            if wrapped is not None:
                vars(base)["forward"] = wrapped
    else:
        check_linear(base)


def is_watched(base: nn.Module) -> bool:
    """Tell a base layer whose call does more than its product: hooks, or a `forward` put on it."""
    state = vars(base)
    replaced = is_replaced(base) and not _aligns_only(state.get("_hf_hook"))
    return replaced or any(state.get(name) for name in HOOKS)


def _aligns_only(hook: Any) -> bool:
    """Tell a hook of accelerate that only brings inputs to the weight's device.

    Every layer of a model that is spread over several devices has it, for the blocks' own hooks
    have brought them there already.
    """
    aligns = type(hook).__name__ == "AlignDevicesHook"
    return aligns and not hook.offload and not hook.io_same_device


def drops(dropout: nn.Module) -> bool:
    """Tell a dropout that does anything; it may be in another mode than its layer."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def matrix(base: Any) -> Tensor:
    """The weight of a base layer as `[out_features, in_features]`; of a Conv1D, a view."""
    weight = formats.base_weight(base)
    if not isinstance(weight, nn.Parameter):
        weight = weight.detach()  # a view of FSDP's flat parameter, which trains only what it must
    return weight.t() if is_conv1d(base) else weight


def bias(base: Any) -> Tensor | None:
    """The bias of a base layer, or None."""
    return getattr(base, "bias", None)
