"""Adapter files: what HUT layers trained, saved to and loaded from one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bypassed import is_untrained, untrained_message
from .experts import HUTExperts
from .layer import FLOAT_NAMES, FLOATS, PRECISIONS, TRANSFORMS
from .nn import HUTLinear, check_data, fill, named, whole

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
FACTOR_DTYPES = dict(zip(FLOAT_NAMES, FLOATS, strict=True))

# What torch.compile and checkpoint_wrapper put into the names of what they wrap; replicas put in
# "module", which a model may well have for a name of its own.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
_REPLICAS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Collect what HUT layers train: `hut_A`, `hut_B`, `gamma` and `beta`, by full name.

    The tensors are detached and share the parameters' storage, as in `model.state_dict()`. Those of
    a sharded model are DTensors.

    Args:
        model: a model with HUT layers, wrapped or not.

    Raises:
        ValueError: the model has no HUT layer.
        HUTBackendError: a factor is on the meta device (offloaded), or is not stored as itself
            (pruned, parametrized).

    Examples:
        >>> from torch import nn
        >>> from hut_kernels import adapter_state_dict, inject
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> names = inject(model, ["0"], r=4)
        >>> {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
        {'0.hut_A': (4, 8), '0.hut_B': (8, 4)}
    """
    factors = {}
    for name, layer in _hut_layers(model).items():
        with named(name):
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

    Args:
        model: a model with HUT layers, wrapped or not.
        file: the path to write.

    Raises:
        ValueError: the model has no HUT layer.
        HUTBackendError: as for `adapter_state_dict`.

    Examples:
        >>> import os, tempfile
        >>> from torch import nn
        >>> from hut_kernels import adapter_options, inject, load_adapter, save_adapter
        >>> model, other = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
        >>> names = inject(model, ["0"], r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "adapter.safetensors")
        ...     save_adapter(model, file)
        ...     names = inject(other, ["0"], **adapter_options(file))
        ...     load_adapter(other, file)
        >>> bool((other[0].hut_A == model[0].hut_A).all())
        True
    """
    factors = {name: whole(factor) for name, factor in adapter_state_dict(model).items()}
    # A copy each, since safetensors refuses tensors that share storage.
    tensors = {name: f.to("cpu", copy=True).contiguous() for name, f in factors.items()}
    _warn_of_untrained(model, tensors)
    write(file, {name: _options(layer) for name, layer in _hut_layers(model).items()}, tensors)


def write(
    file: str | os.PathLike[str],
    layers: Mapping[str, dict[str, Any]],
    tensors: dict[str, Tensor],
) -> None:
    """Write every layer's options and the factors, on the CPU, to an adapter file."""
    from safetensors.torch import save

    described = json.dumps(layers)
    metadata = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "layers": described,
        "sha256": _checksum(described, tensors),
    }
    path = Path(file)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(save(tensors, metadata))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read(file: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Read every layer's options and the factors from an adapter file (ValueError: damaged)."""
    layers, tensors, metadata = _read(file)
    _check_undamaged(file, layers, tensors, metadata)
    return layers, tensors


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
    ranks of a sharded model must call, each with the file; rank 0's tensors are scattered.
    `save_adapter` has an example.

    Args:
        model: the model to fill.
        file: a file of `save_adapter`.

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
        _check_same_options(name, dict(saved_layers[name]), _options(layer))
    _check_same_names("tensors", tensors, factors)
    for name, factor in factors.items():
        _check_fits(name, tensors[name], factor)
    # Last, for where a file does not fit the model the checks above say more.
    _check_undamaged(file, saved_layers, tensors, metadata)
    for name, layer in layers.items():
        layer.rms = saved_layers[name].get("rms")
    with torch.no_grad():
        for name, factor in factors.items():
            fill(factor, tensors[name])


def adapter_options(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the layer options of an adapter file, for `inject(model, target_modules, **options)`.

    `save_adapter` has an example.

    Args:
        file: a file of `save_adapter`.

    Raises:
        ValueError: the file is damaged or is no adapter, or its layers differ in their options, so
            that one call of `inject` cannot make them.
    """
    layers, _ = read(file)
    # The layers' rms differ by nature, and load_adapter brings them.
    shared = {
        name: {k: v for k, v in options.items() if k != "rms"}
        | ({"scale_by_rms": True} if "rms" in options else {})
        for name, options in layers.items()
    }
    (first, options), *others = shared.items()
    for name, other in others:
        if other != options:
            raise ValueError(
                f"the layers of {file} differ in their options, so each group needs an inject call "
                f"of its own: {first or 'the model'} has {options}, but {name} has {other}"
            )
    return options | {"factor_dtype": FACTOR_DTYPES[options["factor_dtype"]]}


def _hut_layers(model: nn.Module) -> dict[str, HUTLinear | HUTExperts]:
    """List the HUT layers by name, each once; names as they were before anything was wrapped."""
    layers = {
        ".".join(part for part in name.split(".") if part not in _WRAPPED): module
        for name, module in _unwrapped(model).named_modules()
        if isinstance(module, (HUTLinear, HUTExperts))
    }
    if not layers:
        raise ValueError("the model has no HUT layer: call inject first")
    return layers


def _unwrapped(model: nn.Module) -> nn.Module:
    """Take the model out of torch.compile's and replication's wrappers, in any order."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, _REPLICAS):
            model = model.get_submodule("module")
        else:
            return model


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _options(layer: HUTLinear | HUTExperts) -> dict[str, Any]:
    options = {key: getattr(layer, key) for key in _OPTIONS if key != "factor_dtype"}
    options["factor_dtype"] = str(layer.hut_A.dtype).removeprefix("torch.")
    return options | ({"rms": layer.rms} if layer.scale_by_rms else {})


def _read(
    file: str | os.PathLike[str],
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], dict[str, str]]:
    """Read the options of every layer, the tensors, and the metadata of an adapter file."""
    from safetensors import SafetensorError, safe_open

    if Path(file).exists() and not Path(file).is_file():
        # A folder; a pipe would keep its reader waiting.
        peft = (Path(file) / "adapter_config.json").exists()
        raise ValueError(f"{file} is not a file{_TO_NATIVE if peft else ''}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            layers = _parse_metadata(file, metadata, opened.keys())
            # An opened file is no mapping: its keys can't be had by iterating over it.
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated, or not a safetensors file: {error}") from error
    except RuntimeError as error:  # torch's, which maps the whole file
        raise ValueError(f"{file} cannot be mapped into memory: {error}") from error
    return layers, tensors, metadata


_TO_NATIVE = (
    "; it is an adapter of PEFT: hut_kernels.integrations.peft.to_native(directory, file) makes an "
    "adapter file of one of HUT (of one of HiRA, after from_hira)"
)


def _hint(keys: Collection[str]) -> str:
    """Make a half-sentence on what to do with the file of another library, told by its tensors."""
    if any(".hut_" in key or ".hira_" in key for key in keys):
        return _TO_NATIVE
    if any(".lora_" in key for key in keys):
        return (
            "; it is a LoRA adapter, which adds to weights what HUT cannot express: load it with "
            "PEFT, and adapt the model that merge_and_unload gives"
        )
    return ""


def _parse_metadata(
    file: str | os.PathLike[str], metadata: Mapping[str, str], keys: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Read the options of every layer."""
    if metadata.get("format") != _FORMAT:
        found = f"{file} is not a hut_kernels adapter: format={metadata.get('format')!r}"
        raise ValueError(found + _hint(keys))
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
    """Tell options that some `HUTLinear` has; an exception may say no as well."""
    r, alpha, rms = options["r"], options["alpha"], options.get("rms", 1.0)
    return (
        {*options, "rms"} == {*_OPTIONS, "rms"}
        and type(rms) is float
        and 0 < rms < math.inf
        and ("rms" not in options or (options["transform"], options["offset"]) == ("low_rank", 1))
        and not any(type(options[name]) is bool for name in ("alpha", "offset", "dropout"))
        and type(r) is int
        and r >= 1
        and (alpha is None or 0 < alpha < math.inf)
        and options["transform"] in TRANSFORMS
        and options["offset"] in (0, 1)
        and 0 <= options["dropout"] < 1
        and type(options["scale_shift"]) is bool
        and options["precision"] in PRECISIONS
        and options["factor_dtype"] in FACTOR_DTYPES
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
    """Tell factors that are there, and of the rank and type that their options say."""
    keys = ("hut_A", "hut_B", *(("gamma", "beta") if options["scale_shift"] else ()))
    factors = [tensors.get(_join(name, key)) for key in keys]
    dtype, r = FACTOR_DTYPES[options["factor_dtype"]], options["r"]
    fitting = [factor for factor in factors if factor is not None and factor.dtype == dtype]
    if len(fitting) < len(factors):
        return False
    A, B = fitting[:2]
    return A.ndim == B.ndim >= 2 and A.shape[-2] == B.shape[-1] == r


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
    for options in (saved, present):
        options["scale_by_rms"] = "rms" in options
    for key in (*_OPTIONS, "scale_by_rms"):
        if key not in _MAY_DIFFER and saved[key] != present[key]:
            raise ValueError(
                f"{name or 'the layer'} has {key}={present[key]!r}, but the file {saved[key]!r}: "
                f"inject with **adapter_options(file), or move the factors to the file's type"
            )


def _check_fits(name: str, saved: Tensor, present: Tensor) -> None:
    if saved.shape != present.shape or saved.dtype != present.dtype:
        raise ValueError(
            f"{name} has shape {tuple(present.shape)} and {present.dtype}, but in the file "
            f"{tuple(saved.shape)} and {saved.dtype}"
        )
