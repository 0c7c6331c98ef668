"""The layer benchmark: one adapted layer, every provider side by side."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .measure import Quantiles, forward_case, interleaved, peak_bytes, ratios, step_case
from .providers import PROVIDERS

BASELINE = "frozen"


class Shape(NamedTuple):
    """N tokens through a weight `[out_features, in_features]`."""

    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.in_features}x{self.out_features}"


def run(
    shape: Shape,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    on_round: Callable[[float], object],
) -> list[dict[str, Any]]:
    """Measures every provider on one shape; all share one weight, one input, one upstream gradient.

    Args:
        shape: Tokens, in_features, out_features.
        r: Rank of the factors.
        dtype: Type of the activations and the base weight.
        device: Where to run.
        seconds: Time to spend on timing.
        on_round: Called with the share that is done.

    Returns:
        One record per provider: quantiles of forward and step time in seconds, of their ratios to
        the frozen layer, and the step's peak memory above what is resident.
    """
    linear = nn.Linear(shape.in_features, shape.out_features, device=device, dtype=dtype)
    x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=dtype)
    g = torch.randn(shape.tokens, shape.out_features, device=device, dtype=dtype)
    x.requires_grad_()  # as inside a model: even the frozen layer computes dx
    layers = {name: provider.make(linear, r) for name, provider in PROVIDERS.items()}
    steps = {name: step_case(layer, x, g) for name, layer in layers.items()}
    cases = {(name, "forward"): forward_case(layer, x) for name, layer in layers.items()}
    cases |= {(name, "step"): case for name, case in steps.items()}
    times = interleaved(cases, device, seconds, on_round=on_round)
    common = {"suite": "layer", **shape._asdict(), "r": r, "dtype": str(dtype).split(".")[1]}
    return [
        {
            **common,
            "provider": name,
            "label": PROVIDERS[name].label,
            "peak_bytes": peak_bytes(steps[name], device),
            **{mode: Quantiles.of(times[name, mode]).as_dict() for mode in ("forward", "step")},
            **{
                f"{mode}_ratio": ratios(times[name, mode], times[BASELINE, mode]).as_dict()
                for mode in ("forward", "step")
            },
            "step_versus": {
                other: ratios(times[name, "step"], times[other, "step"]).as_dict()
                for other in layers
                if other not in (name, BASELINE)
            },
        }
        for name in layers
    ]
