"""inject and merge: HUT layers into a model, and plain layers back."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from . import formats
from .bypassed import reason_not_called, switch_off_fused_inference
from .experts import HUTExperts
from .nn import HUTLinear, is_conv1d, move_hooks, named


def inject(
    model: nn.Module,
    target_modules: str | Collection[str],
    r: int = 8,
    *,
    target_parameters: Collection[str] = (),
    **options: Any,
) -> list[str]:
    """Replace linear layers of `model` by HUT layers, in place, and freeze everything else.

    HUT layers that the model already has stay as they are, so `inject` can be called again for
    other targets. A module that stands under several names is replaced under all of them by one
    HUT layer, and tied weights stay tied. Hooks move to the HUT layer.

    PyTorch's fused inference path of `nn.TransformerEncoder` reads the weights of its linear layers
    by itself; it is switched off in the encoders that get HUT layers.

    Args:
        model: the model to change.
        target_modules: names, or dot-separated ends of names, of the layers to replace; or one
            string, a regular expression that must match the whole name, or `"all-linear"`, every
            linear layer but the output layer of a transformers model.
        r: as for `HUTLinear`.
        target_parameters: names, or dot-separated ends of names, of stacks of experts' weights in
            a transformers model (`"experts.gate_up_proj"`): they get `HUTExperts`. With
            `target_modules=[]` beside them no linear layer is replaced.
        **options: as for `HUTLinear.from_linear`; experts have no `dropout`, `precision` or
            `scale_by_rms`.

    Returns:
        The names of the replaced modules, and of the adapted parameters.

    Raises:
        ValueError: a listed name matches no `nn.Linear` or Conv1D, or is of another kind of module;
            a layer matches whose weight is read without calling it (the output projection of
            `nn.MultiheadAttention`, projections of Mamba) or that was compiled by itself; or an
            option is wrong. The model is unchanged, as after every error.
        TypeError: a linear layer whose class has a `forward` of its own.
        HUTBackendError: a quantized, sharded or computed weight.

    Examples:
        >>> from torch import nn
        >>> from hut_kernels import inject
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inject(model, ["0"], r=4)
        ['0']
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.hut_A', '0.hut_B']
    """
    if target_parameters and not target_modules:
        targets = []
    else:
        targets = _find_targets(model, target_modules)
    stacks = _new_stacks(model, target_parameters, r, options) if target_parameters else []
    layers: dict[nn.Module, HUTLinear] = {}
    for name, linear in targets:
        if linear not in layers:
            _check_not_compiled(name)
            with named(name):
                layers[linear] = HUTLinear.from_linear(linear, r, **options)
    _freeze(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = [name for name, module in modules.items() if module in layers]
    for linear, layer in layers.items():
        # The very same parameters, now frozen, so that a tie outlives .to() and .half().
        layer.weight = linear.get_parameter("weight")
        if layer.bias is not None:
            layer.bias = linear.get_parameter("bias")
        move_hooks(linear, layer)
    for name in replaced:
        model.set_submodule(name, layers[modules[name]])
    for name, experts, parameter, factors in stacks:
        experts_integration().adapt(experts, parameter, factors)
        replaced.append(f"{name}.{parameter}")
    switch_off_fused_inference(model, HUTLinear)
    return replaced


def _new_stacks(
    model: nn.Module, target_parameters: Collection[str], r: int, options: dict[str, Any]
) -> list[tuple[str, nn.Module, str, HUTExperts]]:
    """The stacks to adapt that have no factors yet, with their fresh factors."""
    integration = experts_integration()
    stacks = []
    for name, experts, parameter in integration.find_stacks(model, target_parameters):
        if not hasattr(experts, f"hut_{parameter}"):
            with named(f"{name}.{parameter}"):
                factors = integration.new_factors(experts, parameter, r, **options)
            stacks.append((name, experts, parameter, factors))
    return stacks


def experts_integration() -> Any:
    """The integration of transformers' experts, which imports transformers."""
    return importlib.import_module(f"{__package__}.integrations.experts")


def merge(model: nn.Module) -> nn.Module:
    """Replace every HUT layer of `model` by a plain layer that computes the same, in place.

    A merged layer is frozen and no longer tied to the layer whose weight it shared; that of a
    quantized one is dense, and a warning tells what this costs in memory. The
    configuration of a transformers model whose output embeddings these were is told so.

    Args:
        model: the model to change.

    Returns:
        `model`, or the plain layer where `model` is itself a HUT layer.

    Raises:
        HUTBackendError: the data of a layer is sharded, offloaded or on the meta device, or made by
            a hook from other parameters (pruning). The model is unchanged.
        TypeError: a layer has a `forward` of its own, such as accelerate's. The model is unchanged.
        ValueError: a layer was compiled by itself. The model is unchanged.

    Examples:
        >>> from torch import nn
        >>> from hut_kernels import inject, merge
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, ["0", "2"])
        >>> merge(model)[0]
        Linear(in_features=8, out_features=8, bias=True)
    """
    if isinstance(model, HUTLinear):
        linear = model.to_linear()
        move_hooks(model, linear)
        return linear
    modules = list(model.named_modules(remove_duplicate=False))
    adapted = {
        owner
        for owner in model.modules()
        if any(isinstance(child, HUTExperts) for child in owner.children())
    }
    for experts in adapted:
        experts_integration().check_merge(experts)
    layers = [(name, module) for name, module in modules if isinstance(module, HUTLinear)]
    for name, layer in layers:
        _check_not_compiled(name)
        with named(name):
            layer.check_plain()
    embedding = _tied_embedding(model)
    quantized = {layer for _, layer in layers if formats.is_quantized(formats.base_weight(layer))}
    _prepare_dense(model, quantized)
    plain: dict[nn.Module, nn.Module] = {}
    for name, layer in layers:
        if layer not in plain:
            plain[layer] = layer.plain()
            move_hooks(layer, plain[layer])
            if embedding is not None and layer.weight is embedding:
                config: Any = model.config
                config.tie_word_embeddings = False
        model.set_submodule(name, plain[layer])
    for experts in adapted:
        experts_integration().merge_experts(experts)
    if quantized:
        formats.forget_quantization(model)
    return model


def _prepare_dense(model: nn.Module, quantized: set[HUTLinear]) -> None:
    """Tells quantized layers the model's type, and the user what they will take when dense."""
    for layer in quantized:
        layer.dense_default = formats.float_dtype(model)
    if quantized:
        sizes = [layer.sizes() for layer in quantized]
        formats.warn_of_size(len(sizes), *map(sum, zip(*sizes, strict=True)))


def _tied_embedding(model: nn.Module) -> Tensor | None:
    """The weight of a transformers model that its configuration ties to the output embeddings."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    return getattr(embeddings(), "weight", None) if tied and embeddings else None


def _check_not_compiled(name: str) -> None:
    """A layer wrapped by torch.compile on its own: the wrapper would go on running the old one."""
    if name.rpartition(".")[2] == "_orig_mod":
        raise ValueError(f"{name} was compiled by itself: inject and merge before torch.compile")


def _find_targets(
    model: nn.Module, target_modules: str | Collection[str]
) -> list[tuple[str, nn.Module]]:
    """The modules to replace, by name: those that match and are of a kind that can be adapted."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        heads = _heads(model)
        matched = [
            (name, module)
            for name, module in modules.items()
            if name and module not in heads and _is_linear_like(module)
        ]
    else:
        matches = _matcher(target_modules)
        matched = [(name, module) for name, module in modules.items() if name and matches(name)]
    if not isinstance(target_modules, str):
        _check_listed(matched)
    targets = [(name, module) for name, module in matched if _is_linear_like(module)]
    if not targets:
        raise ValueError(_no_match(modules, matched, target_modules))
    if not isinstance(target_modules, str):
        _check_all_match(modules, matched, target_modules)
    for name, _ in targets:
        reason = reason_not_called(name, modules[name.rpartition(".")[0]])
        if reason:
            raise ValueError(f"{name} cannot be a HUT layer: {reason}")
    return targets


def _heads(model: nn.Module) -> list[nn.Module]:
    """The output layers that PEFT's "all-linear" leaves out, of a transformers model."""
    output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    if output_embeddings is None:
        return []
    heads = (output_embeddings(), *(getattr(model, name, None) for name in ("score", "classifier")))
    return [head for head in heads if head is not None]


def _matcher(target_modules: str | Collection[str]) -> Callable[[str], object]:
    """A predicate on module names, by PEFT's rules."""
    if isinstance(target_modules, str):
        try:
            return re.compile(target_modules).fullmatch
        except re.error as error:
            raise ValueError(
                f"target_modules as one string is a regular expression, and {target_modules!r} is "
                f"not a valid one ({error}); give names as a list"
            ) from error
    ends = tuple(f".{target}" for target in target_modules)
    return lambda name: f".{name}".endswith(ends)


def _is_linear_like(module: nn.Module) -> bool:
    """A linear layer, quantized ones included: these are refused by name when they are adapted."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or _is_quantized(module)


def _is_quantized(module: nn.Module) -> bool:
    """A linear layer of another library (or torch.ao) that keeps integers for its weight."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    integers = any(not tensor.is_floating_point() for tensor in own)
    packed = callable(getattr(module, "weight", None))
    return "Linear" in type(module).__name__ and (integers or packed)


def _check_listed(matched: Iterable[tuple[str, nn.Module]]) -> None:
    """A name that the user listed must not be passed over in silence; a mere container may."""
    for name, module in matched:
        if not _is_adaptable(module) and list(module.parameters(recurse=False)):
            kind = type(module).__name__
            raise ValueError(f"{name} is a {kind}; HUT adapts nn.Linear and Conv1D only")


def _check_all_match(
    modules: dict[str, nn.Module],
    matched: list[tuple[str, nn.Module]],
    target_modules: Collection[str],
) -> None:
    """A listed name that no linear layer has must not be passed over, though others match."""
    found = [f".{name}" for name, module in matched if _is_adaptable(module)]
    missing = sorted(t for t in target_modules if not any(n.endswith(f".{t}") for n in found))
    if missing:
        raise ValueError(
            f"no nn.Linear or Conv1D matches {missing} of target_modules"
            f"{near_matches(missing, (n for n, m in modules.items() if _is_adaptable(m)))}"
        )


def near_matches(missing: Iterable[str], names: Iterable[str]) -> str:
    """A half-sentence of the names, or ends of names, that `missing` may have been meant for."""
    ends = {end for name in names for end in (name, name.rpartition(".")[2])}
    near = {close for name in missing for close in get_close_matches(name, ends)}
    return f"; near matches: {', '.join(sorted(near))}" if near else ""


def _is_adaptable(module: nn.Module) -> bool:
    return _is_linear_like(module) or isinstance(module, HUTLinear)


def _no_match(
    modules: dict[str, nn.Module],
    matched: list[tuple[str, nn.Module]],
    target_modules: str | Collection[str],
) -> str:
    if any(isinstance(module, HUTLinear) for _, module in matched):
        return f"target_modules={target_modules!r} matches only modules that are HUT layers already"
    names = [name for name, module in modules.items() if name and _is_linear_like(module)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    candidates = ", ".join(names[:20]) + more if names else "none"
    return (
        f"no nn.Linear or Conv1D matches target_modules={target_modules!r} (a list of names or of "
        f"their ends, or one regular expression for the whole name); candidates: {candidates}"
    )


def _freeze(model: nn.Module) -> None:
    kinds = HUTLinear, HUTExperts
    hut = {p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    for parameter in model.parameters():
        if parameter not in hut:
            parameter.requires_grad_(False)
