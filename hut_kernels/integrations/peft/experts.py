"""HUT adapters over stacks of experts' weights, in the protocol of PEFT's `target_parameters`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...experts import Factors, init_stack_, merged_stack
from ..experts import attach, check_mergeable, choose, detach
from .config import HUTConfig
from .layer import Form, HUTLayer


class ParamWrapper(nn.Module, HUTLayer):
    """HUT adapters over one stack of experts, `[experts, out, in]` or `[experts, in, out]`.

    PEFT wraps one parameter of a module at a time, each around the last, and tells such a wrapper
    by the name of its class. It only hands its arguments on: the experts' module finds the factors.

    Args:
        base_layer: the experts' module, or the wrapper of another of its parameters.
        adapter_name: the adapter's name.
        parameter_name: the parameter.
        r: as the patterns of `config` say.
        alpha: likewise.
        config: the adapter's options.
        rms: of the whole stack, with `scale_by_rms`.

    Raises:
        ValueError: a rank out of range, or an option that experts do not have.
    """

    get_base_layer: Callable[[], Any]
    active_adapters: list[str]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        r: int,
        alpha: float | None,
        config: HUTConfig,
        rms: float | None = None,
    ) -> None:
        super().__init__()
        self.parameter_name = self.weight_name = parameter_name
        self.bias_name = f"{parameter_name}_bias"
        self.base_layer = base_layer
        self.stack = (len(self._base_matrix()),)
        HUTLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config, rms)
        attach(self.get_base_layer(), parameter_name, self)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        alpha: float | None,
        config: HUTConfig,
        rms: float | None = None,
    ) -> None:
        """Adds an adapter, as every HUT layer does.

        Raises:
            ValueError: a rank out of range, dropout, or `precision="split"`.
        """
        if config.hut_dropout:
            raise ValueError(f"experts have no hut_dropout; got {config.hut_dropout}")
        if config.precision != "merged":
            raise ValueError(f'experts have precision="merged" only; got {config.precision!r}')
        super().update_layer(adapter_name, r, alpha, config, rms)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The experts under the adapters that are active."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        choose(self.get_base_layer())
        return self.base_layer(*args, **kwargs)

    def active_factors(self) -> list[Factors]:
        """The factors that the module multiplies with; none where adapters are off or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [self._factors(name) for name in self._active_here()]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the stack (and its biases), as every HUT layer does.

        Raises:
            ValueError: also for a shift that the experts have no bias to hold.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        factors = [self._factors(name) for name in names if name in self.hut_A]
        check_mergeable(self.get_base_layer(), self.parameter_name, *factors)
        super().merge(safe_merge, adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts' module itself, with this wrapper's and all inner ones' adapters merged."""
        base: Any = self.get_base_layer()
        wrapper: nn.Module = self
        while isinstance(wrapper, ParamWrapper):
            if merge:
                wrapper.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            detach(base, wrapper.parameter_name)
            wrapper = wrapper.base_layer
        return base

    def _factors(self, name: str) -> Factors:
        form = self.hut_form[name]
        options = {"transform": form.transform, "offset": form.offset, "fused": form.fused}
        vectors = self.hut_gamma.get(name), self.hut_beta.get(name)
        scaling = {"scaling": self.scaling[name]}
        return Factors(self.hut_A[name], self.hut_B[name], *vectors, options | scaling)

    def _base_matrix(self) -> Tensor:
        return self._as_matrix(getattr(self.get_base_layer(), self.parameter_name))

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """Between the stack's layout and `[experts, out_features, in_features]`."""
        return weight.mT if self.get_base_layer().is_transposed else weight

    def _init_factors(self, hut_A: Tensor, hut_B: Tensor, form: Form) -> None:
        init_stack_(hut_A, hut_B, form.transform, form.offset)

    def _adapter_weight(self, name: str, W0: Tensor, dtype: torch.dtype) -> Tensor:
        return merged_stack(W0, self._factors(name), False, dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        weight = self._base_matrix()
        for name in self.adapter_layer_names:
            factors = getattr(self, name)
            if adapter_name in factors and not factors[adapter_name].is_meta:
                factor = factors[adapter_name].to(device or weight.device, weight.dtype)
                factors[adapter_name] = factor

    def __repr__(self) -> str:
        return f"hut.{nn.Module.__repr__(self)}"

    def extra_repr(self) -> str:
        """The parameter, for `repr`."""
        return f"parameter_name={self.parameter_name!r}"
