"""The layer suite: one adapted layer, every provider side by side, forward, backward and step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import bases
from ..bases import DENSE
from ..measure import Call, Quantiles, interleaved, peak_bytes, ratios, survived
from ..providers import COMPILED, GRAPH, PROVIDERS, Provider, passes, prove_step
from ..shapes import Shape
from . import cost

Row = dict[str, Any]
PASSES = ("forward", "backward", "step")
PRODUCT = "product"  # owns the plain products that are timed beside the providers
DEQUANTIZE = "dequantize"  # owns W0 by the fallback, and by the library of a quantized weight


def measure(
    shape: Shape,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    names: Sequence[str],
    baselines: Sequence[str],
    on_round: Callable[[float], object] = lambda share: None,
    base: str = DENSE,
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
        base: How the base weight is stored, of `bases.BASES`; the floor is of the dense one.
        **timing: More arguments of `interleaved`.

    Returns:
        One row per provider; `left_out` says why one has no figures, and `wrong` that it does not
        compute its formula on this shape.
    """
    plain = nn.Linear(shape.in_features, shape.out_features, device=device, dtype=dtype)
    linear = bases.stored(plain, base)
    x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=dtype)
    g = torch.randn(shape.tokens, shape.out_features, device=device, dtype=dtype)
    x.requires_grad_()  # as inside a model: even the frozen layer computes dx
    if any(PROVIDERS[name].run == COMPILED for name in names):
        torch.compiler.reset()  # each provider is compiled for this shape, whatever came before
    left_out: dict[str, str] = {}
    wrong: list[str] = []
    ready: dict[str, dict[str, Call]] = {}
    for name in names:
        with survived(name, left_out):
            try:
                ready[name] = _ready(PROVIDERS[name], linear, r, x, g)
            except ArithmeticError:
                wrong.append(name)
                raise
    cases = {(name, one): case for name, some in ready.items() for one, case in some.items()}
    if base != DENSE and device.type == "cpu":  # where the fallback dequantizes
        unpacked = bases.dequantizations(linear, dtype)
        cases |= {(DEQUANTIZE, whose): Call(run) for whose, run in unpacked.items()}
    failed: dict[tuple[str, str], str] = {}
    times = interleaved(
        {**cases, **_products(plain.weight.detach(), x.detach(), g)},
        device,
        seconds,
        on_round=on_round,
        failed=failed,
        **timing,
    )
    for (owner, one), reason in failed.items():
        if owner == PRODUCT:  # no floor, so no figures
            left_out |= dict.fromkeys(ready, f"the plain product {one}: {reason}")
        else:
            left_out[owner] = reason
    size: dict[str, Row] = {}
    for name in ready:
        with survived(name, left_out):
            size[name] = _peak(PROVIDERS[name], ready[name], device)
    seen = [name for name in baselines if name in ready and name not in left_out]
    case = {**shape._asdict(), "r": r}
    rows = []
    for name in names:
        row = described(name, case, dtype, base)
        if name in left_out:
            row |= {"left_out": left_out[name], **({"wrong": True} if name in wrong else {})}
        else:
            row |= _figures(name, ready[name], times, shape, r, seen)
            row["bytes"] = size[name]
            if (DEQUANTIZE, bases.OWN) in times and PROVIDERS[name].of_hut:
                ours, theirs = (times[DEQUANTIZE, whose] for whose in (bases.OWN, bases.LIBRARY))
                row[DEQUANTIZE] = {"over_library": ratios(ours, theirs).as_dict()}
        rows.append(row)
    return rows


def described(name: str, case: Mapping[str, Any], dtype: torch.dtype, base: str = DENSE) -> Row:
    """A row of this suite before its figures: what was run, on what, in which types."""
    return {"suite": "layer", **labels(name, dtype, base), "case": dict(case)}


def labels(name: str, dtype: torch.dtype, base: str = DENSE) -> Row:
    """A provider's name and label, and the types that it runs in."""
    provider, few_bits = PROVIDERS[name], base != DENSE
    return {
        "provider": name,
        "label": "Q" * (few_bits and name.startswith("peft_lora")) + provider.label,
        "types": {
            "compute": type_name(dtype),
            "weight": base if few_bits else type_name(dtype),
            "adapter": type_name(provider.adapter_dtype(dtype)),
            "autocast": None,
        },
    }


def type_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _ready(provider: Provider, linear: nn.Linear, r: int, x: Tensor, g: Tensor) -> dict[str, Call]:
    """A provider's passes, each run once: what cannot run, or compile, or is wrong, shows here."""
    layer = provider.make(linear, r)
    with torch.no_grad():  # off the identity, as in training
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    some = passes(provider, layer, x, g)
    prove_step(provider, layer, some["step"], x, g)
    for case in some.values():
        case.prepare()
        case.run()
    return some


def _products(weight: Tensor, x: Tensor, g: Tensor) -> dict[tuple[str, str], Call]:
    """The full products of a step, each as the library computes it best."""
    return {
        (PRODUCT, "y"): Call(lambda: torch.mm(x, weight.t())),
        (PRODUCT, "dx"): Call(lambda: torch.mm(g, weight)),
        (PRODUCT, "G"): Call(lambda: torch.mm(g.t(), x)),
    }


def _figures(
    name: str,
    measured: Mapping[str, Call],
    times: Mapping[tuple[str, str], list[float]],
    shape: Shape,
    r: int,
    baselines: Sequence[str],
) -> Row:
    method = PROVIDERS[name].method
    # A replay is compared with replays alone, for the others' times hold the host's too.
    replay = PROVIDERS[name].run == GRAPH
    baselines = [other for other in baselines if replay == (PROVIDERS[other].run == GRAPH)]
    counts: Row = {"operations": {}, "floor_share": {}}
    if method is not None:
        forward, backward = cost.METHODS[method].operations(shape, r)
        operations = {"forward": forward, "backward": backward, "step": forward + backward}
        for one in measured:
            counts["operations"][one] = operations[one]
            floor = _floor(one, method, times)
            counts["floor_share"][one] = ratios(floor, times[name, one]).as_dict()
    return {
        "seconds": {one: Quantiles.of(times[name, one]).as_dict() for one in measured},
        **counts,
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
    return [sum(some) for some in zip(*(times[PRODUCT, p] for p in needed), strict=True)]


def _peak(provider: Provider, measured: Mapping[str, Call], device: torch.device) -> Row:
    """A graph has its memory from its capture on: nothing is left to count."""
    return {} if provider.run == GRAPH else {"peak": peak_bytes(measured["step"], device)}
