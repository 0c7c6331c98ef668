"""HUT under Hugging Face's Accelerate, which picks the engine from how the program is launched.

    accelerate launch --num_processes 2 -m examples.train_accelerate

Without GPUs, Accelerate starts several processes only when told so twice:

    export ACCELERATE_USE_CPU=true
    accelerate launch --multi_gpu --num_processes 2 -m examples.train_accelerate
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from examples.launch import loss_of, make_batch, make_model
from hut_kernels import save_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="adapter.safetensors")
    args = parser.parse_args()

    accelerator = Accelerator()
    accelerator.print(f"{accelerator.num_processes} processes on {accelerator.device.type}")
    model = make_model()
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    rows = torch.cat([make_batch(step) for step in range(args.steps)])
    # Each process gets its part of every 16 rows.
    loader = DataLoader(rows, batch_size=16 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, tokens in enumerate(loader):
        loss = loss_of(model, tokens)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean")
        accelerator.print(f"step {step:3}  loss {mean.item():.4f}")
    save_adapter(model, args.output)  # on every rank
    accelerator.end_training()


if __name__ == "__main__":
    main()
