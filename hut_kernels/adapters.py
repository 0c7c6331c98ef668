"""Put HUT layers into a model, take what they trained out of it, and merge them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bypassed import (
    is_untrained,
    reason_not_called,
    switch_off_fused_inference,
    untrained_message,
)
from .errors import HUTBackendError
from .layer import FLOAT_NAMES, FLOATS, PRECISIONS, TRANSFORMS
from .nn import HUTLinear, check_data, fill, is_conv1d

_FORMAT = "hut_kernels"
_FORMAT_VERSION = "1"

# How a layer is run (`fused`) is not part of an adapter; how it is dropped out and rounded is, but
# may differ in the model that an adapter is loaded into.
_OPTIONS = (
    "r",
    "alpha",
    "transform",
    "offset",
    "dropout",
    "scale_shift",
    "precision",
    "factor_dtype",
)
_MAY_DIFFER = ("dropout", "precision")
_FACTOR_DTYPES = dict(zip(FLOAT_NAMES, FLOATS, strict=True))

# What torch.compile and checkpoint_wrapper put into the names of what they wrap; replicas put in
# "module", which a model may well have for a name of its own.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
_REPLICAS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)

# A module's hooks outlive its replacement: the dictionaries move on, so handles stay valid.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def inject(
    model: nn.Module, target_modules: str | Collection[str], r: int = 8, **options: Any
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
        **options: as for `HUTLinear.from_linear`.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: a listed name matches no `nn.Linear` or Conv1D, or is of another kind of module;
            a layer matches whose weight is read without calling it (the output projection of
            `nn.MultiheadAttention`, projections of Mamba) or that was compiled by itself; or an
            option is wrong. The model is unchanged, as after every error.
        TypeError: a linear layer whose class has a `forward` of its own.
        HUTBackendError: a quantised, sharded or computed weight.
    """
    targets = _find_targets(model, target_modules)
    layers: dict[nn.Module, HUTLinear] = {}
    for name, linear in targets:
        if linear not in layers:
            _check_not_compiled(name)
            with _named(name):
                layers[linear] = HUTLinear.from_linear(linear, r, **options)
    _freeze(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = [name for name, module in modules.items() if module in layers]
    for linear, layer in layers.items():
        # The very same parameters, now frozen, so that a tie outlives .to() and .half().
        layer.weight = linear.get_parameter("weight")
        if layer.bias is not None:
            layer.bias = linear.get_parameter("bias")
        _move_hooks(linear, layer)
    for name in replaced:
        model.set_submodule(name, layers[modules[name]])
    switch_off_fused_inference(model, HUTLinear)
    return replaced


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What the HUT layers of `model` train: `hut_A`, `hut_B`, `gamma` and `beta`, by full name.

    The tensors are detached and share the parameters' storage, as in `model.state_dict()`. Those of
    a sharded model are DTensors.

    Raises:
        ValueError: the model has no HUT layer.
        HUTBackendError: a factor is on the meta device (offloaded), or is not stored as itself
            (pruned, parametrized).
    """
    factors = {}
    for name, layer in _hut_layers(model).items():
        with _named(name):
            check_data(layer, *(key for key, _ in layer.named_factors()))
        # By state_dict, for its hooks: after a forward FSDP2 may hold a cast copy of the whole.
        state = layer.state_dict()
        factors.update({_join(name, key): state[key] for key, _ in layer.named_factors()})
    return factors


def save_adapter(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` to one safetensors file, replacing an old one as a whole.

    The file's metadata holds a format version, every HUT layer's options and a checksum of all
    that the file says. The factors of a sharded model are gathered, so that all its ranks must
    call. Each of them writes the file, and each the same.

    A warning names the layers that training left as they were made while it changed others.

    Raises:
        ValueError: the model has no HUT layer.
        HUTBackendError: as for `adapter_state_dict`.
    """
    from safetensors.torch import save

    factors = {name: _whole(factor) for name, factor in adapter_state_dict(model).items()}
    # A copy each, since safetensors refuses tensors that share storage.
    tensors = {name: f.to("cpu", copy=True).contiguous() for name, f in factors.items()}
    _warn_of_untrained(model, tensors)
    layers = json.dumps({name: _options(layer) for name, layer in _hut_layers(model).items()})
    metadata = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "layers": layers,
        "sha256": _checksum(layers, tensors),
    }
    path = Path(file)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(save(tensors, metadata))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _warn_of_untrained(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    layers = {n: layer for n, layer in _hut_layers(model).items() if layer.hut_B.requires_grad}
    untrained = [
        name
        for name, layer in layers.items()
        if is_untrained(factors[_join(name, "hut_B")], layer.transform, layer.offset)
    ]
    message = untrained_message(untrained, len(layers))
    if message:
        warnings.warn(message, stacklevel=3)


def load_adapter(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Fill the HUT layers of `model` from a file of `save_adapter`, bit for bit.

    The model must have the file's layers, with the file's options (`dropout`, `precision` and
    `fused` may differ); `inject(model, target_modules, **adapter_options(file))` makes them. All
    ranks of a sharded model must call, each with the file; what is dealt out is the first rank's.

    Raises:
        ValueError: the file is damaged or is no adapter, or its layers, options, shapes or types
            are not the model's. The model is unchanged.
        HUTBackendError: the factors of the model are on the meta device.
    """
    saved_layers, tensors, metadata = _read(file)
    # First, for it makes FSDP2 put back the layers' own parameters.
    factors = adapter_state_dict(model)
    layers = _hut_layers(model)
    _check_same_names("HUT layers", saved_layers, layers)
    for name, layer in layers.items():
        _check_same_options(name, saved_layers[name], _options(layer))
    _check_same_names("tensors", tensors, factors)
    for name, factor in factors.items():
        _check_fits(name, tensors[name], factor)
    # Last, for where a file does not fit the model the checks above say more.
    _check_undamaged(file, saved_layers, tensors, metadata)
    with torch.no_grad():
        for name, factor in factors.items():
            fill(factor, tensors[name])


def adapter_options(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The layer options of an adapter file, for `inject(model, target_modules, **options)`.

    Raises:
        ValueError: the file is damaged or is no adapter, or its layers differ in their options, so
            that one call of `inject` cannot make them.
    """
    layers, tensors, metadata = _read(file)
    _check_undamaged(file, layers, tensors, metadata)
    (first, options), *others = layers.items()
    for name, other in others:
        if other != options:
            raise ValueError(
                f"the layers of {file} differ in their options, so each group needs an inject call "
                f"of its own: {first or 'the model'} has {options}, but {name} has {other}"
            )
    return options | {"factor_dtype": _FACTOR_DTYPES[options["factor_dtype"]]}


def merge(model: nn.Module) -> nn.Module:
    """Replace every HUT layer of `model` by a plain layer that computes the same, in place.

    A merged layer is frozen and no longer tied to the layer whose weight it shared; the
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
    """
    if isinstance(model, HUTLinear):
        return _merged(model)
    modules = list(model.named_modules(remove_duplicate=False))
    layers = [(name, module) for name, module in modules if isinstance(module, HUTLinear)]
    for name, layer in layers:
        _check_not_compiled(name)
        with _named(name):
            layer.check_plain()
    embedding = _tied_embedding(model)
    plain: dict[nn.Module, nn.Module] = {}
    for name, layer in layers:
        if layer not in plain:
            plain[layer] = _merged(layer)
            if embedding is not None and layer.weight is embedding:
                config: Any = model.config
                config.tie_word_embeddings = False
        model.set_submodule(name, plain[layer])
    return model


def _merged(layer: HUTLinear) -> nn.Module:
    linear = layer.to_linear()
    _move_hooks(layer, linear)
    return linear


def _tied_embedding(model: nn.Module) -> Tensor | None:
    """The weight of a transformers model that its configuration ties to the output embeddings."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    return getattr(embeddings(), "weight", None) if tied and embeddings else None


def _check_not_compiled(name: str) -> None:
    """A layer wrapped by torch.compile on its own: the wrapper would go on running the old one."""
    if name.rpartition(".")[2] == "_orig_mod":
        raise ValueError(f"{name} was compiled by itself: inject and merge before torch.compile")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put a layer's name before what is raised about it."""
    try:
        yield
    except (TypeError, ValueError, HUTBackendError) as error:
        raise type(error)(f"{name}: {error}") from error


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
    """A linear layer, quantised ones included: these are refused by name when they are adapted."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or _is_quantised(module)


def _is_quantised(module: nn.Module) -> bool:
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
    hut = {p for m in model.modules() if isinstance(m, HUTLinear) for p in m.parameters()}
    for parameter in model.parameters():
        if parameter not in hut:
            parameter.requires_grad_(False)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    for name in HOOKS:
        vars(new)[name] = vars(old)[name]


def _hut_layers(model: nn.Module) -> dict[str, HUTLinear]:
    """The HUT layers by name, each once; names as they were before anything was wrapped."""
    layers = {
        ".".join(part for part in name.split(".") if part not in _WRAPPED): module
        for name, module in _unwrapped(model).named_modules()
        if isinstance(module, HUTLinear)
    }
    if not layers:
        raise ValueError("the model has no HUT layer: call inject first")
    return layers


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in torch.compile's and replication's wrappers, which stand in any order."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, _REPLICAS):
            model = model.get_submodule("module")
        else:
            return model


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _options(layer: HUTLinear) -> dict[str, Any]:
    options = {key: getattr(layer, key) for key in _OPTIONS if key != "factor_dtype"}
    return options | {"factor_dtype": str(layer.hut_A.dtype).removeprefix("torch.")}


def _read(
    file: str | os.PathLike[str],
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], dict[str, str]]:
    """The options of every layer, the tensors, and the metadata of an adapter file."""
    from safetensors import SafetensorError, safe_open

    if Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{file} is not a file")  # a folder; a pipe would keep its reader waiting
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            layers = _parse_metadata(file, metadata)
            # An opened file is no mapping: its keys can't be had by iterating over it.
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated, or not a safetensors file: {error}") from error
    except RuntimeError as error:  # torch's, which maps the whole file
        raise ValueError(f"{file} cannot be mapped into memory: {error}") from error
    return layers, tensors, metadata


def _parse_metadata(
    file: str | os.PathLike[str], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The options of every layer."""
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{file} is not a hut_kernels adapter: format={metadata.get('format')!r}")
    version = metadata.get("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{file} has adapter format version {version}; this hut_kernels reads {_FORMAT_VERSION}"
        )
    try:
        layers = json.loads(metadata["layers"])
        well_formed = bool(layers) and all(map(_well_formed, layers.values()))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"{file} has no readable layer options in its metadata")
    return layers


def _well_formed(options: dict[str, Any]) -> bool:
    """Whether a layer's options are those of some `HUTLinear`; an exception may say no as well."""
    r, alpha = options["r"], options["alpha"]
    return (
        set(options) == set(_OPTIONS)
        and not any(type(options[name]) is bool for name in ("alpha", "offset", "dropout"))
        and type(r) is int
        and r >= 1
        and (alpha is None or 0 < alpha < math.inf)
        and options["transform"] in TRANSFORMS
        and options["offset"] in (0, 1)
        and 0 <= options["dropout"] < 1
        and type(options["scale_shift"]) is bool
        and options["precision"] in PRECISIONS
        and options["factor_dtype"] in _FACTOR_DTYPES
    )


def _check_undamaged(
    file: str | os.PathLike[str],
    layers: Mapping[str, dict[str, Any]],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    if metadata.get("sha256") != _checksum(metadata["layers"], tensors):
        raise ValueError(f"{file} is damaged: its checksum is not that of its contents")
    for name, options in layers.items():
        if not _describes(options, name, tensors):
            raise ValueError(f"{file} contradicts itself: {name!r} has no factors of {options}")


def _describes(options: dict[str, Any], name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer's factors are there, and of the rank and type that its options say."""
    keys = ("hut_A", "hut_B", *(("gamma", "beta") if options["scale_shift"] else ()))
    factors = [tensors.get(_join(name, key)) for key in keys]
    dtype, r = _FACTOR_DTYPES[options["factor_dtype"]], options["r"]
    fitting = [factor for factor in factors if factor is not None and factor.dtype == dtype]
    if len(fitting) < len(factors):
        return False
    A, B = fitting[:2]
    return A.ndim == B.ndim == 2 and len(A) == B.shape[1] == r


def _checksum(layers: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the layers' options and of each tensor's name, type, shape and bytes."""
    total = hashlib.sha256(layers.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _check_same_names(what: str, saved: Collection[str], present: Collection[str]) -> None:
    missing = sorted(set(saved) - set(present))
    unexpected = sorted(set(present) - set(saved))
    if missing or unexpected:
        raise ValueError(
            f"the {what} of the file are not the model's: only in the file {missing[:5]}, only in "
            f"the model {unexpected[:5]} (first 5 of {len(missing)} and {len(unexpected)})"
        )


def _check_same_options(name: str, saved: dict[str, Any], present: dict[str, Any]) -> None:
    for key in _OPTIONS:
        if key not in _MAY_DIFFER and saved[key] != present[key]:
            raise ValueError(
                f"{name or 'the layer'} has {key}={present[key]!r}, but the file {saved[key]!r}: "
                f"inject with **adapter_options(file), or move the factors to the file's type"
            )


def _whole(factor: Tensor) -> Tensor:
    """The factor; where it is sharded, gathered from all ranks of its mesh."""
    if not hasattr(factor, "_local_tensor"):  # a DTensor's: an import that others are spared
        return factor
    # Offloaded shards go back to where their mesh can send them from.
    return factor.to(factor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def _check_fits(name: str, saved: Tensor, present: Tensor) -> None:
    if saved.shape != present.shape or saved.dtype != present.dtype:
        raise ValueError(
            f"{name} has shape {tuple(present.shape)} and {present.dtype}, but in the file "
            f"{tuple(saved.shape)} and {saved.dtype}"
        )
