"""Storage of frozen weights: dense in the compute type, or in few bits by bitsandbytes."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hut_kernels import formats
from hut_kernels.nn import is_conv1d

DENSE = "dense"
BASES = (DENSE, "nf4", "int8")
OWN, LIBRARY = "own", "library"  # whose dequantization


def missing(base: str) -> str | None:
    """The reason why weights cannot be stored so here; None where they can."""
    if base != DENSE and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed (in the repository: pip install '.[bench]')"
    return None


def stored(linear: nn.Module, base: str) -> nn.Module:
    """A layer whose frozen weight is stored as `base` says: `linear` itself, or one that is new.

    NF4 is in blocks of 64 with an absmax of 32 bits each, bitsandbytes' own default for a layer.
    """
    if base == DENSE:
        return linear
    import bitsandbytes as bnb

    conv1d, weight = is_conv1d(linear), linear.weight.detach()
    weight = weight.t().contiguous() if conv1d else weight
    sizes, device = weight.shape[::-1], weight.device
    with torch.device("meta"):
        layer: Any = (
            bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=weight.dtype)
            if base == "nf4"
            else bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        )
    if base == "nf4":
        # On the CPU first: only a weight that moves is quantized, wherever it moves to.
        layer.weight = bnb.nn.Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False
        ).to(device)
        layer.quant_state = layer.weight.quant_state
    else:
        layer.weight = bnb.nn.Int8Params(
            weight.cpu(), requires_grad=False, has_fp16_weights=False
        ).to(device)
        layer.init_8bit_state()  # as a first forward would, for one of those that share the weight
    layer.bias = linear.bias
    return layer


def with_stored(model: nn.Module, base: str) -> nn.Module:
    """A model with the linear layers of its numbered blocks stored so, in place, and marked so."""
    if base != DENSE:
        for name, module in list(model.named_modules()):
            linear = isinstance(module, nn.Linear) or is_conv1d(module)
            if linear and re.search(r"(^|\.)\d+(\.|$)", name):
                model.set_submodule(name, stored(module, base))
        mark(model)
    return model


def mark(model: Any) -> None:
    """Says of a model what a quantizer of transformers says, and PEFT asks for."""
    kinds = {type(module).__name__ for module in model.modules()}
    model.is_loaded_in_4bit = "Linear4bit" in kinds
    model.is_loaded_in_8bit = "Linear8bitLt" in kinds


def dequantizations(layer: Any, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """W0 in the compute type, by the fallback of hut_kernels and by the weight's library."""
    from bitsandbytes import functional

    weight = formats.base_weight(layer)
    whole = formats.stored(weight)
    theirs: Callable[[], Tensor] = (
        partial(functional.dequantize_4bit, weight.data, weight.quant_state)
        if hasattr(weight, "quant_state")
        else lambda: functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(dtype)
    )
    return {OWN: partial(whole.dense, dtype), LIBRARY: theirs}


def parameters(layer: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A layer's parameters by name, those in few bits as they are in the compute type."""
    for name, module in layer.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            value: Tensor = parameter
            if type(parameter) is not nn.Parameter:
                value = formats.dense(formats.base_weight(module), dtype)
            yield f"{name}.{own}" if name else own, value
