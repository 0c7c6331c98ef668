"""The model and the training run that every engine must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hut_kernels import PAPER, HUTLinear, inject

WIDTH, HIDDEN, BATCH = 16, 24, 8
# Groups of equal and of unequal sizes, and fewer of them than there are ranks.
FORMS: dict[str, dict[str, Any]] = {
    "residual": {"r": 3, "alpha": 5.0, "scale_shift": True},
    "direct": {"r": 2, "offset": 0},
    "two_sided": {"r": 5, "transform": "two_sided"},
    "paper": {"r": 3, **PAPER},
}


class Block(nn.Module):
    """Pre-norm MLP with a residual connection, recomputed in backward if so asked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.recomputed = False

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputed:
            return x + checkpoint(self.mlp, x, use_reentrant=False)
        return x + self.mlp(x)


def make_model(
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    targets: Sequence[str] = ("up", "down"),
    **options: Any,
) -> nn.Module:
    """Two blocks of HUT layers whose factors are random, so that no gradient vanishes."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(dtype)
    inject(model, list(targets), factor_dtype=factor_dtype or dtype, **options)
    for module in model.modules():
        if isinstance(module, HUTLinear):
            randomise(module)
    return model


@torch.no_grad()
def randomise(layer: HUTLinear) -> None:
    """Random factors, of a size that leaves the multiplier near 1."""
    means = dict.fromkeys(("hut_A", "hut_B"), 1.0 if layer.transform == "two_sided" else 0.4)
    for name, factor in layer.named_factors():
        factor.normal_({**means, "gamma": 1.0, "beta": 0.0}[name], 0.3)


def make_batch(step: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs and targets, `[BATCH, tokens, WIDTH]`; the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(BATCH, 4, WIDTH, generator=generator).to(dtype) for _ in range(2)]


def own_part(size: int = BATCH) -> slice:
    """This rank's share of a dimension."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * size // world, (rank + 1) * size // world)


EVERYTHING = slice(None)


def train(
    model: nn.Module,
    part: slice = EVERYTHING,
    *,
    dtype: torch.dtype = torch.float64,
    steps: range = range(4),
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = None,
) -> torch.optim.Optimizer:
    """Trains in place on this part of every batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2)
    for step in steps:
        x, target = (tensor[part] for tensor in make_batch(step, dtype))
        y = model(x)
        if dtype.itemsize < 4:
            y, target = y.float(), target.float()
        F.mse_loss(y, target).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """For 16 bits: its steps are as exact as the gradients, where Adam's magnify small ones."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, detached, whether it is sharded or not."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def error(out: Tensor, reference: Tensor) -> float:
    """`||out - reference|| / ||reference||` in float64; infinite for another shape or NaN."""
    if out.shape != reference.shape or not bool(torch.isfinite(out).all()):
        return float("inf")
    out, reference = full(out).double(), full(reference).double()
    return float(torch.linalg.norm(out - reference) / torch.linalg.norm(reference))


def assert_trained_alike(
    model: nn.Module, reference: nn.Module, initial: nn.Module, limit: float
) -> None:
    """Checks that trained tensors moved as in the reference, relative to the move, and no other."""
    aims, starts = dict(reference.named_parameters()), dict(initial.named_parameters())
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")  # DDP's
        value, start = full(parameter), starts[name].detach()
        if not parameter.requires_grad:
            assert torch.equal(value.cpu(), start), name
            continue
        move, wanted = value.cpu() - start, aims[name].detach() - start
        assert 1e-4 < wanted.square().mean().sqrt() < 1, f"{name}: no move to compare"
        assert error(move, wanted) <= limit, f"{name} moves otherwise: {error(move, wanted):.1e}"
