"""Host time of the compiled extension (docs/extension.md) on the GPU.

It is left out, with a sentence in the record, where the extension is not built.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hut_kernels import backends

from ..measure import Quantiles, host_time
from ..report.text import table
from .suites import Bench, Subject, _eager_steps, tensors
from .timing import Call

Row = dict[str, Any]
LAYER, TOKENS = Subject(1024, 1024), 512
PROVIDERS = ("cuda", "triton", "peft_lora")


def missing() -> str | None:
    """The reason why the extension does not run here; None where it does."""
    state = backends()["cuda"]
    return None if state["available"] else str(state["reason"])


def launching(bench: Bench, providers: Sequence[str] = PROVIDERS) -> Iterator[Row]:
    """Host time of a forward and a backward by each provider, where launching is what takes it."""
    sets = tensors(bench, LAYER, TOKENS, ["step"])[:1]
    for provider in providers:
        row: Row = {
            "suite": "launching",
            **LAYER.as_dict(),
            "N": TOKENS,
            "provider": provider,
        }
        if provider != "peft_lora":
            calls = _eager_steps(sets, LAYER, dataclasses.replace(bench, backend=provider))
        elif importlib.util.find_spec("peft") is None:
            yield {**row, "error": "peft is not installed"}
            continue
        else:
            calls = [_peft_step(sets[0].weight, sets[0].x, sets[0].grad)]
        yield {**row, "seconds": _launching(calls[0], bench.device)}


def _launching(call: Call, device: torch.device, steps: int = 50, rounds: int = 10) -> Row:
    """Time until a call returns; a round is short enough not to fill the device's queue."""
    times = [
        host_time(lambda: [call() for _ in range(steps)], device, wait=False) / steps
        for _ in range(rounds)
    ]
    return Quantiles.of(times[1:]).as_dict()  # the first warmed up


def _peft_step(weight: Tensor, x: Tensor, grad: Tensor) -> Call:
    """The same for PEFT's LoRA layer."""
    import peft

    linear = nn.Linear(*weight.t().shape, bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    config = peft.LoraConfig(r=LAYER.r, target_modules=["0"])
    model = peft.inject_adapter_in_model(config, nn.Sequential(linear))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> object:
        inputs = x.detach().requires_grad_()
        return torch.autograd.grad(model(inputs), (inputs, *trained), grad)

    return step


def launching_text(rows: Sequence[Row]) -> str:
    """The host times on one screen."""
    lines = [
        [
            row["provider"],
            f"{row['seconds']['median'] * 1e6:.1f}" if "seconds" in row else row["error"],
        ]
        for row in rows
    ]
    title = f"Host time, forward + backward, {LAYER.K} x {LAYER.O}, N = {TOKENS}"
    if not lines:
        return ""
    return table(title, ["", "us"], lines)
