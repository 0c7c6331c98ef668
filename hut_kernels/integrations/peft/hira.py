"""`accelerate_hira`: the HiRA layers of a PEFT model through the fused layer, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft.tuners import hira
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...checks import check_choice
from ...errors import HUTBackendError
from ...functional import hut_linear
from ...layer import FLOATS, PRECISIONS
from ...nn import is_replaced
from .base import bias, check_base, drops, is_watched, matrix


class FusedHiraLinear(hira.Linear):
    """PEFT's HiRA layer, whose forward is one fused product wherever that computes the same.

    Elsewhere (see `_unfused`) PEFT's own forward runs. Parameters, state dict, merging and all else
    are PEFT's: an instance is made by `accelerate_hira` from an existing layer.
    """

    hut_precision: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x (W0 * (1 + hira_B hira_A))^T + bias`, in x's type (autocast's under autocast)."""
        if args or kwargs or _unfused(self) is not None or _foreign_input(self, x):
            return super().forward(x, *args, **kwargs)
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


@dataclasses.dataclass(frozen=True)
class HiraReport:
    """What `accelerate_hira` did with each HiRA layer, by its name.

    Attributes:
        fused: layers whose active adapter now runs through the fused layer.
        conditional: patched layers that are on PEFT's path in their present state, or in training,
            and why; they follow their state from call to call.
        kept: layers left to PEFT, and why.
        rounded: patched layers over 16-bit weights under `precision="merged"`, whose forward loses
            updates below about 2^-9 of a weight.
    """

    fused: tuple[str, ...]
    conditional: dict[str, str]
    kept: dict[str, str]
    rounded: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} HiRA layers fused"]
        if self.rounded:
            lines.append(
                f"{len(self.rounded)} of 16-bit weights, rounded with their update: "
                f'precision="split" keeps updates below about 2^-9 of a weight, as PEFT does'
            )
        for title, layers in (("fused at times", self.conditional), ("left to PEFT", self.kept)):
            by_reason: dict[str, list[str]] = {}
            for name, reason in layers.items():
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"{len(names)} {title}: {reason} ({', '.join(names[:3])}{more})")
        return "\n".join(lines)


def accelerate_hira(model: nn.Module, *, precision: str = "merged") -> HiraReport:
    """Runs the HiRA layers of a PEFT model through the fused layer, in place.

    One active adapter without dropout becomes one product, `hut_linear` with scaling 1: nothing of
    the weight's size is kept for backward. Several active adapters, dropout while training,
    embeddings, convolutions, quantised bases, and base layers that carry hooks keep PEFT's path.
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
    fused, conditional, kept, rounded = [], {}, {}, []
    for name, layer in _hira_layers(model).items():
        reason = _unfusible(layer)
        if reason is not None:
            kept[name] = reason
            continue
        layer.__class__ = FusedHiraLinear
        layer.hut_precision = precision
        state = _unfused(layer) or _dropped_in_training(layer)
        if state is None:
            fused.append(name)
        else:
            conditional[name] = state
        if precision == "merged" and layer.base_layer.weight.dtype.itemsize == 2:
            rounded.append(name)
    return HiraReport(tuple(fused), conditional, kept, tuple(rounded))


def restore_hira(model: nn.Module) -> list[str]:
    """Undoes `accelerate_hira`: every HiRA layer of `model` runs PEFT's own forward again.

    Returns:
        The names of the layers that were restored; none where none was accelerated.
    """
    restored = []
    for name, layer in model.named_modules():
        if type(layer) is FusedHiraLinear:
            layer.__class__ = hira.Linear
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
    """Why a HiRA layer is left to PEFT for good, or None."""
    kind = type(layer)
    if kind not in (hira.Linear, FusedHiraLinear):
        quantised = kind.__name__ in ("Linear8bitLt", "Linear4bit")
        what = "quantised base" if quantised else "not a linear layer"
        return f"{kind.__name__}: {what}"
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
    """Why an accelerated layer runs PEFT's forward in its present state, or None."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged"
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} active adapters" if active else "no active adapter"
    if drops(layer.hira_dropout[active[0]]):
        return _dropped_in_training(layer)
    base = layer.base_layer
    if is_watched(base):
        return "its base layer carries hooks"
    weight = base.weight
    if weight.requires_grad:
        return "its base weight is trained"
    if weight.dtype not in FLOATS or layer.hira_A[active[0]].device != weight.device:
        return f"{weight.dtype} on {weight.device}, adapter on {layer.hira_A[active[0]].device}"
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
    """An input on which PEFT's path raises an error of its own, or computes in another type."""
    weight = layer.base_layer.weight
    autocast = torch.is_autocast_enabled(x.device.type)
    return x.device != weight.device or (x.dtype != weight.dtype and not autocast)
