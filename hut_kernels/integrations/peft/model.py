"""`HUTModel`: the tuner, which puts HUT layers into a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS,
)
from peft.utils.other import get_pattern_key
from torch import nn

from ...errors import HUTBackendError
from ...nn import is_conv1d
from .base import check_base
from .config import HUTConfig
from .layer import HUTLayer, Linear


class HUTModel(BaseTuner):
    """The HUT tuner, made by `get_peft_model(model, HUTConfig(...))`.

    Args:
        model: the model to adapt.
        config: the `HUTConfig`.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: whether to make the factors on the meta device, to be loaded.
    """

    prefix: str = "hut_"
    tuner_layer_cls = HUTLayer
    target_module_mapping: ClassVar[dict[str, Any]] = dict(LORA_TARGETS)

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
        _check_target(current_key, target, parent)
        _check_layout(config, current_key, target)
        try:
            if isinstance(target, HUTLayer):
                target.update_layer(adapter_name, r, alpha, config)
                return
            layer = Linear(target, adapter_name, r, alpha, config)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Nothing is taken from the child: it need not have a weight, and factors are made where its
        # weight is.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Where LoRA takes an adapter for each row of a batch; here they are refused, not ignored.

        Raises:
            ValueError: `adapter_names` is given.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "HUT has no different adapters in one batch: call the model without adapter_names, "
                "once for the rows of each adapter, after set_adapter"
            )
        yield

    def _check_merge_allowed(self) -> None:
        """Allow tied weights, of which PEFT warns: a merged layer gets a weight of its own."""


def _check_target(name: str, target: nn.Module, parent: nn.Module) -> None:
    """Refuses a module that HUT cannot adapt, by name and with the reason."""
    if isinstance(target, HUTLayer):
        return
    kind = type(target).__name__
    if isinstance(target, BaseTunerLayer):
        raise ValueError(
            f"Target module {name} is not supported: it carries an adapter of another method "
            f"({type(target).__module__}.{kind}); merge or unload that first"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"Target module {name} is not supported: nn.MultiheadAttention reads its weight "
            f"without calling it, so an adapter would have no effect; "
            f"exclude_modules=[{name.rpartition('.')[2]!r}] leaves it out"
        )
    try:
        check_base(target)
    except (TypeError, HUTBackendError) as error:
        raise ValueError(
            f"Target module {name} ({kind}) is not supported: {error}. Currently, only the "
            f"following modules are supported: `torch.nn.Linear`, "
            f"`transformers.pytorch_utils.Conv1D`."
        ) from error


def _check_layout(config: HUTConfig, name: str, target: nn.Module) -> None:
    base: Any = target.base_layer if isinstance(target, HUTLayer) else target
    conv1d = is_conv1d(base)
    if config.fan_in_fan_out is not None and config.fan_in_fan_out != conv1d:
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module {name} is "
            f"`{type(base).__name__}`. Setting fan_in_fan_out to {conv1d}.",
            stacklevel=2,
        )
