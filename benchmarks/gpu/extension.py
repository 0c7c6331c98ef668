"""Host time of the compiled extension (docs/extension.md) on the GPU.

It is left out, with a sentence in the record, where the extension is not built.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hut_kernels import backends

from ..report.text import table
from .suites import Bench, Layer, _eager_steps, tensors
from .timing import Call

Row = dict[str, Any]
LAYER, TOKENS = Layer(1024, 1024), 512
PROVIDERS = ("cuda", "triton", "peft_lora")


def missing() -> str | None:
    """Why the extension does not run here."""
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
        yield {**row, "seconds": host_time(calls[0], _wait(bench.device))}


def host_time(call: Call, wait: Callable[[], object], steps: int = 50, rounds: int = 9) -> float:
    """Seconds until a call returns, the device's work not waited for: the best of the rounds.

    The device is idle when a round begins, and a round is short enough not to fill its queue.
    """
    for _ in range(steps):
        call()
    times = []
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        for _ in range(steps):
            call()
        times.append((time.perf_counter() - begin) / steps)
    wait()
    return min(times)


def _wait(device: torch.device) -> Callable[[], object]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


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


# The extension's host time: at most so much of another provider's.
TARGETS = (("peft_lora", "PEFT LoRA's", 1.0), ("triton", "the Triton path's", 0.5))


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """For each target the ratio of host times; `met` is None, with a `reason`, if there is none."""
    by = {row["provider"]: row for row in rows if row.get("suite") == "launching"}
    judged = []
    for provider, name, limit in TARGETS:
        pair = by.get("cuda"), by.get(provider)
        one: Row = {"target": name, "limit": limit, "ratio": None, "met": None}
        if all(row and "seconds" in row for row in pair):
            one["ratio"] = pair[0]["seconds"] / pair[1]["seconds"]
            one["met"] = one["ratio"] <= limit
        else:
            errors = [row["error"] for row in pair if row and "error" in row]
            one["reason"] = "; ".join(errors) or "not run"
        judged.append(one)
    return judged


def verdicts_text(judged: Sequence[Row]) -> str:
    """The verdicts, a line each."""
    lines = []
    for one in judged:
        said = {True: "met", False: "MISSED", None: "not measured"}[one["met"]]
        why = f"({one['reason']})" if one["met"] is None else f"({one['ratio']:.2f})"
        lines.append(f"  at most {one['limit']:.2f} of {one['target']}: {said} {why}")
    return "\n".join(lines)


def launching_text(rows: Sequence[Row]) -> str:
    """The host times on one screen."""
    lines = [
        [row["provider"], f"{row['seconds'] * 1e6:.1f}" if "seconds" in row else row["error"]]
        for row in rows
    ]
    title = f"Host time, forward + backward, {LAYER.K} x {LAYER.O}, N = {TOKENS}"
    if not lines:
        return ""
    return f"{table(title, ['', 'us'], lines)}\n{verdicts_text(verdicts(rows))}"
