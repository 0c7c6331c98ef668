"""HUT under FSDP2: every process has a shard of each block, and a part of each batch.

    torchrun --standalone --nproc_per_node 2 -m examples.train_fsdp
    torchrun --standalone --nproc_per_node 2 -m examples.train_fsdp --bf16 --offload

The frozen weights are gathered a block at a time; of gradients there are only the factors'.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from examples.launch import loss_of, make_batch, make_model, report, start
from hut_kernels import save_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="compute in bf16, keep and sum in fp32")
    parser.add_argument("--offload", action="store_true", help="keep the shards in host memory")
    parser.add_argument("--output", default="adapter.safetensors")
    args = parser.parse_args()

    device = start()
    model = make_model().to(device)
    precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    options = {
        "mp_policy": precision if args.bf16 else MixedPrecisionPolicy(),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=device.type == "cuda") if args.offload else OffloadPolicy()
        ),
    }
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
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
