"""HUT under tensor parallelism: every process has some heads and hidden features of each block.

    torchrun --standalone --nproc_per_node 2 -m examples.train_tp
    torchrun --standalone --nproc_per_node 4 -m examples.train_tp --replicas 2

With --replicas the processes form a grid: each row of it shares a model, and has a part of each
batch; over the rows FSDP2 shards what tensor parallelism left on a process.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from examples.launch import loss_of, make_batch, make_model, report, start
from hut_kernels import save_adapter
from hut_kernels.distributed import HUTColwiseParallel, HUTRowwiseParallel

PLAN = {
    "blocks.*.q": HUTColwiseParallel(),
    "blocks.*.k": HUTColwiseParallel(),
    "blocks.*.v": HUTColwiseParallel(),
    "blocks.*.o": HUTRowwiseParallel(),
    "blocks.*.up": HUTColwiseParallel(),
    "blocks.*.down": HUTRowwiseParallel(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=1, help="rows of the grid of processes")
    parser.add_argument("--output", default="adapter.safetensors")
    args = parser.parse_args()

    device = start()
    model, part = make_model().to(device), 0
    if args.replicas == 1:
        parallelize_module(model, init_device_mesh(device.type, (dist.get_world_size(),)), PLAN)
    else:
        shape = (args.replicas, dist.get_world_size() // args.replicas)
        grid = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))
        parallelize_module(model, grid["tp"], PLAN)
        for block in model.blocks:
            fully_shard(block, mesh=grid["dp"])
        fully_shard(model, mesh=grid["dp"])
        part = grid["dp"].get_local_rank()
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    for step in range(args.steps):
        tokens = make_batch(step).chunk(args.replicas)[part].to(device)
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
    save_adapter(model, args.output)  # on every rank
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
