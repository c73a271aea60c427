"""A small model, ways to shard it, batches for it, and optimizers that are wrong on purpose."""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distmuon import Muon

WORDS = 11


def build_model():
    return nn.Sequential(
        nn.Embedding(WORDS, 16), nn.Linear(16, 30), nn.GELU(), nn.Linear(30, 16), nn.LayerNorm(16), nn.Linear(16, WORDS)
    )


def loss(model, step, micro_batch):
    """Other data on each rank, as in data parallelism."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank)
    words = torch.randint(WORDS, (8,), generator=generator)
    return nn.functional.cross_entropy(model(words), words.flip(0))


def same_loss(model, step, micro_batch):
    """The same data on each rank, as in tensor parallelism."""
    words = torch.randint(WORDS, (8,), generator=torch.Generator().manual_seed(10 * step + micro_batch))
    return nn.functional.cross_entropy(model(words), words.flip(0))


@functools.cache
def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


def fsdp2(model):
    for number in (1, 3):
        fully_shard(model[number])
    return fully_shard(model)


def hsdp(model):
    fully_shard(model[1], mesh=mesh_of(2, 2))
    return fully_shard(model, mesh=mesh_of(2, 2))


def ddp(model):
    return DistributedDataParallel(model)


def tp(model):
    return parallelize_module(model, mesh_of(dist.get_world_size()), {"1": ColwiseParallel(), "3": RowwiseParallel()})


def changes_a_weight(model):
    with torch.no_grad():
        model[3].weight[0, 0] += 1e-3
    return fsdp2(model)


def is_sharded(model):
    return isinstance(model, DistributedDataParallel) or any(isinstance(param, DTensor) for param in model.parameters())


class SkipsAShard(Muon):
    """Rank 1 forgets to apply the update of one matrix."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.skips = is_sharded(params) and dist.get_rank() == 1

    @torch.no_grad()
    def step(self, closure=None):
        param = self.param_groups[0]["params"][1]
        local = param.to_local() if isinstance(param, DTensor) else param
        before = local.clone()
        super().step(closure)
        if self.skips:
            local.copy_(before)


class WrongWhenBatched(Muon):
    """The path that is not exact takes too large a step."""

    def __init__(self, params, **options):
        if is_sharded(params) and options.get("foreach") is not False:
            options["lr"] *= 1.3
        super().__init__(params, **options)


class ForgetsMomentum(Muon):
    """Loads zeros."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "momentum_buffer" in state:
                state["momentum_buffer"].zero_()
