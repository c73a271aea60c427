"""Which ranks step together, and the process group that they talk over."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon.comm.waiting import waiting

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ProcessGroup: TypeAlias = dist.ProcessGroup
Mesh: TypeAlias = "DeviceMesh | ProcessGroup"

# torch gives a group of some ranks that was made twice one name, so each is made once; they die with their world
_MADE: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[tuple[int, ...], str], dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)
_SPLIT: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None]] = (
    weakref.WeakKeyDictionary()
)


def distributed() -> bool:
    """Whether this process has a process group."""
    return dist.is_available() and dist.is_initialized()


def host() -> str:
    """What ranks of one node have in common: the machine, and the agent that started them where one did."""
    agent = os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", ""))
    return f"{socket.gethostname()} {agent}"


def own_rank() -> int:
    """The global rank of this process, 0 without a process group."""
    return dist.get_rank() if distributed() else 0


def mesh_ranks(mesh: Mesh) -> tuple[int, ...]:
    """The global ranks of a mesh or process group, ascending."""
    if isinstance(mesh, dist.ProcessGroup):
        return tuple(sorted(dist.get_process_group_ranks(mesh)))
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def is_last(group: ProcessGroup | None) -> bool:
    """Whether this process is the last one of a group; of none, yes."""
    return group is None or dist.get_rank(group) == dist.get_world_size(group) - 1


def check_mesh(argument: str, mesh: object) -> None:
    """Refuse what is no mesh of one axis before a step reads it, on this rank alone.

    Raises:
        TypeError: for anything but a device mesh, a process group and None.
        ValueError: for a mesh of several axes.
    """
    if mesh is None or isinstance(mesh, dist.ProcessGroup):
        return
    if not hasattr(mesh, "get_group"):  # DeviceMesh takes long to import, and most programs have none
        raise TypeError(
            f"{argument}={mesh!r} is a {type(mesh).__name__}: it takes a DeviceMesh, such as mesh['dp'], or a process "
            "group, such as torch.distributed.group.WORLD after init_process_group."
        )
    axes = getattr(mesh, "ndim", 1)
    if axes != 1:
        raise ValueError(f"{argument} is a mesh of {axes} axes: pass one of them, such as mesh['dp'].")


def as_group(mesh: Mesh) -> ProcessGroup:
    """The process group of a mesh of one axis."""
    return mesh if isinstance(mesh, dist.ProcessGroup) else mesh.get_group()


def replicas_of(model: object) -> ProcessGroup | None:
    """The process group of a DistributedDataParallel model, compiled or not; None for anything else."""
    while isinstance(model, nn.Module) and [name for name, _ in model.named_children()] == ["_orig_mod"]:
        (model,) = model.children()
    return model.process_group if isinstance(model, DistributedDataParallel) else None


def common_ranks(rank_sets: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The ranks that have to step together, from the rank sets of all parameters that are not local.

    That is the set that holds all others, and all ranks of the job where none does: with tensor
    parallelism inside data parallelism over separate meshes, each rank sees two sets that only together
    reach everybody.
    """
    sets = {ranks for ranks in rank_sets if len(ranks) > 1}
    if not sets:
        return ()
    union = {rank for ranks in sets for rank in ranks}
    largest = max(sets, key=len)
    return largest if set(largest) == union else tuple(range(dist.get_world_size()))


def group_of(ranks: tuple[int, ...], meshes: Iterable[Mesh]) -> dist.ProcessGroup:
    """A process group of exactly these ranks: that of a mesh or the job if there is one, else a new one.

    All of the ranks call this together.
    """
    for mesh in meshes:
        if mesh_ranks(mesh) != ranks:
            continue
        if isinstance(mesh, dist.ProcessGroup):
            return mesh
        for axis in range(mesh.ndim):
            if mesh.size(axis) == len(ranks):  # the other axes have one rank each
                return mesh.get_group(axis)
    return _group_of_exactly(ranks)


def team_group(teams: Sequence[tuple[int, ...]], group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The process group of that one of ``teams`` which this rank is in; None if it is in none.

    Args:
        teams: Global ranks; no two have one in common.
        group: Of all ranks that call this together with the same teams.
    """
    mine = next((ranks for ranks in teams if own_rank() in ranks), None)
    members = dist.get_process_group_ranks(group)
    if teams == [tuple(members)]:
        return group
    if default_group().bound_device_id is None or dist.get_backend(group) != "nccl":
        return None if mine is None else _group_of_exactly(mine, dist.get_backend_config(group), group)
    # a communicator of NCCL that is up already is split by all of its ranks together
    made = _SPLIT.setdefault(group, {})
    key = tuple(teams)
    if key not in made:
        made[key] = dist.split_group(group, [[members.index(rank) for rank in ranks] for ranks in teams])
    return made[key]


def _group_of_exactly(
    ranks: tuple[int, ...], backend: str | None = None, beside: dist.ProcessGroup | None = None
) -> dist.ProcessGroup:
    """A process group of these ranks, that of the job or a new one; they call this together.

    Args:
        ranks: Global ranks, ascending.
        backend: As :func:`torch.distributed.get_backend_config` names it; None: that of the job.
        beside: The group whose time-out a new one gets; None: that of the job.
    """
    world = default_group()
    usual = dist.get_backend_config(world)
    backend = backend or usual
    if len(ranks) == dist.get_world_size() and backend == usual:
        return world
    made = _MADE.setdefault(world, {})
    if (ranks, backend) not in made:
        other = None if backend == usual else backend
        # only these ranks are here to make it: others may belong to another stage of a pipeline
        made[ranks, backend] = dist.new_group(list(ranks), backend=other, use_local_synchronization=True)
    timeout = timeout_of(beside or world)
    if timeout is not None:
        # torch's own is 30 minutes on gloo, whatever the group that it is made beside
        made[ranks, backend].set_timeout(timeout)
    return made[ranks, backend]


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """After which a group gives up; torch says it in a private place only, and None is told where it does not."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    for kind in reversed(kinds):  # accelerators come last, and a group may name some that this machine lacks
        with contextlib.suppress(AttributeError, RuntimeError):
            found: timedelta = group._get_backend(torch.device(kind)).options._timeout
            return found
    return None


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where small tensors of a group live: on the host if it reaches that, else on the accelerator."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def default_group() -> dist.ProcessGroup:
    """The group of all ranks of the job."""
    world = dist.group.WORLD
    assert world is not None, "callers have asked distributed() before"
    return world


def compute_device(meshes: Iterable[Mesh], stored: torch.device | None) -> torch.device:
    """Where matrices are gathered and multiplied: on the devices of the mesh.

    Args:
        meshes: Of the parameters.
        stored: Where parameters lie, if there are any; on the host under FSDP's CPU offload, whose mesh is
            one of accelerators nevertheless.
    """
    if stored is not None and stored.type != "cpu":
        return stored
    for mesh in meshes:
        if not isinstance(mesh, dist.ProcessGroup) and mesh.device_type != "cpu":
            return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
    return torch.device("cpu")


def sum_over_ranks(numbers: Sequence[int], group: dist.ProcessGroup, device: torch.device, what: str) -> list[int]:
    """Add up one list of whole numbers per rank, place by place; every rank gets the sums.

    Args:
        numbers: As many on every rank; of 64 bits, as their sums are.
        group: The ranks.
        device: Where tensors of the group live.
        what: What the sums are for, in the words of an error.

    Raises:
        RuntimeError: if the ranks do not come together.
    """
    tensor = torch.tensor(list(numbers), dtype=torch.int64, device=_talks(group, device))
    with waiting(group, what):
        dist.all_reduce(tensor, group=group)
        sums: list[int] = tensor.tolist()
    return sums


def from_every_rank(value: object, group: dist.ProcessGroup) -> list:
    """The picklable ``value`` of every rank, in the order of ``group``'s ranks."""
    values: list = [None] * dist.get_world_size(group)
    with waiting(group, "a comparison of all ranks"):
        dist.all_gather_object(values, value, group=group)
    return values


def broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
    """Overwrite ``tensor`` on all ranks by that of the global rank ``source``."""
    with waiting(group, f"momentum of rank {source}"):
        dist.broadcast(tensor, src=source, group=group)


def warm_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """Make all connections of an all-to-all now, at a known place, rather than inside the first exchange."""
    size = dist.get_world_size(group)
    with waiting(group, "the first exchange, which connects all ranks"):
        dist.all_to_all_single(torch.empty(size, device=device), torch.zeros(size, device=device), group=group)


def prefers_all_gather(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether an all-gather is the better way to hand everybody the same.

    NCCL sends it around a ring, so it crosses between nodes once; gloo copies so much that an all-to-all
    of the same bytes takes a fifth of the time.
    """
    return device.type != "cpu" and dist.get_backend(group) != "gloo"


def all_gather(output: Tensor, part: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Asynchronous all-gather of equal 1-D parts into ``output``."""
    # torch 2.13 renamed it and warns of the old name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(output, part, group=group, async_op=True)
    return work


def _talks(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """The host where the group reaches it, since a number read back from an accelerator waits for it."""
    has_cpu = "cpu" in dist.get_backend_config(group)
    return torch.device("cpu") if has_cpu else device
