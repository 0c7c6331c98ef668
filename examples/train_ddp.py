"""HUT under DistributedDataParallel: every process has the model, and a part of each batch.

    torchrun --standalone --nproc_per_node 2 -m examples.train_ddp

Only the factors are trained, so only their gradients travel: a few bytes beside the model's.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from examples.launch import loss_of, make_batch, make_model, report, start
from hut_kernels import save_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="adapter.safetensors")
    args = parser.parse_args()

    device = start()
    model = DistributedDataParallel(make_model().to(device))
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    for step in range(args.steps):
        tokens = make_batch(step).chunk(dist.get_world_size())[dist.get_rank()].to(device)
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
    save_adapter(model, args.output)  # on every rank
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
