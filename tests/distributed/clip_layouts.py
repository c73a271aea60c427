"""Layouts of parameters over ranks, and gradients for them whose whole is known to every rank."""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


@functools.cache
def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


@functools.cache
def pair_mesh():
    """The ranks 0 and 1 for these two, 2 and 3 for those."""
    pairs = [DeviceMesh("cpu", [first, first + 1]) for first in range(0, dist.get_world_size() - 1, 2)]
    return pairs[dist.get_rank() // 2]


def mlp(width):
    return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8), nn.LayerNorm(8))


def fsdp2(width):
    model = mlp(width)
    fully_shard(model[0])
    fully_shard(model)
    return list(model.parameters())


def fsdp2_columns():
    model = nn.Linear(8, 4, bias=False)
    fully_shard(model, shard_placement_fn=lambda _: Shard(1))
    return list(model.parameters())


def hsdp():
    model = mlp(5)
    fully_shard(model, mesh=mesh_of(2, 2))
    return list(model.parameters())


TP_PLAN = {"0": ColwiseParallel(), "1": RowwiseParallel()}


def tp():
    # The weight of the norm and the second bias are plain and Replicate
    return list(parallelize_module(mlp(6), mesh_of(dist.get_world_size()), TP_PLAN).parameters())


def tp_fsdp2():
    model = parallelize_module(mlp(12), mesh_of(2, 2)["inner"], TP_PLAN)
    fully_shard(model, mesh=mesh_of(2, 2)["outer"])
    kinds = {type(placement).__name__ for p in model.parameters() for placement in p.placements}
    assert "_StridedShard" in kinds, kinds
    return list(model.parameters())


def crossing_meshes():
    # Each rank knows three of the four ranks
    whole = mesh_of(2, 2)
    return [distribute_tensor(torch.zeros(3, 4), whole[name], [Shard(0)]) for name in ("outer", "inner")]


def nested_meshes():
    return [
        *fsdp2(5),
        distribute_tensor(torch.zeros(6, 4), mesh_of(2, 2)["inner"], [Shard(0)]),
        distribute_tensor(torch.zeros(6, 4), mesh_of(2, 2), [Replicate(), Replicate()]),
    ]


def plain_beside():
    return [*fsdp2(5), nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(2))]


def bfloat16():
    return [nn.Parameter(p.detach().bfloat16()) for p in plain_beside()]


def float64():
    return [nn.Parameter(p.detach().double()) for p in plain_beside()]


LAYOUTS = {
    "fsdp2 even": functools.partial(fsdp2, 8),
    "fsdp2 uneven": functools.partial(fsdp2, 5),
    "fsdp2 rows<ranks": functools.partial(fsdp2, 1),
    "fsdp2 columns": fsdp2_columns,
    "plain beside": plain_beside,
    "bfloat16": bfloat16,
    "float64": float64,
    "tp": tp,
    "hsdp": hsdp,
    "tp x fsdp2": tp_fsdp2,
    "nested meshes": nested_meshes,
}


def part_of(whole, param):
    """The elements of ``whole`` that this rank stores of ``param``."""
    if not isinstance(param, DTensor):
        return whole
    (chunk,) = param.__create_chunk_list__()
    return whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))]


def give_gradients(params, scale=1.0, edit=None):
    """Sets gradients, and returns plain stand-ins of the parameters that hold the whole ones."""
    generator = torch.Generator().manual_seed(5)
    references = []
    for index, param in enumerate(params):
        whole = scale * torch.randn(param.shape, generator=generator)
        if edit is not None:
            edit(index, whole)
        whole = whole.to(param.dtype)
        references.append(torch.zeros(param.shape, dtype=param.dtype))
        references[-1].grad = whole
        local = part_of(whole, param).clone()
        if isinstance(param, DTensor):
            local = DTensor.from_local(
                local, param.device_mesh, param.placements, shape=param.shape, stride=param.stride(), run_check=False
            )
        param.grad = local
    return references
