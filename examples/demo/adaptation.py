"""The training part: a byte-level GPT learns Python sources, is frozen, and is adapted to English.

All adapted models train in lockstep: each step takes the next batch and goes through every one of
them. So all see the same data, and whatever slows the machine down slows all of them alike.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Call, Quantiles, host_time, peak_bytes, ratios
from benchmarks.methods import LoRALinear
from examples.gpt import GPT, TARGETS, windows
from hut_kernels import PAPER, adapter_options, inject, load_adapter, merge, save_adapter

from .corpora import Split

WARM_UP = 0.1  # share of the steps in which the learning rate rises
POINTS = 40  # of the curve of pre-training
PROBES = 8  # of the validation text during adaptation,
PROBE_BYTES = 8192  # so much of it each time
EVALUATED = 4096  # bytes in one forward of an evaluation
BASELINE = "lora"

Show = Callable[[float, str], object]  # told the share that is done, and a note


@dataclass(frozen=True)
class Method:
    """One way to adapt a frozen model.

    Attributes:
        label: What tables call it.
        rates: The learning rates to try, the middle one where the best is expected.
        options: Of `inject`; none for LoRA.
    """

    label: str
    rates: tuple[float, ...]
    options: Mapping[str, Any] | None = None

    def matched_rank(self, model: GPT, r: int) -> int:
        """The rank whose number of trainable parameters is nearest to that of factors of rank r."""
        layers = _targets(model)
        per_rank = sum(layer.in_features + layer.out_features for layer in layers)
        scale_and_shift = 2 * sum(layer.out_features for layer in layers)
        extra = scale_and_shift if (self.options or {}).get("scale_shift") else 0
        return max(1, round(r - extra / per_rank))

    def adapt(self, model: GPT, r: int) -> None:
        """Puts adapters into `model` and freezes everything else."""
        if self.options is not None:
            inject(model, TARGETS, r=r, **self.options)
            return
        model.requires_grad_(False)
        _replace(model, lambda layer: LoRALinear(layer, r))

    def merged(self, model: GPT, base: GPT, file: Path) -> GPT:
        """The adapted `model` as plain layers; HUT's goes through an adapter file on the way."""
        if self.options is None:
            return _replace(copy.deepcopy(model), LoRALinear.to_linear)
        save_adapter(model, file)
        fresh = copy.deepcopy(base)
        inject(fresh, TARGETS, **adapter_options(file))
        load_adapter(fresh, file)
        return merge(fresh)


METHODS = {
    "hut_low_rank": Method("HUT low_rank", (0.005, 0.015, 0.045), {"scale_by_rms": True}),
    "hut_paper": Method("HUT paper's form", (0.015, 0.045, 0.135), PAPER),
    "lora": Method("LoRA", (0.005, 0.015, 0.045)),
}


class Course:
    """Progress of a training: by steps, or by the clock on a machine too slow for them.

    The clock counts from a grace period on, so that it never leads where the steps fit into the
    time: there a training is the same every time. Where it leads, the learning rate falls with it.

    Args:
        steps: Steps of the training.
        seconds: The time that it may take.
    """

    GRACE = 0.3  # of the time

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds
        self.done, self.begin = 0, time.perf_counter()

    def share(self) -> float:
        """The share that is done; 1 at the end."""
        elapsed = (time.perf_counter() - self.begin) / self.seconds
        return min(1.0, max(self.done / self.steps, (elapsed - self.GRACE) / (1 - self.GRACE)))

    def factor(self, share: float) -> float:
        """Of the learning rate: a linear rise, then half a cosine down to a fiftieth."""
        rise = (self.done + 1) / max(1, WARM_UP * self.steps)
        return min(rise, 1) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass
class Run:
    """A model in training, at one learning rate, and what has been seen of it."""

    model: GPT
    rate: float
    r: int | None = None
    weight_decay: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.rate, (0.9, 0.98), weight_decay=self.weight_decay, fused=True
        )

    def step(self, window: Tensor, factor: float) -> Tensor:
        """One optimizer step on a batch at `factor` times the learning rate; its loss."""
        loss = self.backward(window)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def timed_step(self, window: Tensor, factor: float) -> Tensor:
        """`step`, its time added to `seconds`."""
        losses: list[Tensor] = []
        seconds = host_time(lambda: losses.append(self.step(window, factor)), window.device)
        self.seconds.append(seconds)
        return losses[0]

    def backward(self, window: Tensor) -> Tensor:
        """Forward and backward alone, in bf16 autocast on a GPU."""
        on_cuda = window.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_cuda else contextlib.nullcontext():
            loss = self.model.losses(window).mean()
        loss.backward()
        return loss.detach()


class Batches:
    """Random windows of a text, the same ones for the same seed on every device."""

    def __init__(self, data: Tensor, context: int, batch: int, device: torch.device, seed: int):
        self.data, self.context, self.batch = data.to(device), context, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Tensor:
        last = len(self.data) - self.context
        starts = torch.randint(last, (self.batch,), generator=self.generator)
        return windows(self.data, starts.to(self.data.device), self.context)


@torch.no_grad()
def window_losses(model: GPT, data: Tensor) -> Tensor:
    """The loss of each window of a text cut into windows side by side, in fp32, on the CPU."""
    data = data.to(model.token.weight.device)
    context = model.config.context
    starts = torch.arange(0, len(data) - context, context, device=data.device)
    some = starts.split(max(1, EVALUATED // context))
    parts = [model.losses(windows(data, each, context)).mean(1) for each in some]
    return torch.cat(parts).double().cpu()


def mean_loss(model: GPT, data: Tensor) -> float:
    """Nats per byte over a whole text."""
    return window_losses(model, data).mean().item()


def pretrain(model: GPT, rate: float, batches: Batches, course: Course, show: Show) -> Run:
    """Trains every parameter of `model`; the run's curve is the training loss, a mean per point."""
    run, recent = Run(model, rate, weight_decay=0.1), []
    while (share := course.share()) < 1:
        recent.append(run.timed_step(batches(), course.factor(share)))
        course.done += 1
        if course.share() >= (len(run.curve) + 1) / POINTS:
            run.curve.append((course.done, torch.stack(recent).mean().item()))
            show(course.share(), f"loss {run.curve[-1][1]:.3f}")
            recent = []
    return run


def start_runs(base: GPT, r: int, rate_scale: float, seed: int) -> dict[str, list[Run]]:
    """For every method a copy of the frozen model at each of its learning rates, times a scale."""
    runs: dict[str, list[Run]] = {}
    for name, method in METHODS.items():
        runs[name], rank = [], method.matched_rank(base, r)
        for rate in method.rates:
            torch.manual_seed(seed)
            model = copy.deepcopy(base)
            method.adapt(model, rank)
            runs[name].append(Run(model, rate_scale * rate, rank))
    return runs


def train(
    runs: list[Run], batches: Batches, validation: Tensor, course: Course, show: Show
) -> None:
    """Trains all runs in lockstep, each step in another order, and probes their validation loss."""
    while True:
        share = course.share()
        if share >= len(runs[0].curve) / PROBES:
            for run in runs:
                run.curve.append((course.done, mean_loss(run.model, validation[:PROBE_BYTES])))
        best = min(run.curve[-1][1] for run in runs)
        show(share, f"best validation loss {best:.3f}")
        if share == 1:
            return
        window, turn, factor = batches(), course.done % len(runs), course.factor(share)
        for run in runs[turn:] + runs[:turn]:
            run.timed_step(window, factor)
        course.done += 1


def assess(
    runs: dict[str, list[Run]], base: GPT, text: Split, window: Tensor, folder: Path
) -> list[dict[str, Any]]:
    """Chooses each method's best rate on the validation text, and reports the held-out one.

    Args:
        runs: What `start_runs` gave and `train` trained.
        base: The frozen model.
        text: The text that the runs were adapted to.
        window: A batch, to measure a step's peak memory with.
        folder: Where adapter files go.

    Returns:
        One record per method.
    """
    validation = {
        name: [mean_loss(run.model, text.validation) for run in some] for name, some in runs.items()
    }
    best = {
        name: min(range(len(some)), key=lambda i, some=some: _or_infinity(some[i]))
        for name, some in validation.items()
    }
    chosen = {name: runs[name][best[name]] for name in runs}
    losses = {name: window_losses(run.model, text.held_out) for name, run in chosen.items()}
    return [
        {
            "suite": "adaptation",
            "method": name,
            "label": METHODS[name].label,
            "trainable": sum(p.numel() for p in run.parameters),
            "r": run.r,
            "sweep": [
                {"rate": other.rate, "validation": loss, "curve": other.curve}
                for other, loss in zip(runs[name], validation[name], strict=True)
            ],
            "rate": run.rate,
            "steps": len(run.seconds),
            "on_edge": best[name] in (0, len(runs[name]) - 1),
            "held_out": losses[name].mean().item(),
            "held_out_minus_baseline": _paired(losses[name], losses[BASELINE]),
            **_merging(
                METHODS[name], run.model, base, text, folder / f"adapter_{name}.safetensors"
            ),
            "step": Quantiles.of(run.seconds).as_dict(),
            "step_ratio": ratios(run.seconds, chosen[BASELINE].seconds).as_dict(),
            "peak_bytes": peak_bytes(
                Call(lambda run=run: run.backward(window), run.optimizer.zero_grad), window.device
            ),
        }
        for name, run in chosen.items()
    ]


def _merging(method: Method, model: GPT, base: GPT, text: Split, file: Path) -> dict[str, float]:
    """The merged model's held-out loss, and the largest difference of a single window's."""
    adapted = window_losses(model, text.held_out)
    merged = window_losses(method.merged(model, base, file), text.held_out)
    return {
        "merged_held_out": merged.mean().item(),
        "merged_difference": (merged - adapted).abs().max().item(),
    }


def _paired(losses: Tensor, others: Tensor) -> dict[str, float]:
    """Mean difference over the same windows, and its standard error."""
    difference = losses - others
    error = difference.std() / len(difference) ** 0.5
    return {"mean": difference.mean().item(), "standard_error": error.item()}


def _targets(model: GPT) -> list[nn.Linear]:
    return [getattr(block, name) for block in model.blocks for name in TARGETS]


def _replace(model: GPT, make: Callable[[Any], nn.Module]) -> GPT:
    for block in model.blocks:
        for name in TARGETS:
            setattr(block, name, make(getattr(block, name)))
    return model


def _or_infinity(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
