"""The norm of all gradients together, each element counted once wherever it is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon.comm.group import default_group, device_of, distributed, group_of, mesh_ranks
from distmuon.comm.layout import as_dtensor
from distmuon.comm.waiting import waiting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Owners: TypeAlias = "Mapping[Tensor, int]"

_WAIT = "the norm of all gradients"


@dataclass(frozen=True)
class Reduction:
    """Who takes part in the collective of a norm, on which device, and what this rank leaves to others.

    ``counted_elsewhere`` are meshes of parameters that other ranks of the group hold too, and count.
    """

    group: ProcessGroup
    device: torch.device
    counted_elsewhere: frozenset[DeviceMesh] = frozenset()


def plan_reduction(parameters: Sequence[Tensor], owners: Owners | None = None) -> Reduction | None:
    """Decide whether the norm needs a collective, and among whom.

    Reads placements, meshes and owners only, which all ranks share, and never a gradient, which a rank may lack.

    Args:
        parameters: Plain tensors and DTensors of any meshes.
        owners: See :func:`distmuon.clip_grad_norm_`.

    Returns:
        None where every rank has all it needs. Otherwise a group of the ranks of the mesh that contains the others;
        the default group where meshes cross, or ``owners`` names a plain parameter.

    Raises:
        ValueError: for an owner that is no rank of the default group.
        RuntimeError: on a rank that is in none of the meshes while they leave out others too.
    """
    together = distributed()
    _check_owners(owners, dist.get_world_size() if together else 1)
    if not together:
        return None
    meshes = list(dict.fromkeys(tensor.device_mesh for tensor in map(as_dtensor, parameters) if tensor is not None))
    owned = [p for p in parameters if owners is not None and p in owners and as_dtensor(p) is None]
    if meshes:
        # A mesh's own device type, since offloaded shards lie on a CPU that the group may not serve.
        device = torch.device(meshes[0].device_type)
    elif owned:
        device = owned[0].device
    else:
        return None
    elsewhere = frozenset(mesh for mesh in meshes if any(_repeats(mesh, other) for other in meshes))
    return Reduction(default_group() if owned else _group_of(meshes), device, elsewhere)


def total_norm(
    parameters: Sequence[Tensor],
    norm_type: float,
    reduction: Reduction,
    owners: Owners | None = None,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all gradients as one vector, by one all-reduce of at most three numbers.

    An element of a DTensor is counted by the rank that stores it and has the coordinate 0 on every axis that replicates
    it: an axis of its own mesh, or one that its mesh lacks as a slice of another parameter's mesh (a norm that FSDP2
    shards over ``mesh["dp"]`` beside layers on ``mesh["dp", "tp"]``). A plain gradient is taken for replicated: what
    counts is the mean, over the ranks that hold plain gradients, of their sums, so it does not matter which rank has
    none. One that ``owners`` names counts on its owner alone.

    Args:
        parameters: Plain tensors and DTensors; a gradient may be None on any rank.
        norm_type: The order p, positive or infinite.
        reduction: From :func:`plan_reduction` of the same parameters.
        owners: See :func:`distmuon.clip_grad_norm_`.
        foreach: As in :func:`torch.nn.utils.get_total_norm`.

    Returns:
        A plain 0-d tensor on the device of ``reduction``, the same on all its ranks: float32, or float64 where a
        parameter is. Gradients in 16 bits are summed in float32, where torch rounds each norm to 16 bits.

    Raises:
        ValueError: for an order that is not positive.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type}: over several ranks, give a positive order or inf.")
    counted: list[Tensor] = []
    replicated: list[Tensor] = []
    for param in parameters:
        if param.grad is None:
            continue
        grad = as_dtensor(param.grad)
        if grad is not None:
            counted.extend(_counted_part(grad, reduction.counted_elsewhere))
        elif owners is None or param not in owners:
            replicated.append(param.grad)
        elif owners[param] == dist.get_rank():
            counted.append(param.grad)
    norms = [_norm(tensors, norm_type, reduction.device, foreach) for tensors in (counted, replicated)]
    if math.isinf(norm_type):
        total = _largest(torch.stack(norms).amax(), reduction.group)
    else:
        total = _root_of_sum(norms[0], norms[1], bool(replicated), norm_type, reduction.group)
    # The parameters say the dtype, for a rank without gradients has to return the same one.
    dtype = torch.float32
    for param in parameters:
        dtype = torch.promote_types(dtype, param.dtype.to_real() if param.dtype.is_complex else param.dtype)
    return total.to(dtype)


def over_stages(total: Tensor, norm_type: float, stages: ProcessGroup) -> Tensor:
    """The norm of the gradients of all stages of a pipeline, from that of each.

    Args:
        total: Of this stage, 0-d.
        norm_type: The order p, positive or infinite.
        stages: One rank of each stage.

    Returns:
        On the device of ``total``, float32 or wider.

    Raises:
        ValueError: for an order that is not positive.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type}: over several ranks, give a positive order or inf.")
    device = device_of(stages)
    wide = total.to(device, torch.float64 if device.type in ("cpu", "cuda") else torch.float32)
    if math.isinf(norm_type):
        norm = _largest(wide, stages)
    else:
        sums = wide**norm_type
        with waiting(stages, _WAIT):
            dist.all_reduce(sums, group=stages)
        norm = sums ** (1.0 / norm_type)
    return norm.to(total.device, torch.promote_types(total.dtype, torch.float32))


def local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """What this rank stores of each gradient that it has, sharing memory with it.

    Returns:
        Plain tensors, in the order of ``parameters``; no empty ones.
    """
    local = []
    for param in parameters:
        if param.grad is not None:
            grad = as_dtensor(param.grad)
            local.append(param.grad if grad is None else grad.to_local())
    return [tensor for tensor in local if tensor.numel()]


def _check_owners(owners: Owners | None, world_size: int) -> None:
    for param, owner in (owners or {}).items():
        if not 0 <= owner < world_size:
            raise ValueError(
                f"owners gives a parameter of shape {tuple(param.shape)} to rank {owner}, but the default group has "
                f"{world_size} ranks: give a rank from 0 to {world_size - 1}."
            )


def _repeats(mesh: DeviceMesh, other: DeviceMesh) -> bool:
    """Whether ``other`` has axes that replicate parameters on ``mesh``, and this rank is not the first on all of them.

    Names of axes tell a slice of a grid of ranks, beside which other slices hold the same, from a mesh of its own,
    beside which others hold other parameters (experts).
    """
    names, others, coordinate = mesh.mesh_dim_names, other.mesh_dim_names, other.get_coordinate()
    if names is None or others is None or coordinate is None:
        return False
    ranks, other_ranks = set(mesh_ranks(mesh)), set(mesh_ranks(other))
    is_slice = ranks < other_ranks and set(names) < set(others)
    crosses = not ranks <= other_ranks and not other_ranks <= ranks
    lacking = [at for at, name in zip(coordinate, others, strict=True) if name not in names]
    return (is_slice or crosses) and any(at != 0 for at in lacking)


def _group_of(meshes: list[DeviceMesh]) -> ProcessGroup:
    """The group of all ranks that any of the meshes has."""
    members = [mesh_ranks(mesh) for mesh in meshes]
    union = tuple(sorted(set().union(*members)))
    if dist.get_rank() not in union:
        raise RuntimeError(
            f"rank {dist.get_rank()} clips DTensors of the ranks {list(union)} only, whose norm it cannot learn: pass "
            "on each rank the parameters that it stores."
        )
    if union not in members:
        # Meshes that cross: their ranks see different unions, and the default group is what they surely share.
        return default_group()
    return group_of(union, meshes)


def _counted_part(grad: DTensor, counted_elsewhere: frozenset[DeviceMesh]) -> list[Tensor]:
    """The elements of a gradient that this rank counts: its shard, or nothing."""
    if any(placement.is_partial() for placement in grad.placements):
        from torch.distributed.tensor import Replicate

        # Sequence parallelism leaves the gradients of norms as Partial; the norm of a sum needs the sum.
        grad = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
    coordinate = grad.device_mesh.get_coordinate()
    if coordinate is None or grad.device_mesh in counted_elsewhere:
        return []
    first = all(at == 0 for at, placement in zip(coordinate, grad.placements, strict=True) if placement.is_replicate())
    return [grad.to_local()] if first else []


def _norm(tensors: list[Tensor], norm_type: float, device: torch.device, foreach: bool | None) -> Tensor:
    """The norm of local tensors together as a 0-d tensor, in the dtype to add their powers in."""
    # Powers and roots in float64 leave float32 its last bits; not every accelerator has it.
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    terms = [
        # A norm counts in the total as its tensor does, so those of 16 bits are widened one by one.
        tensor if tensor.dtype.itemsize > 2 else torch.linalg.vector_norm(tensor, norm_type, dtype=torch.float32)
        for tensor in tensors
        if tensor.numel()
    ]
    if not terms:
        return torch.zeros((), dtype=dtype, device=device)
    return nn.utils.get_total_norm(terms, norm_type, foreach=foreach).to(device, dtype)


def _root_of_sum(
    counted: Tensor, replicated: Tensor, has_replicated: bool, norm_type: float, group: ProcessGroup
) -> Tensor:
    sums = counted.new_zeros(3)
    sums[0] = counted**norm_type
    if has_replicated:
        sums[1] = replicated**norm_type
        sums[2] = 1.0
    with waiting(group, _WAIT):
        dist.all_reduce(sums, group=group)
    total: Tensor = (sums[0] + sums[1] / sums[2].clamp(min=1.0)) ** (1.0 / norm_type)
    return total


def _largest(norm: Tensor, group: ProcessGroup) -> Tensor:
    # Reductions to the maximum lose NaN or keep it by the order of ranks, so it travels as a number of its own.
    packet = torch.stack([norm.nan_to_num(nan=math.inf, posinf=math.inf), norm.isnan().to(norm.dtype)])
    with waiting(group, _WAIT):
        dist.all_reduce(packet, op=dist.ReduceOp.MAX, group=group)
    return torch.where(packet[1] > 0, math.nan, packet[0])
