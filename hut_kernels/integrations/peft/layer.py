"""`HUTLayer` and its one kind, `Linear`: a base layer with HUT adapters in PEFT's protocol."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ... import formats
from ...checks import check_number, check_rank
from ...errors import HUTBackendError
from ...functional import frozen_linear, hut_linear, hut_weight
from ...layer import FLOATS, acc_dtype, effective_bias
from ...nn import (
    TrainedFactors,
    check_data,
    dropout_forward,
    init_factors_,
    is_conv1d,
    scaling_by_rms,
)
from .base import bias, drops, is_watched, matrix
from .config import HUTConfig

_INIT_NOISE = 0.1


class Form(NamedTuple):
    """The options of one adapter that decide how its layer is computed."""

    transform: str
    offset: float
    precision: str
    fused: bool


class _Original:
    """A parameter that merging took out of a base layer, for as long as others own it too.

    A copy's is a copy, and what was pickled with its owners is theirs again.
    """

    def __init__(self, parameter: nn.Parameter | None) -> None:
        self.get: Any = (lambda: None) if parameter is None else weakref.ref(parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Original:
        return _Original(copy.deepcopy(self.get(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Original, (self.get(),)


class _Unmerged(NamedTuple):
    """A base layer's weight or bias before merging: its values in host memory, and itself."""

    value: Tensor
    original: _Original

    def parameter(self, like: Tensor) -> nn.Parameter:
        """The parameter itself if it still is where `like` is, or a new one of its values."""
        original = self.original.get()
        if original is None or (original.device, original.dtype) != (like.device, like.dtype):
            return nn.Parameter(self.value.to(like), requires_grad=False)
        return original


class HUTLayer(BaseTunerLayer):
    """A layer with HUT adapters; what it holds is by adapter name.

    The method is described in https://arxiv.org/abs/2409.13501; its residual form is HiRA
    (https://openreview.net/pdf?id=TwJrTz9cRS).

    Attributes:
        hut_A: `[r, in_features]` each.
        hut_B: `[out_features, r]` each.
        hut_gamma: `[out_features]`, for the adapters with `scale_shift`.
        hut_beta: `[out_features]`, for the same.
        r: ranks.
        hut_alpha: as configured; None means scaling 1.
        scaling: the factor of `hut_B @ hut_A`.
        hut_dropout: `nn.Dropout`, or `nn.Identity` where it is 0.
        hut_form: `Form` of each.
        hut_rms: root mean square of W0 as it was, of the adapters with `scale_by_rms`.

    Examples:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from hut_kernels.integrations.peft import HUTConfig
        >>> base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> model = get_peft_model(base, HUTConfig(r=4, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> tuple(layer.hut_A["default"].shape), layer.scaling
        ((4, 64), {'default': 1.0})
        >>> layer.set_scale("default", 0.5)
    """

    adapter_layer_names: tuple[str, ...] = ("hut_A", "hut_B", "hut_gamma", "hut_beta")
    other_param_names: tuple[str, ...] = (
        "r",
        "hut_alpha",
        "hut_rms",
        "scaling",
        "hut_dropout",
        "hut_form",
    )
    weight_name: str = "weight"
    bias_name: str = "bias"
    stack: tuple[int, ...] = ()  # the experts, where the weight is a stack of theirs
    cast_input_dtype_enabled: bool = True  # PEFT and diffusers set it; inputs are never cast here

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.hut_A = nn.ParameterDict()
        self.hut_B = nn.ParameterDict()
        self.hut_gamma = nn.ParameterDict()
        self.hut_beta = nn.ParameterDict()
        self.hut_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.hut_alpha: dict[str, float | None] = {}
        self.scaling: dict[str, float] = {}
        self.hut_form: dict[str, Form] = {}
        self.hut_rms: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, _Unmerged | None] = {}
        *_, self.out_features, self.in_features = formats.stored(self._base_matrix()).shape

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        alpha: float | None,
        config: HUTConfig,
        rms: float | None = None,
    ) -> None:
        """Add an adapter, or make one anew; `r` and `alpha` as the patterns of `config` say.

        Args:
            adapter_name: the adapter's name.
            r: its rank.
            alpha: its `hut_alpha`, or None.
            config: its other options.
            rms: the size of W0 that its scaling is divided by; None where it is not.

        Raises:
            ValueError: `r` is out of range for this layer.
        """
        check_rank(r, config.transform, self.in_features, self.out_features)
        self.r[adapter_name] = r
        self.hut_alpha[adapter_name] = alpha
        self.hut_rms.pop(adapter_name, None)
        if rms is not None:
            self.hut_rms[adapter_name] = rms
        self.scaling[adapter_name] = self._configured_scaling(adapter_name)
        self.hut_form[adapter_name] = Form(
            config.transform, float(config.offset), config.precision, config.fused
        )
        p = config.hut_dropout
        self.hut_dropout[adapter_name] = nn.Dropout(p) if p > 0 else nn.Identity()
        self.hut_A[adapter_name] = nn.Parameter(torch.empty(*self.stack, r, self.in_features))
        self.hut_B[adapter_name] = nn.Parameter(torch.empty(*self.stack, self.out_features, r))
        for vectors in (self.hut_gamma, self.hut_beta):
            if adapter_name in vectors:
                del vectors[adapter_name]
            if config.scale_shift:
                vectors[adapter_name] = nn.Parameter(torch.empty(*self.stack, self.out_features))
        self.reset_hut_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_hut_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Make the adapter the identity; with `init_weights=False`, the identity and noise.

        Args:
            adapter_name: the adapter's name.
            init_weights: as in `HUTConfig`.
        """
        A, B = self.hut_A[adapter_name], self.hut_B[adapter_name]
        form = self.hut_form[adapter_name]
        self._init_factors(A, B, form)
        factors = [A, B]
        if adapter_name in self.hut_gamma:
            factors += [
                self.hut_gamma[adapter_name].fill_(1.0),
                self.hut_beta[adapter_name].zero_(),
            ]
        if not init_weights:
            for factor in factors:
                factor.add_(torch.randn_like(factor), alpha=_INIT_NOISE)

    def _init_factors(self, hut_A: Tensor, hut_B: Tensor, form: Form) -> None:
        init_factors_(hut_A, hut_B, form.transform, form.offset)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the adapter's update `scale` times what it was trained for, as LoRA layers do.

        Args:
            adapter: the adapter's name; ignored where the layer does not have it.
            scale: the factor; 1 is the adapter as configured.

        Raises:
            ValueError: an adapter without an exact scale (`two_sided`, offset 0, `scale_shift`) and
                a scale other than 1.
            TypeError: `scale` is not a real number.
        """
        if adapter in self.hut_A and self._can_scale(adapter, scale):
            self.scaling[adapter] = scale * self._configured_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of all active adapters by `scale`; raises as `set_scale` does."""
        names = [name for name in self._active_here() if self._can_scale(name, scale)]
        for name in names:
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of all active adapters by `scale`; None makes them as configured."""
        if scale is not None:
            self.scale_layer(1 / scale)
            return
        for name in self._active_here():
            self.scaling[name] = self._configured_scaling(name)

    def _configured_scaling(self, name: str) -> float:
        alpha, r = self.hut_alpha[name], self.r[name]
        if name in self.hut_rms:
            return scaling_by_rms(alpha, r, self.hut_rms[name])
        return 1.0 if alpha is None else alpha / r

    def hut_factors(self) -> list[TrainedFactors]:
        """List the layer's adapters, for `parameter_groups`."""
        weight = self.base_weight()
        return [
            TrainedFactors(
                weight,
                A,
                self.hut_B[name],
                _entry(self.hut_gamma, name),
                _entry(self.hut_beta, name),
                self.hut_form[name].transform,
                self.hut_form[name].offset,
                name in self.hut_rms,
            )
            for name, A in self.hut_A.items()
        ]

    def _can_scale(self, name: str, scale: float) -> bool:
        """Tell an update that is proportional to a scale; one that is not has 1 and no other."""
        scale = check_number("scale", scale)
        form = self.hut_form[name]
        if form.transform == "low_rank" and form.offset == 1 and name not in self.hut_gamma:
            return True
        if scale != 1:
            raise ValueError(
                f"adapter {name!r} has no scale: only the update of low_rank with offset 1 and "
                f"without scale_shift is proportional to one; got scale={scale}"
            )
        return False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the base layer's weight (and bias, with `scale_shift`).

        The weight is formed from W0 and all merged adapters at once and rounded once. W0 is kept,
        in host memory, so that unmerging is exact. The base layer gets a parameter of its own:
        another module that shares its weight keeps W0.

        Args:
            safe_merge: whether to look for NaN and Inf in the result first.
            adapter_names: the adapters to merge; None means the active ones.

        Raises:
            ValueError: `safe_merge`, and the result is not finite. The layer is unchanged.
            HUTBackendError: a parameter is offloaded, or made by a hook or a parametrization of the
                base layer (pruning). The layer is unchanged.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.hut_A]
        if not names:
            return
        base = self.get_base_layer()
        check_data(base, self.weight_name, self.bias_name)
        for name in names:
            for factors in (self.hut_A, self.hut_B, self.hut_gamma, self.hut_beta):
                check_data(factors, name)
        W0, b0 = self._before_merging()
        weight, shift = self._merged([*self.merged_adapters, *names], W0, b0)
        results = [weight] if shift is None else [weight, shift]
        if safe_merge and not all(torch.isfinite(result).all() for result in results):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {','.join(names)} seems to be "
                f"broken"
            )
        if b0 is None and shift is not None:
            warnings.warn(
                f"A base layer of {self.out_features} outputs has no bias, and gets one by merging "
                f"{','.join(names)} (hut_beta): a checkpoint of the merged model needs a model "
                f"with that bias.",
                stacklevel=2,
            )
        merged = {self.weight_name: weight}
        if shift is not None and any(name in self.hut_gamma for name in names):
            merged[self.bias_name] = shift
        for name, value in merged.items():
            if name not in self._unmerged:
                self._unmerged[name] = _unmerged(getattr(base, name))
            setattr(base, name, nn.Parameter(value, requires_grad=False))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit; where another module shared it, the very parameter."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        check_data(base, self.weight_name, self.bias_name)
        like = getattr(base, self.weight_name)
        for name, kept in self._unmerged.items():
            setattr(base, name, None if kept is None else kept.parameter(like))
        self._unmerged = {}
        self.merged_adapters.clear()

    def base_weight(self) -> Tensor:
        """Return W0, also while adapters are merged, in the base layer's layout."""
        if self.merged or self.stack:
            return self._before_merging()[0]
        return formats.base_weight(self.get_base_layer())

    def _before_merging(self) -> tuple[Tensor, Tensor | None]:
        """The base layer's weight and bias without adapters, on its device."""
        base = self.get_base_layer()
        weight = getattr(base, self.weight_name)
        values = {self.weight_name: weight, self.bias_name: getattr(base, self.bias_name, None)}
        for name, kept in self._unmerged.items():
            values[name] = None if kept is None else kept.value.to(weight.device)
        return values[self.weight_name], values[self.bias_name]

    @torch.no_grad()
    def _merged(
        self, names: list[str], weight: Tensor, b0: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with `names` in them, in the base layer's layout and type."""
        dtype = weight.dtype
        W0 = self._as_matrix(weight)
        acc = acc_dtype(dtype) if len(names) > 1 else dtype
        weight = combined(W0, [self._adapter_weight(name, W0, acc) for name in names])
        shift = combined(b0, [self._adapter_bias(name, b0, acc) for name in names])
        weight = self._as_matrix(weight.to(dtype)).contiguous()
        return weight, None if shift is None else shift.to(dtype)

    def _base_matrix(self) -> Tensor:
        """W0 as `[out_features, in_features]`."""
        return matrix(self.get_base_layer())

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """Between the base layer's layout and `[out_features, in_features]`."""
        return weight.t() if is_conv1d(self.get_base_layer()) else weight

    def _active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.hut_A]

    def _adapter_weight(self, name: str, W0: Tensor, dtype: torch.dtype) -> Tensor:
        form = self.hut_form[name]
        return hut_weight(
            W0,
            self.hut_A[name],
            self.hut_B[name],
            transform=form.transform,
            offset=form.offset,
            scaling=self.scaling[name],
            gamma=_entry(self.hut_gamma, name),
            dtype=dtype,
        )

    def _adapter_bias(self, name: str, b0: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        gamma, beta = _entry(self.hut_gamma, name), _entry(self.hut_beta, name)
        return effective_bias(b0, gamma, beta, dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Compute what merging the adapter adds to the weight.

        HiRA's method of this name returns `T - 1`; this is `W - W0`, as LoRA's.

        Args:
            adapter_name: the adapter's name.

        Returns:
            The delta in the weight's layout, detached and in float32 (float64 of a float64 base).

        Raises:
            HUTBackendError: the base weight is offloaded, or made by a hook.
        """
        check_data(self.get_base_layer(), self.weight_name)
        weight = self._before_merging()[0].detach()
        W0 = self._as_matrix(weight)
        delta = self._adapter_weight(adapter_name, W0, acc_dtype(weight.dtype)) - W0
        return self._as_matrix(delta)


class Linear(nn.Module, HUTLayer):
    """HUT adapters over an `nn.Linear` or a Conv1D.

    One active adapter without dropout is one fused product; k of them are k + 1, and dropout while
    training adds one for each. Adapters add what each does on its own, so that their effective
    multiplier is `1 + sum(T_i - 1)` (`gamma_i T_i` in the place of `T_i` with `scale_shift`).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        alpha: float | None,
        config: HUTConfig,
        rms: float | None = None,
    ) -> None:
        super().__init__()
        HUTLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config, rms)

    @property
    def fan_in_fan_out(self) -> bool:
        """True where the base layer's weight is `[in_features, out_features]`, as a Conv1D's is."""
        return is_conv1d(self.base_layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the base layer under its active adapters, `[..., out_features]`."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = self._active_here()
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1 and not args and not kwargs and not is_watched(self.base_layer):
            return self._adapted(x, active[0])
        y = base = self.base_layer(x, *args, **kwargs)
        if is_watched(self.base_layer):  # hooks may have made it another
            _check_left(self.base_layer)
            base = self._base_product(x, y.dtype)
        acc = acc_dtype(y.dtype)
        total = y.to(acc)
        for name in active:
            total = total + (self._adapted(x, name) - base.to(acc))
        return total.to(y.dtype)

    def _adapted(self, x: Tensor, name: str) -> Tensor:
        """Compute the layer under one adapter only, its dropout included."""
        dropout = self.hut_dropout[name]
        if not drops(dropout):
            return self._product(x, name)
        return dropout_forward(
            x,
            dropout(x),
            lambda d: self._product(d, name),
            matrix(self.base_layer),
            _entry(self.hut_gamma, name),
        )

    def _product(self, x: Tensor, name: str) -> Tensor:
        form = self.hut_form[name]
        return hut_linear(
            x,
            matrix(self.base_layer),
            self.hut_A[name],
            self.hut_B[name],
            bias(self.base_layer),
            transform=form.transform,
            offset=form.offset,
            scaling=self.scaling[name],
            gamma=_entry(self.hut_gamma, name),
            beta=_entry(self.hut_beta, name),
            precision=form.precision,
            fused=form.fused,
        )

    def _base_product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return frozen_linear(x.to(dtype), matrix(self.base_layer), bias(self.base_layer))

    def __repr__(self) -> str:
        return "hut." + super().__repr__()


def _check_left(base: Any) -> None:
    """Refuse a weight that hooks took away again after the base layer's own call."""
    if base.weight.is_meta:
        check_data(base, "weight")
    if base.weight.is_floating_point() and base.weight.dtype not in FLOATS:
        raise HUTBackendError(
            f"the base layer's weight is kept in {base.weight.dtype} between its calls (layerwise "
            f"casting), where HUT cannot read it: leave adapted layers out of the casting"
        )


def _entry(entries: nn.ParameterDict, name: str) -> Tensor | None:
    return entries.get(name)


def combined(origin: Any, parts: list[Any]) -> Any:
    """`origin + sum(part - origin)`; one part is itself, to the bit; None stands for zero."""
    parts = [part for part in parts if part is not None]
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = total + (part if origin is None else part - origin)
    return total


def _unmerged(parameter: Any) -> _Unmerged | None:
    if parameter is None:
        return None
    return _Unmerged(parameter.detach().cpu(), _Original(parameter))
