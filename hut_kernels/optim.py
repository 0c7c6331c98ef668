"""parameter_groups: what an optimizer should do with each trained tensor of an adapted model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .checks import check_number
from .experts import HUTExperts
from .nn import TrainedFactors, rms


def parameter_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Make an optimizer's parameter groups, with the rates that HUT needs for LoRA's rate.

    A step of Adam moves each element of a factor by its rate. LoRA adds factors to weights; HUT
    multiplies weights by them, and weights are small. So, with rms the root mean square of W0:

    - `low_rank` with offset 1: `hut_B` at `lr / rms`, `hut_A` at `lr`. That is LoRA's course to
      first order; with `scale_by_rms`, where the scaling has the factor, both at `lr`.
    - offset 0, `two_sided` and `gamma`, which start from 1: at `lr * sqrt(r / (6 in)) / rms`, with
      which the first step moves a weight as far as LoRA's does. No weight decay, which would pull
      them to 0, and not to the base model.
    - everything else that is trained (heads, `modules_to_save`, `beta`): at `lr`.

    Layers of one form share a rate, the geometric mean of their own.

    In the sweep of docs/peft.md LoRA's best rate gave LoRA's loss, three times that a lower one.

    Args:
        model: a model with `HUTLinear` layers or experts, or with HUT adapters of PEFT.
        lr: the learning rate that you would give LoRA with the same `alpha / r`.
        weight_decay: of every group in which 0 leaves the base model as it is.

    Returns:
        Groups for any optimizer of torch; none is empty, and each trained tensor is in one.

    Raises:
        ValueError: the model has no HUT factor that is trained, or `lr` or `weight_decay` is
            negative or not finite.
        TypeError: they are not real numbers.
        HUTBackendError: the base weight of an adapted layer is offloaded or on the meta device.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hut_kernels import inject, parameter_groups
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> inject(model, ["0"], r=4)
        ['0']
        >>> model[2].requires_grad_(True)  # a head, trained as a whole
        Linear(in_features=64, out_features=4, bias=True)
        >>> groups = parameter_groups(model, lr=1e-3, weight_decay=0.01)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> [len(group["params"]) for group in groups]
        [1, 3]
    """
    for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
        if not 0 <= check_number(name, value) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite; got {value}")
    raised: list[tuple[Tensor, float]] = []  # 0 is the identity
    around_one: list[tuple[Tensor, float]] = []  # 1 is
    for factors in _factors(model):
        size = rms(factors.weight)
        r, in_features = factors.hut_A.shape[-2:]
        first_step = math.sqrt(r / (6 * in_features)) / size
        if factors.transform == "low_rank" and factors.offset == 1:
            if not factors.scale_by_rms:
                raised.append((factors.hut_B, 1 / size))
        else:
            around_one += [(factors.hut_A, first_step), (factors.hut_B, first_step)]
        if factors.gamma is not None:
            around_one.append((factors.gamma, first_step))
    special = {id(tensor) for tensor, _ in (*raised, *around_one)}
    usual: list[tuple[Tensor, float]] = [
        (p, 1.0) for p in model.parameters() if id(p) not in special
    ]
    groups = [
        {"params": [tensor for tensor, _ in some], "lr": lr * _mean(some), "weight_decay": decay}
        for some, decay in (
            (_trained(raised), weight_decay),
            (_trained(around_one), 0.0),
            (_trained(usual), weight_decay),
        )
        if some
    ]
    if not any(factors.hut_B.requires_grad for factors in _factors(model)):
        raise ValueError("the model trains no HUT factor: call inject or get_peft_model first")
    return groups


def _factors(model: nn.Module) -> Iterator[TrainedFactors]:
    for module in model.modules():
        adapters: Any = getattr(module, "hut_factors", None)
        if adapters is not None:
            yield from adapters()
        for name, child in module.named_children():
            if isinstance(child, HUTExperts):  # whose weights stay the module's
                weight = module.get_parameter(name.removeprefix("hut_"))
                factors = child.hut_A, child.hut_B, child.gamma, child.beta
                yield TrainedFactors(weight, *factors, child.transform, child.offset, False)


def _trained(tensors: list[tuple[Tensor, float]]) -> list[tuple[Tensor, float]]:
    return [(tensor, rate) for tensor, rate in tensors if tensor.requires_grad]


def _mean(rates: list[tuple[Tensor, float]]) -> float:
    """The geometric mean of the rates."""
    return math.exp(sum(math.log(rate) for _, rate in rates) / len(rates))
