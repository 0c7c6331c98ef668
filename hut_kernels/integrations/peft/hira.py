"""`accelerate_hira`: the HiRA layers of a PEFT model through the fused layer, and back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from peft.tuners import hira
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ... import formats
from ...checks import check_choice
from ...errors import HUTBackendError
from ...functional import frozen_linear, hut_linear
from ...layer import FLOATS, PRECISIONS
from ...nn import is_replaced
from .base import bias, check_base, drops, is_watched, matrix


class _Fused(nn.Module):
    hut_precision: str
    base_layer: Any
    hira_A: Any
    hira_B: Any
    hira_dropout: Any
    disable_adapters: Any
    merged: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x (W0 * (1 + hira_B hira_A))^T + bias`, in x's type (autocast's under autocast)."""
        if args or kwargs or _unfused(self) is not None or _foreign_input(self, x):
            return super().forward(x, *args, **kwargs)
        if not _is_quantized(self):
            return self._fused(x)
        dtype = formats.compute_dtype(self.base_layer)
        inputs = x if dtype is None else x.to(dtype)
        plain = len(_active(self)) == 1 and _off_path(self) is None
        y = self._fused(inputs) if plain else self._sum(inputs)
        return y if dtype is None else y.to(x.dtype)

    def _fused(self, x: Tensor) -> Tensor:
        (adapter,) = _active(self)
        base = self.base_layer
        return hut_linear(
            x,
            matrix(base),
            self.hira_A[adapter],
            self.hira_B[adapter],
            bias(base),
            precision=self.hut_precision,
        )

    def _sum(self, x: Tensor) -> Tensor:
        """A quantized base, and what adapters add: `dropout(x) (W0 * (hira_B hira_A))^T` each."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = matrix(self.base_layer)
        y = frozen_linear(x, weight, bias(self.base_layer))
        off = self.disable_adapters or self.merged
        for adapter in () if off else _active(self):
            A, B = self.hira_A[adapter], self.hira_B[adapter]
            y = y + hut_linear(self.hira_dropout[adapter](x), weight, A, B, offset=0.0)
        return y


class FusedHiraLinear(_Fused, hira.Linear):
    """PEFT's HiRA layer, whose forward is one fused product wherever that computes the same.

    Elsewhere (see `_unfused`) PEFT's own forward runs. Parameters, state dict, merging and all else
    are PEFT's: an instance is made by `accelerate_hira` from an existing layer.
    """


@functools.cache
def _fused_class(kind: Any) -> type[nn.Module]:
    """The fused form of PEFT's layer: of `hira.Linear`, or of one of its two for bitsandbytes."""
    if kind is hira.Linear:
        return FusedHiraLinear
    return type(f"Fused{kind.__name__}", (_Fused, kind), {"__doc__": FusedHiraLinear.__doc__})


@dataclasses.dataclass(frozen=True)
class HiraReport:
    """The layers that `accelerate_hira` fused and those that it left, by name.

    The method is described in https://arxiv.org/abs/2409.13501; its residual form is HiRA
    (https://openreview.net/pdf?id=TwJrTz9cRS).

    Attributes:
        fused: layers whose active adapter now runs through the fused layer.
        conditional: patched layers that are on PEFT's path in their present state, or in training,
            and why; they follow their state from call to call.
        kept: layers left to PEFT, and why.
        rounded: patched layers over 16-bit weights under `precision="merged"`, whose forward loses
            updates below about 2^-9 of a weight.
        mended: patched layers over quantized weights that PEFT's own forward computes wrongly, and
            why.

    Examples:
        >>> from peft import HiraConfig, get_peft_model
        >>> from torch import nn
        >>> from hut_kernels.integrations.peft import accelerate_hira
        >>> base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> report = accelerate_hira(get_peft_model(base, HiraConfig(r=4, target_modules=["0"])))
        >>> report.fused
        ('base_model.model.0',)
        >>> print(report)
        1 HiRA layers fused
    """

    fused: tuple[str, ...]
    conditional: dict[str, str]
    kept: dict[str, str]
    rounded: tuple[str, ...] = ()
    mended: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} HiRA layers fused"]
        if self.rounded:
            lines.append(
                f"{len(self.rounded)} of 16-bit weights, rounded with their update: "
                f'precision="split" keeps updates below about 2^-9 of a weight, as PEFT does'
            )
        groups = {
            "fused at times": self.conditional,
            "left to PEFT": self.kept,
            "computed rightly now": self.mended,
        }
        for title, layers in groups.items():
            by_reason: dict[str, list[str]] = {}
            for name, reason in layers.items():
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"{len(names)} {title}: {reason} ({', '.join(names[:3])}{more})")
        return "\n".join(lines)


def accelerate_hira(model: nn.Module, *, precision: str = "merged") -> HiraReport:
    """Run the HiRA layers of a PEFT model through the fused layer, in place.

    One active adapter without dropout becomes one product, `hut_linear` with scaling 1: nothing of
    the weight's size is kept for backward. Several active adapters, dropout while training,
    embeddings, convolutions, and base layers that carry hooks keep PEFT's path. A quantized base is
    read as it is stored, in every state of its layer, and PEFT's wrong cases with it are mended.
    Configurations, parameters and checkpoints stay as they are. Call it again after an adapter has
    been added to further layers.

    Args:
        model: a model with HiRA layers, from `get_peft_model` or with adapters injected.
        precision: `"merged"`, one product, which over a 16-bit base loses updates too small for its
            type (docs/definition.md, "The dead zone of `merged`"); `"split"` keeps them, as PEFT's
            path does, for a second product.

    Returns:
        Which layers are fused, which only at times, which not, and why.

    Raises:
        ValueError: the model has no HiRA layer, or an unknown `precision`.
    """
    check_choice("precision", precision, PRECISIONS)
    fused, conditional, kept, rounded, mended = [], {}, {}, [], {}
    for name, layer in _hira_layers(model).items():
        reason = _unfusible(layer)
        if reason is not None:
            kept[name] = reason
            continue
        if not isinstance(layer, _Fused):
            if _is_quantized(layer) and (wrong := _wrong_in_peft(layer)) is not None:
                mended[name] = wrong
            kind: Any = type(layer)
            layer.__class__ = _fused_class(kind)
        layer.hut_precision = precision
        state = _unfused(layer) or _dropped_in_training(layer)
        if state is None:
            fused.append(name)
        else:
            conditional[name] = state
        base = layer.base_layer
        dtype = formats.dense_dtype(base) if _is_quantized(layer) else base.weight.dtype
        if precision == "merged" and dtype.itemsize == 2:
            rounded.append(name)
    return HiraReport(tuple(fused), conditional, kept, tuple(rounded), mended)


def restore_hira(model: nn.Module) -> list[str]:
    """Undo `accelerate_hira`: every HiRA layer of `model` runs PEFT's own forward again.

    Returns:
        The names of the layers that were restored; none where none was accelerated.
    """
    restored = []
    for name, layer in model.named_modules():
        if isinstance(layer, _Fused):
            layer.__class__ = type(layer).__bases__[-1]
            del layer.hut_precision
            restored.append(name)
    return restored


def _hira_layers(model: nn.Module) -> dict[str, Any]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, hira.HiraLayer)}
    if not layers:
        raise ValueError(
            "the model has no HiRA layer: make it with get_peft_model(model, HiraConfig(...)) first"
        )
    return layers


def _unfusible(layer: Any) -> str | None:
    """Give the reason why a HiRA layer is left to PEFT for good, or None."""
    kind = type(layer)
    own = kind.__module__ == "peft.tuners.hira.bnb"  # which importing would import bitsandbytes
    if kind is not hira.Linear and not own and not issubclass(kind, _Fused):
        return f"{kind.__name__}: not a linear layer"
    if is_replaced(layer):
        return "its forward is replaced"
    base = layer.base_layer
    if isinstance(base, BaseTunerLayer):
        return f"adapter over another adapter ({type(base).__name__})"
    try:
        check_base(base)
    except (TypeError, HUTBackendError) as error:
        return str(error)
    return None


def _unfused(layer: Any) -> str | None:
    """Give the reason why an accelerated layer now runs PEFT's own forward, or None."""
    base = layer.base_layer
    if is_watched(base):
        return "its base layer carries hooks"
    if _is_quantized(layer):
        return None
    if (reason := _off_path(layer)) is not None:
        return reason
    adapter, weight = _active(layer)[0], base.weight
    if weight.requires_grad:
        return "its base weight is trained"
    if weight.dtype not in FLOATS or layer.hira_A[adapter].device != weight.device:
        return f"{weight.dtype} on {weight.device}, adapter on {layer.hira_A[adapter].device}"
    return None


def _off_path(layer: Any) -> str | None:
    """Give the reason why a layer in its present state is not one product, or None."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged"
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} active adapters" if active else "no active adapter"
    if drops(layer.hira_dropout[active[0]]):
        return _dropped_in_training(layer)
    return None


def _is_quantized(layer: Any) -> bool:
    return formats.is_quantized(formats.base_weight(layer.base_layer))


def _wrong_in_peft(layer: Any) -> str | None:
    """Give the reason why PEFT computes a layer over a quantized base wrongly, or None."""
    if type(layer) is hira.Linear:
        return "PEFT multiplies the stored codes, for the model does not say that it is quantized"
    stored = formats.stored(matrix(layer.base_layer))
    if isinstance(stored, formats.RepackedFourBit):
        return "an evaluation has repacked its base, which PEFT reads as it was before"
    if isinstance(stored, formats.FourBit) and stored.device.type == "cpu":
        K = stored.shape[1]
        if K % 16 == 0 and K % stored.block:
            return "bitsandbytes dequantizes it wrongly: its rows are no multiple of a block"
    return None


def _dropped_in_training(layer: Any) -> str | None:
    for adapter in _active(layer):
        dropout = layer.hira_dropout[adapter]
        if isinstance(dropout, nn.Dropout) and dropout.p > 0:
            return f"dropout {dropout.p:g} while training"
    return None


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.hira_A]


def _foreign_input(layer: Any, x: Tensor) -> bool:
    """Tell an input on which PEFT's path raises its own error, or computes in another type."""
    weight = layer.base_layer.weight
    if _is_quantized(layer):
        return x.device != weight.device
    autocast = torch.is_autocast_enabled(x.device.type)
    return x.device != weight.device or (x.dtype != weight.dtype and not autocast)
