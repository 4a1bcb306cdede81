"""One process of a two-process group (gloo): the gradients of a retrofit under DDP or FSDP2, saved by rank 0.

python -m tests.support.distributed_worker WAY RANK RENDEZVOUS_FILE OUT
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.families.cases import BY_NAME
from tests.support.tiny_models import retrofitted, tokens


def main(way: str, rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = retrofitted(BY_NAME["llama"]).train()
    if way == "ddp":
        run = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
    mine = tokens()[rank : rank + 1]
    loss = run(input_ids=mine, labels=mine).loss
    loss.backward()
    gradients = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    if rank == 0:
        torch.save(gradients, out)
    dist.barrier()
    os._exit(0)  # a store in a file, when it goes, waits minutes for a file that the other process deleted first


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
