"""Layers that read the same x (query, key and value; gate and up) in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dispatch, planner
from .adapters import HOOKS
from .autograd import HUTGroupFunction
from .functional import autocast_input, check_frozen, check_tensors
from .nn import HUTLinear, LayerTensors


def hut_linear_group(x: Tensor, layers: Sequence[HUTLinear]) -> tuple[Tensor, ...]:
    """What `tuple(layer(x) for layer in layers)` is, in fewer launches.

    Where the compiled extension runs the layers, one launch makes all their weights, one product
    their outputs and one product dx (docs/extension.md). Elsewhere, and where layers differ in
    more than size, rank and scaling, have hooks, dropout, `split` or a forward of their own, each
    is called by itself; so is what is no HUT layer, such as one that `merge` has replaced.

    Together the layers differ from layers by themselves in two ways. The outputs are slices of one
    tensor, which autograd does not let change in place: `y = y + 1`, not `y += 1`. And a layer of
    which no output is used gets gradients of 0, not None.

    Args:
        x: Activations, `[..., in_features]`.
        layers: HUT layers of the same `in_features`.

    Returns:
        For each layer `[..., out_features]`; not to be changed in place.

    Raises:
        ValueError, TypeError, HUTBackendError: As `hut_linear`.
    """
    layers = tuple(layers)
    if not _alike(layers):
        return tuple(layer(x) for layer in layers)
    groups = [layer._tensors() for layer in layers]
    for tensors in groups:
        check_tensors(x, *tensors, layers[0].transform)
        check_frozen(tensors[0])
    if x.numel() == 0 or not _together(x, groups):
        return tuple(layer(x) for layer in layers)
    x, _ = autocast_input(x)
    flat = (tensor for tensors in groups for tensor in tensors)
    scalings = tuple(layer.scaling for layer in layers)
    y = HUTGroupFunction.apply(x, layers[0].transform, layers[0].offset, scalings, *flat)
    return y.split([layer.out_features for layer in layers], dim=-1)


def _alike(layers: tuple[HUTLinear, ...]) -> bool:
    """Whether one call can compute the layers, and nothing but computing happens in theirs."""
    return len({_form(layer) for layer in layers}) == 1 < len(layers) and all(
        layer.fused
        and layer.precision == "merged"
        and not (layer.dropout and layer.training)
        and layer.weight.numel() > 0
        and "forward" not in vars(layer)
        and not any(vars(layer).get(name) for name in HOOKS)
        for layer in layers
    )


def _form(layer: HUTLinear) -> object:
    """What layers of one call have in common; a layer of another class shares nothing."""
    if type(layer) is not HUTLinear:
        return object()
    return layer.transform, layer.offset, layer.weight.dtype


def _together(x: Tensor, groups: list[LayerTensors]) -> bool:
    """Whether the extension is what runs all the layers."""
    factors = [tensor for tensors in groups for tensor in tensors[:3]]
    backend = dispatch.choose("auto", [x, *factors])
    if backend == "planned":
        return planner.group_wins([tensors[0].shape for tensors in groups])
    return backend == "cuda"
