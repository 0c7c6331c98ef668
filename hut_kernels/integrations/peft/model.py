"""`HUTModel`: the tuner, which puts HUT layers into a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import (
    SEQ_CLS_HEAD_NAMES,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS,
)
from peft.utils.other import get_pattern_key
from torch import nn

from ... import formats
from ...adapters import near_matches
from ...bypassed import (
    is_untrained,
    reason_not_called,
    switch_off_fused_inference,
    untrained_message,
)
from ...errors import HUTBackendError
from ...nn import is_conv1d, rms
from .base import check_base
from .config import HUTConfig
from .layer import HUTLayer, Linear
from .quantized import QuantizedLinear

# What PEFT itself puts into modules_to_save, whichever of them a model has.
_HEADS = {*SEQ_CLS_HEAD_NAMES, "qa_outputs"}


class HUTModel(BaseTuner):
    """The HUT tuner, made by `get_peft_model(model, HUTConfig(...))`.

    The method is described in https://arxiv.org/abs/2409.13501; its residual form is HiRA
    (https://openreview.net/pdf?id=TwJrTz9cRS).

    Args:
        model: the model to adapt.
        config: the `HUTConfig`.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: whether to make the factors on the meta device, to be loaded.

    Raises:
        ValueError: a target that HUT cannot adapt; names it, with the reason.

    Examples:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from hut_kernels.integrations.peft import HUTConfig
        >>> base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> model = get_peft_model(base, HUTConfig(r=4, target_modules=["0"]))
        >>> type(model.base_model).__name__
        'HUTModel'
        >>> type(model.merge_and_unload()[0]).__name__
        'Linear'
    """

    prefix: str = "hut_"
    tuner_layer_cls = HUTLayer
    target_module_mapping: ClassVar[dict[str, Any]] = dict(LORA_TARGETS)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter into the model, as PEFT does, and warn of what it was told in vain."""
        asked = copy.copy(self.peft_config[adapter_name])
        if asked.scale_by_rms:
            # What is filled in must not follow the user's object to another model.
            self.peft_config[adapter_name] = copy.deepcopy(asked)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        switch_off_fused_inference(model, HUTLayer)
        _warn_of_unmatched(asked, model, adapter_name)

    def _create_and_replace(
        self,
        peft_config: HUTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, current_key), config.r)
        alpha_key = get_pattern_key(config.alpha_pattern, current_key)
        alpha = config.alpha_pattern.get(alpha_key, config.hut_alpha)
        present = isinstance(target, HUTLayer)
        if parameter_name is None:
            _check_target(current_key, target, parent)
            _check_layout(config, current_key, target)
        else:  # of several wrappers around a module each has a parameter of its own
            present = getattr(target, "parameter_name", None) == parameter_name
        try:
            size = _rms(config, current_key, target, parameter_name)
            if present:
                cast(HUTLayer, target).update_layer(adapter_name, r, alpha, config, size)
                return
            layer = _new_layer(target, adapter_name, parameter_name, r, alpha, config, size)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _prepare_adapter_config(self, peft_config: HUTConfig, model_config: dict) -> Any:
        """LoRA's defaults for `target_modules`, which parameters alone can do without."""
        known = model_config.get("model_type") in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: HUTConfig, model: nn.Module) -> None:
        """Refuse parameters that cannot be adapted before anything is changed."""
        layers = (module for module in model.modules() if isinstance(module, HUTLayer))
        if peft_config.target_parameters and not any(layer.stack for layer in layers):
            from ..experts import find_stacks

            find_stacks(model, peft_config.target_parameters)

    def _check_new_adapter_config(self, config: HUTConfig) -> None:
        """Refuse adapters that target other parameters: their keys hold no names, only an order."""
        super()._check_new_adapter_config(config)
        wanted = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            present = set(other.target_parameters or ())
            if other is not config and wanted and present and wanted != present:
                raise ValueError(
                    f"all adapters with target_parameters must target the same set of parameters: "
                    f"adapter {name!r} has {sorted(present)}; got {sorted(wanted)}"
                )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Nothing is taken from the child: it need not have a weight, and factors are made where its
        # weight is.
        setattr(parent, child_name, new_module)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what LoRA has: weighted multipliers have no common one of the same rank.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "HUT has no add_weighted_adapter: activate the adapters together by set_adapter, each "
            "with a weight by its layers' set_scale"
        )

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: HUTConfig, adapter_name: str, state_dict: Any, **kwargs: Any
    ) -> Any:
        """Collect the adapter's tensors for PEFT; a warning names layers that did not train."""
        factors = {
            name: state_dict[f"{name}.hut_B.{adapter_name}"]
            for name, module in model.named_modules()
            if isinstance(module, HUTLayer)
            and adapter_name in module.hut_B
            and module.hut_B[adapter_name].requires_grad
            and f"{name}.hut_B.{adapter_name}" in state_dict
        }
        form = config.transform, config.offset
        untrained = [name for name, hut_B in factors.items() if is_untrained(hut_B, *form)]
        message = untrained_message(untrained, len(factors))
        if message:
            warnings.warn(message, stacklevel=2)
        return super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            **kwargs,
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an adapter for each row of a batch, which LoRA takes, rather than ignore it.

        Raises:
            ValueError: `adapter_names` is given.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "HUT has no different adapters in one batch: call the model without adapter_names, "
                "once for the rows of each adapter, after set_adapter"
            )
        yield

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own; tells what dense layers in the place of quantized ones take."""
        layers = [m for m in self.model.modules() if isinstance(m, QuantizedLinear)]
        default = formats.float_dtype(self.model)
        sizes = []
        for layer in layers:
            layer.dense_default = default
            sizes.append(layer.sizes())
        unloaded = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge and layers:
            formats.warn_of_size(len(layers), *map(sum, zip(*sizes, strict=True)))
            formats.forget_quantization(unloaded)
        return unloaded

    def _check_merge_allowed(self) -> None:
        """Allow tied weights, of which PEFT warns: a merged layer gets a weight of its own."""


def _new_layer(
    target: nn.Module,
    adapter_name: str,
    parameter_name: str | None,
    r: int,
    alpha: float | None,
    config: HUTConfig,
    size: float | None,
) -> nn.Module:
    if parameter_name is None:
        if formats.is_quantized(formats.base_weight(target)):
            return QuantizedLinear(target, adapter_name, r, alpha, config, size)
        return Linear(target, adapter_name, r, alpha, config, size)
    from .experts import ParamWrapper  # for which transformers must know of experts

    return ParamWrapper(target, adapter_name, parameter_name, r, alpha, config, size)


def _rms(
    config: HUTConfig, name: str, target: nn.Module, parameter_name: str | None
) -> float | None:
    """Get what a layer's scaling is divided by: as it was noted, or measured now and noted."""
    if not config.scale_by_rms:
        return None
    key = name if parameter_name is None else f"{name}.{parameter_name}"
    if key not in config.rms:
        layer: Any = target
        if isinstance(target, HUTLayer) and target.weight_name == (parameter_name or "weight"):
            weight = layer.base_weight()
        else:  # an inner wrapper's module has other parameters, too
            base = layer.get_base_layer() if isinstance(target, HUTLayer) else layer
            weight = getattr(base, parameter_name) if parameter_name else formats.base_weight(base)
        config.rms[key] = rms(weight)
    return config.rms[key]


def _check_target(name: str, target: nn.Module, parent: nn.Module) -> None:
    """Refuse a module that HUT cannot adapt, by name and with the reason."""
    if isinstance(target, HUTLayer):
        return
    kind = type(target).__name__
    if isinstance(target, BaseTunerLayer):
        raise ValueError(
            f"Target module {name} is not supported: it carries an adapter of another method "
            f"({type(target).__module__}.{kind}); merge or unload that first"
        )
    reason = reason_not_called(name, parent)
    if reason:
        raise ValueError(f"Target module {name} is not supported: {reason} (by exclude_modules)")
    try:
        check_base(target)
    except (TypeError, HUTBackendError) as error:
        raise ValueError(
            f"Target module {name} ({kind}) is not supported: {error}. Currently, only the "
            f"following modules are supported: `torch.nn.Linear`, "
            f"`transformers.pytorch_utils.Conv1D`."
        ) from error


def _warn_of_unmatched(config: HUTConfig, model: nn.Module, adapter_name: str) -> None:
    """Warn of listed names and indices of a configuration that nothing in the model has."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, HUTLayer)}
    adapted = [name for name, layer in layers.items() if adapter_name in layer.hut_A]
    inside = tuple(f"{name}." for name in layers)
    present = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        listed = getattr(config, option)
        if listed is None or isinstance(listed, str):
            continue
        missing = sorted(
            target
            for target in set(listed) - _HEADS
            if not any(f".{name}".endswith(f".{target}") for name in present)
        )
        if missing:
            warnings.warn(
                f"{option}: nothing matches {missing}{near_matches(missing, present)}", stacklevel=3
            )
    indices = config.layers_to_transform
    indices = [indices] if isinstance(indices, int) else indices or []
    unused = [index for index in indices if not any(f".{index}." in f".{n}." for n in adapted)]
    if unused:
        warnings.warn(f"layers_to_transform: no adapted layer has index {unused}", stacklevel=3)


def _check_layout(config: HUTConfig, name: str, target: nn.Module) -> None:
    base: Any = target.base_layer if isinstance(target, HUTLayer) else target
    conv1d = is_conv1d(base)
    if config.fan_in_fan_out is not None and config.fan_in_fan_out != conv1d:
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module {name} is "
            f"`{type(base).__name__}`. Setting fan_in_fan_out to {conv1d}.",
            stacklevel=2,
        )
