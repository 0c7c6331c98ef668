"""PEFT's HUT adapters made of HiRA adapters or of adapter files, and back: the same factors."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from peft import (
    HiraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ... import adapter_file
from ...layer import acc_dtype
from ...nn import scaling_by_rms
from .config import HUTConfig

_PREFIX = "base_model.model."
_NATIVE_NAMES = {"hut_A": "hut_A", "hut_B": "hut_B", "hut_gamma": "gamma", "hut_beta": "beta"}
_FORM = ("transform", "offset", "scale_shift", "precision", "scale_by_rms")
_SHARED = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)


@dataclasses.dataclass(frozen=True)
class ConvertedAdapter:
    """A PEFT adapter in memory.

    The method is described in https://arxiv.org/abs/2409.13501; its residual form is HiRA
    (https://openreview.net/pdf?id=TwJrTz9cRS).

    Attributes:
        config: its configuration.
        state_dict: its tensors, under the names of PEFT's adapter files.

    Examples:
        >>> import pathlib, tempfile
        >>> from torch import nn
        >>> from hut_kernels import inject, save_adapter
        >>> from hut_kernels.integrations.peft import from_native
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> _ = inject(model, ["0"], r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "adapter.safetensors"
        ...     save_adapter(model, file)
        ...     adapter = from_native(file)
        >>> adapter.config.r, sorted(adapter.state_dict)
        (4, ['base_model.model.0.hut_A', 'base_model.model.0.hut_B'])
        >>> base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> type(adapter.apply(base).base_model).__name__
        'HUTModel'
    """

    config: Any
    state_dict: dict[str, Tensor]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter as PEFT does, for `PeftModel.from_pretrained(model, directory)`."""
        from safetensors.torch import save_file

        self.config.save_pretrained(str(directory))
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict.items()}
        save_file(tensors, Path(directory) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def apply(
        self, model: nn.Module, adapter_name: str = "default", *, is_trainable: bool = False
    ) -> PeftModel:
        """Put the adapter into a base model, or beside the adapters of a PEFT model.

        Args:
            model: the model.
            adapter_name: the adapter's name in it.
            is_trainable: whether to train the adapter further, as in `PeftModel.from_pretrained`.

        Returns:
            The PEFT model; `model` itself where it was one.

        Raises:
            ValueError: the adapter does not fit the model; names what is missing or left over. The
                model is without it again.
        """
        config = copy.copy(self.config)
        config.inference_mode = not is_trainable
        beside_others = isinstance(model, PeftModel)
        adapted: Any = model
        if beside_others:
            adapted.add_adapter(adapter_name, config)
        else:
            adapted = get_peft_model(model, config, adapter_name)
        result = set_peft_model_state_dict(adapted, self.state_dict, adapter_name)
        missing = [
            key
            for key in result.missing_keys
            if adapted.base_model.prefix in key and f".{adapter_name}" in key
        ]
        if missing or result.unexpected_keys:
            if beside_others:
                adapted.delete_adapter(adapter_name)
            else:
                adapted.unload()
            raise ValueError(
                f"the adapter does not fit the model: missing {missing[:5]}, without a place "
                f"in the model {result.unexpected_keys[:5]} "
                f"(first 5 of {len(missing)} and {len(result.unexpected_keys)})"
            )
        return adapted


def from_hira(path: str | os.PathLike[str], *, precision: str = "split") -> ConvertedAdapter:
    """Convert a HiRA adapter to HUT: `low_rank`, offset 1, scaling 1, the same factors.

    Args:
        path: a directory with a HiRA adapter, or its name on the hub.
        precision: `"split"` computes in two products, just as PEFT's HiRA does, and keeps updates
            too small for a 16-bit weight; `"merged"` in one.

    Raises:
        ValueError: it is another kind of adapter, or adapts embeddings or convolutions; the message
            names them.
    """
    config = _load_config(path, HiraConfig)
    tensors = load_peft_weights(str(path), "cpu")
    renamed = {_hut_key(key, value): value for key, value in tensors.items()}
    # From the tensors: PEFT 0.21 gives a layer its rank_pattern only from the second adapter on.
    ranks = {_module(key): A.shape[0] for key, A in tensors.items() if key.endswith(".hira_A")}
    r = max(ranks.values(), default=config.r)
    hut_config = HUTConfig(
        **{name: getattr(config, name) for name in _SHARED},
        r=r,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != r},
        hut_dropout=config.hira_dropout,
        precision=precision,
    )
    return ConvertedAdapter(hut_config, renamed)


def to_hira(path: str | os.PathLike[str]) -> ConvertedAdapter:
    """Convert a HUT adapter to HiRA.

    HiRA has no alpha, so `scaling` is folded into `hira_B`. Its layers get one rank, the greatest,
    since PEFT's HiRA ignores `rank_pattern`; smaller factors are filled up with zeros.

    Args:
        path: a directory with a HUT adapter, or its name on the hub.

    Raises:
        ValueError: it is another kind of adapter, or a HUT that HiRA cannot express (`two_sided`,
            offset 0, `scale_shift`).
    """
    config = _load_config(path, HUTConfig)
    if config.transform != "low_rank" or config.offset != 1 or config.scale_shift:
        raise ValueError(
            "HiRA is low_rank with offset 1 and without scale and shift, but the adapter has "
            f"transform={config.transform!r}, offset={config.offset:g}, "
            f"scale_shift={config.scale_shift}"
        )
    tensors = load_peft_weights(str(path), "cpu")
    r = max((A.shape[0] for key, A in tensors.items() if key.endswith(".hut_A")), default=config.r)
    folded = {}
    for key, value in tensors.items():
        if key.endswith(".hut_A"):
            value = F.pad(value, (0, 0, 0, r - value.shape[0]))
        elif key.endswith(".hut_B"):
            scaling = _scaling(config, _module(key), value.shape[1])
            wide = acc_dtype(value.dtype)
            value = value if scaling == 1 else (value.to(wide) * scaling).to(value.dtype)
            value = F.pad(value, (0, r - value.shape[1]))
        folded[_renamed(key, "hut_", "hira_")] = value
    hira_config = HiraConfig(
        **{name: getattr(config, name) for name in _SHARED}, r=r, hira_dropout=config.hut_dropout
    )
    return ConvertedAdapter(hira_config, folded)


def from_native(file: str | os.PathLike[str]) -> ConvertedAdapter:
    """Convert an adapter file of `save_adapter` to a PEFT adapter.

    Args:
        file: the adapter file.

    Returns:
        The adapter; what it computes is the file's to the bit, if PEFT keeps the factors' type
        (`autocast_adapter_dtype` makes 16-bit factors float32, which changes no value).

    Raises:
        ValueError: the file is damaged or is no adapter file, its layers differ in other options
            than rank and alpha, or it is of a layer by itself.
    """
    layers, tensors = adapter_file.read(file)
    first = next(iter(layers.values()))
    for name, options in layers.items():
        options["scale_by_rms"] = "rms" in options
        for key in {*options} - {"r", "alpha", "factor_dtype", "rms"}:
            if options[key] != first[key]:
                raise ValueError(
                    f"one HUTConfig has one {key}, but the layers of {file} have "
                    f"{first[key]!r} and {options[key]!r} ({name})"
                )
    if "" in layers:
        raise ValueError(f"{file} is of a layer by itself, and PEFT adapts layers of a model")
    r = max(options["r"] for options in layers.values())
    alpha = first["alpha"]
    config = HUTConfig(
        target_modules=sorted(layers),
        r=r,
        hut_alpha=alpha,
        rank_pattern=_pattern(layers, "r", r),
        alpha_pattern=_pattern(layers, "alpha", alpha),
        hut_dropout=first["dropout"],
        rms={name: options["rms"] for name, options in layers.items() if "rms" in options},
        **{key: first[key] for key in _FORM},
    )
    peft_names = {native: peft for peft, native in _NATIVE_NAMES.items()}
    renamed = {}
    for key, value in tensors.items():
        name, _, factor = key.rpartition(".")
        renamed[f"{_PREFIX}{name}.{peft_names[factor]}"] = value
    return ConvertedAdapter(config, renamed)


def to_native(path: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Convert a HUT adapter of PEFT to an adapter file, for `load_adapter`.

    Args:
        path: a directory with a HUT adapter, or its name on the hub.
        file: where to write the adapter file.

    Raises:
        ValueError: it is another kind of adapter, or holds modules that were trained as a whole
            (`modules_to_save`), which an adapter file cannot.
    """
    config = _load_config(path, HUTConfig)
    tensors, layers = {}, {}
    for key, value in load_peft_weights(str(path), "cpu").items():
        name, factor = _module(key), key.rpartition(".")[2]
        if factor not in _NATIVE_NAMES:
            raise ValueError(f"{path} holds {key}, and an adapter file holds factors of HUT only")
        tensors[f"{name}.{_NATIVE_NAMES[factor]}"] = value.contiguous()
        if factor == "hut_A":
            layers[name] = _native_options(config, name, value)
    adapter_file.write(file, layers, tensors)


def _native_options(config: HUTConfig, name: str, hut_A: Tensor) -> dict[str, Any]:
    r = len(hut_A)
    alpha_key = get_pattern_key(list(config.alpha_pattern), name)
    alpha = config.alpha_pattern.get(alpha_key, config.hut_alpha)
    residual = config.transform == "low_rank" and config.offset == 1
    return {
        "r": r,
        "alpha": r if alpha is None and residual else alpha,
        "transform": config.transform,
        "offset": float(config.offset),
        "dropout": config.hut_dropout,
        "scale_shift": config.scale_shift,
        "precision": config.precision,
        "factor_dtype": str(hut_A.dtype).removeprefix("torch."),
    } | ({"rms": config.rms[name]} if config.scale_by_rms else {})


def _pattern(layers: dict[str, dict[str, Any]], key: str, usual: Any) -> dict[str, Any]:
    """The layers whose option is not the usual one, by a pattern for each."""
    return {f"^{re.escape(n)}": o[key] for n, o in layers.items() if o[key] != usual}


def _load_config(path: str | os.PathLike[str], kind: type[Any]) -> Any:
    if Path(path).is_file():
        raise ValueError(
            f"{path} is a file, but an adapter of PEFT is a directory: from_native(file) makes one "
            f"of an adapter file"
        )
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, kind):
        name = config.peft_type.value
        others = {"HUT": "to_hira and to_native take it", "HIRA": "from_hira takes it"}
        door = others.get(name, "it cannot be converted, for its update is not a product with W0")
        raise ValueError(f"{path} is not an adapter of {kind.__name__}: peft_type={name}; {door}")
    return config


def _hut_key(key: str, value: Tensor) -> str:
    factor = key.rpartition(".")[2]
    if factor.startswith("hira_embedding_"):
        raise ValueError(f"{_module(key)} is an embedding, which HUT does not adapt")
    if factor in ("hira_A", "hira_B") and value.ndim != 2:
        raise ValueError(f"{_module(key)} is a convolution, which HUT does not adapt")
    return _renamed(key, "hira_", "hut_")


def _renamed(key: str, old: str, new: str) -> str:
    name, dot, factor = key.rpartition(".")
    if factor in (f"{old}A", f"{old}B"):
        factor = factor.replace(old, new)
    return f"{name}{dot}{factor}"


def _module(key: str) -> str:
    """The name of the layer whose factor `key` names."""
    return key.removeprefix(_PREFIX).rpartition(".")[0]


def _scaling(config: HUTConfig, module: str, r: int) -> float:
    alpha_key = get_pattern_key(list(config.alpha_pattern), module)
    alpha = config.alpha_pattern.get(alpha_key, config.hut_alpha)
    if config.scale_by_rms:
        return scaling_by_rms(alpha, r, config.rms[module])
    return 1.0 if alpha is None else alpha / r
