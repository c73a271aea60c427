"""The largest of what all ranks have found, in one small all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from distmuon.comm.group import Mesh, ProcessGroup, common_ranks, distributed, group_of, mesh_ranks
from distmuon.comm.layout import as_dtensor
from distmuon.comm.waiting import waiting


def group_of_maxima(params: Sequence[Tensor], mesh: Mesh | None) -> ProcessGroup | None:
    """Which ranks have seen parts of one batch with these parameters.

    Reads meshes alone, which all ranks share. All of the ranks call this together the first time.

    Args:
        params: Plain tensors and DTensors.
        mesh: Over which plain parameters are replicated; None: not known.

    Returns:
        The group; None where this rank is alone.

    Raises:
        ValueError: for plain parameters whose replicas are not known, in a job of several ranks.
    """
    if not distributed() or dist.get_world_size() == 1:
        return None
    sharded = [tensor for tensor in map(as_dtensor, params) if tensor is not None]
    if mesh is None and len(sharded) < len(params):
        raise ValueError(
            f"QK-Clip finds plain parameters in a job of {dist.get_world_size()} ranks and does not know which ranks "
            "hold copies of them, which all have to be scaled alike: give it the DistributedDataParallel module, or "
            "mesh=, the mesh or process group of the copies (of this rank alone if there are none)."
        )
    meshes: list[Mesh] = list(dict.fromkeys(tensor.device_mesh for tensor in sharded))
    if len(sharded) < len(params) and mesh is not None:
        meshes.append(mesh)
    ranks = common_ranks(mesh_ranks(one) for one in meshes)
    return group_of(ranks, meshes) if ranks else None


def largest_over_ranks_(values: Tensor, group: ProcessGroup, what: str) -> None:
    """Replace numbers by the largest that any rank has at their place.

    Args:
        values: Without NaN, which reductions keep or lose by the order of ranks; where the group talks.
        group: The ranks.
        what: What they are, in the words of an error.

    Raises:
        RuntimeError: if the ranks do not come together.
    """
    with waiting(group, what):
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
