"""Layers of other libraries that keep a quantized weight: what a HUT layer takes over from them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HUTBackendError
from . import four_bit

_PLAIN = (Tensor, nn.Parameter)


def base_weight(linear: Any) -> Tensor:
    """The weight of a layer, with what the layer keeps for it.

    The first forward of a `Linear8bitLt` moves the row scales from the weight to the layer's state.
    A `Linear4bit` has a quant_state of its own, for a weight that has lost its class.

    Raises:
        HUTBackendError: The weight is a part of codes in four bits, sharded by FSDP.
    """
    weight: Any = linear.weight
    scales = getattr(getattr(linear, "state", None), "SCB", None)
    if scales is not None and getattr(weight, "SCB", scales) is None:
        weight.SCB = scales
    if getattr(linear, "quant_state", None) is None:
        return weight
    if hasattr(weight, "_local_tensor"):
        raise HUTBackendError(
            f"weight is sharded ({type(weight).__name__}), and a part of codes in four bits cannot "
            f"be read: the model's forward gathers it (or weight.full_tensor()); merge and the "
            f"like come before fully_shard, and scale_by_rms in parameter_groups' place"
        )
    if type(weight) in _PLAIN or getattr(weight, "quant_state", None) is None:
        return four_bit.restored(weight, linear)
    return weight


def shared(weight: Any) -> nn.Parameter:
    """Another parameter, frozen, on the same storage.

    The libraries change a quantized weight in place, which the other one does not follow. One that
    an evaluation has repacked so is put in order again, in storage of its own.
    """
    if hasattr(weight, "quant_state"):
        return four_bit.in_order(weight)
    if hasattr(weight, "SCB"):
        return type(weight)(
            weight.data, requires_grad=False, has_fp16_weights=False, SCB=weight.SCB
        )
    return nn.Parameter(weight.detach(), requires_grad=False)


def compute_dtype(linear: Any) -> torch.dtype | None:
    """The type that a layer casts its inputs to (`Linear4bit`); None where it takes them as is."""
    return getattr(linear, "compute_dtype", None)


def multiplies_only(linear: nn.Module) -> bool:
    """Tell a layer whose class's forward is a product with its weight, quantized or not."""
    forward = type(linear).forward
    return forward is nn.Linear.forward or any(
        vars(base).get("forward") is forward
        for base in type(linear).__mro__
        if base.__module__.startswith("bitsandbytes.")
    )


def dense_dtype(linear: Any, default: torch.dtype = torch.float16) -> torch.dtype:
    """The compute type of a layer with a quantized weight: the type of a plain layer in its place.

    A `Linear8bitLt` keeps none: its bias tells, or where it has none `default` is it.
    """
    given = compute_dtype(linear)
    if given is not None:
        return given
    if hasattr(linear.weight, "SCB"):
        return default if linear.bias is None else linear.bias.dtype
    weight: Any = base_weight(linear)
    state = getattr(weight, "quant_state", weight)
    return getattr(state, "original_dtype", state.dtype)  # repacked ones have taken another


def float_dtype(model: nn.Module) -> torch.dtype:
    """The type in which a model computes: its first plain parameter's; float16 without any."""
    factors = ("hut_", "gamma", "beta")
    plain = (
        parameter.dtype
        for name, parameter in model.named_parameters()
        if type(parameter) is nn.Parameter
        and not any(part.startswith(factors) for part in name.split("."))
    )
    return next((dtype for dtype in plain if dtype.is_floating_point), torch.float16)


def warn_of_size(layers: int, quantized: int, dense: int) -> None:
    """Says what merging costs in memory: bytes of so many layers, before and after."""
    warnings.warn(
        f"merging makes {layers} quantized weights dense: {quantized / 1e6:.1f} MB become "
        f"{dense / 1e6:.1f} MB. Quantized again, they lose most of a small update; to keep them "
        f"small, leave the adapter unmerged",
        stacklevel=3,
    )


def forget_quantization(model: Any) -> None:
    """Takes transformers' marks of a quantized model off one that has no quantized weight left.

    With them it can be neither cast nor saved as what it is.
    """
    if any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        return
    marks = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method")
    for name in (*marks, "hf_quantizer"):
        vars(model).pop(name, None)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config


def statistics(layer: Any) -> dict[str, Tensor]:
    """A quantized weight's entries in a checkpoint beside its codes, as its library names them."""
    weight = layer._parameters.get("weight")
    if (state := _quant_state(layer)) is not None:
        entries = state.as_dict(packed=True)
        return {f"weight.{name}": value.detach() for name, value in entries.items()}
    if getattr(weight, "SCB", None) is not None:
        return {"SCB": weight.SCB.detach(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {}


def load_statistics(layer: Any, entries: dict[str, Tensor]) -> None:
    """Gives a quantized weight what `statistics` has taken from another layer."""
    weight = layer._parameters.get("weight")
    if (state := _quant_state(layer)) is None:
        weight.SCB = entries["SCB"].to(weight.device)
        return
    named = {name.removeprefix("weight."): value for name, value in entries.items()}
    layer.quant_state = type(state).from_dict(named, weight.device)
    if hasattr(weight, "quant_state"):
        weight.quant_state = layer.quant_state


def _quant_state(layer: Any) -> Any:
    """A layer's `QuantState`, the weight's own first; None where it has none."""
    return getattr(layer._parameters.get("weight"), "quant_state", layer.quant_state)
