"""A small GPT with HUT layers, and its data, for the launch examples.

The model is random where yours is pretrained, and the text is counting: 7 10 13 16 19 ...
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from examples.gpt import GPT, TARGETS, GPTConfig
from hut_kernels import inject

CONFIG = GPTConfig(width=64, depth=2, heads=4, context=16, vocabulary=32)


def make_model() -> GPT:
    """The same model in every process: frozen, but for the HUT factors of its blocks."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    inject(model, TARGETS, r=4, scale_shift=True, scale_by_rms=True)  # at a rate of LoRA's
    return model


def make_batch(step: int, count: int = 16) -> Tensor:
    """`[count, context + 1]` tokens; the same in every process."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(CONFIG.vocabulary, (count, 1), generator=generator)
    stride = torch.randint(1, 4, (count, 1), generator=generator)
    return (start + stride * torch.arange(CONFIG.context + 1)) % CONFIG.vocabulary


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def start() -> torch.device:
    """Joins the processes that torchrun started; this one's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes on {device.type}", flush=True)
    return device


def report(step: int, loss: Tensor) -> None:
    """Prints the loss of the whole batch, from this rank's mean over its part."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        print(f"step {step:3}  loss {loss.item() / dist.get_world_size():.4f}", flush=True)
