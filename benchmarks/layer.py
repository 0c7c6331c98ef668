"""The layer suite: one adapted layer, every provider side by side, forward, backward and step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import cost
from .measure import Case, Quantiles, interleaved, peak_bytes, ratios
from .providers import COMPILED, GRAPH, PROVIDERS, Provider, passes, survived
from .shapes import Shape

Row = dict[str, Any]
PASSES = ("forward", "backward", "step")


def measure(
    shape: Shape,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    names: Sequence[str],
    baselines: Sequence[str],
    on_round: Callable[[float], object] = lambda share: None,
    **timing: Any,
) -> list[Row]:
    """Measures providers on one shape; all share one weight, one input, one upstream gradient.

    The floor of a pass is the time of those plain matrix products that its formula cannot do
    without, taken in the same rounds: `x Wᵀ` forward, `g W` backward, and `gᵀ x` where the method
    needs it.

    Args:
        shape: Tokens, in_features, out_features.
        r: Rank of the factors.
        dtype: Type of the activations and the base weight.
        device: Where to run.
        seconds: Time to spend on timing.
        names: Keys of `PROVIDERS`; they have proved their formulas.
        baselines: Those of the names that every row is compared with.
        on_round: Called with the share that is done.
        **timing: More arguments of `interleaved`.

    Returns:
        One row per provider; `left_out` says why one has no figures.
    """
    linear = nn.Linear(shape.in_features, shape.out_features, device=device, dtype=dtype)
    x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=dtype)
    g = torch.randn(shape.tokens, shape.out_features, device=device, dtype=dtype)
    x.requires_grad_()  # as inside a model: even the frozen layer computes dx
    if any(PROVIDERS[name].run == COMPILED for name in names):
        torch.compiler.reset()  # each provider is compiled for this shape, whatever came before
    left_out: dict[str, str] = {}
    ready: dict[str, dict[str, Case]] = {}
    for name in names:
        with survived(name, left_out):
            ready[name] = _ready(PROVIDERS[name], linear, r, x, g)
    cases = {(name, one): case for name, some in ready.items() for one, case in some.items()}
    times = interleaved(
        {**cases, **_products(linear.weight.detach(), x.detach(), g)},
        device,
        seconds,
        on_round=on_round,
        **timing,
    )
    seen = [name for name in baselines if name in ready]
    case = {**shape._asdict(), "r": r}
    rows = []
    for name in names:
        row = described(name, case, dtype)
        if name in ready:
            row |= _figures(name, ready[name], times, shape, r, seen)
            row["bytes"] = _peak(PROVIDERS[name], ready[name], device)
        else:
            row["left_out"] = left_out[name]
        rows.append(row)
    return rows


def described(name: str, case: Mapping[str, Any], dtype: torch.dtype) -> Row:
    """A row of this suite before its figures: what was run, on what, in which types."""
    return {"suite": "layer", **labels(name, dtype), "case": dict(case)}


def labels(name: str, dtype: torch.dtype) -> Row:
    """A provider's name and label, and the types that it runs in."""
    provider = PROVIDERS[name]
    return {
        "provider": name,
        "label": provider.label,
        "types": {
            "compute": type_name(dtype),
            "weight": type_name(dtype),
            "adapter": type_name(provider.adapter_dtype(dtype)),
            "autocast": None,
        },
    }


def type_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _ready(provider: Provider, linear: nn.Linear, r: int, x: Tensor, g: Tensor) -> dict[str, Case]:
    """A provider's passes, each run once: what cannot run, or compile, shows here."""
    some = passes(provider, provider.make(linear, r), x, g)
    for case in some.values():
        case.prepare()
        case.run()
    return some


def _products(weight: Tensor, x: Tensor, g: Tensor) -> dict[tuple[str, str], Case]:
    """The full products of a step, each as the library computes it best."""
    return {
        ("product", "y"): Case(lambda: torch.mm(x, weight.t())),
        ("product", "dx"): Case(lambda: torch.mm(g, weight)),
        ("product", "G"): Case(lambda: torch.mm(g.t(), x)),
    }


def _figures(
    name: str,
    measured: Mapping[str, Case],
    times: Mapping[tuple[str, str], list[float]],
    shape: Shape,
    r: int,
    baselines: Sequence[str],
) -> Row:
    method = PROVIDERS[name].method
    forward, backward = cost.METHODS[method].operations(shape, r)
    operations = {"forward": forward, "backward": backward, "step": forward + backward}
    return {
        "seconds": {one: Quantiles.of(times[name, one]).as_dict() for one in measured},
        "operations": {one: operations[one] for one in measured},
        "floor_share": {
            one: ratios(_floor(one, method, times), times[name, one]).as_dict() for one in measured
        },
        "versus": {
            other: {
                one: ratios(times[name, one], times[other, one]).as_dict()
                for one in measured
                if (other, one) in times
            }
            for other in baselines
        },
    }


def _floor(one: str, method: str, times: Mapping[tuple[str, str], list[float]]) -> list[float]:
    """Round by round, the time of the products that a pass of a method cannot do without."""
    forward, backward = ["y"], ["dx", "G"][: cost.NEEDED[method][1]]
    needed = {"forward": forward, "backward": backward, "step": forward + backward}[one]
    return [sum(some) for some in zip(*(times["product", p] for p in needed), strict=True)]


def _peak(provider: Provider, measured: Mapping[str, Case], device: torch.device) -> Row:
    """A graph has its memory from its capture on: nothing is left to count."""
    return {} if provider.run == GRAPH else {"peak": peak_bytes(measured["step"], device)}
