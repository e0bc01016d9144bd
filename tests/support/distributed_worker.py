"""What each of two processes does in test_composition: data parallel, and fully sharded."""

from __future__ import annotations

import os

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gtp_fx

from support.zoo import enliven


def optimized() -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(enliven(timm.create_model("test_vit")).eval(), flops_budget=0.7, compile=False)


def work(rank: int, world: int, folder: str) -> None:
    """Outputs and gradients of four images, two a process, against those of one process alone."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    x = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    mine = slice(2 * rank, 2 * rank + 2)
    alone = optimized()
    wanted = alone(x)
    wanted.square().mean().backward()
    gradients = [p.grad for p in alone.parameters()]

    def same(model: nn.Module, whole: nn.Module) -> None:
        found = model(x[mine])
        torch.testing.assert_close(found, wanted[mine], rtol=1e-4, atol=1e-4)
        found.square().mean().backward()
        for gradient, parameter in zip(gradients, whole.parameters(), strict=True):
            own = parameter.grad
            assert own is not None and gradient is not None
            torch.testing.assert_close(
                own.full_tensor() if hasattr(own, "full_tensor") else own, gradient, rtol=1e-3, atol=1e-5
            )

    replicated = optimized()
    same(DistributedDataParallel(replicated), replicated)
    sharded = optimized()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    assert all(hasattr(p, "placements") for p in sharded.parameters())
    same(sharded, sharded)
    dist.barrier()  # who leaves first takes the connections along
    dist.destroy_process_group()
