"""The only reader of parameters: from what a model holds to plain local tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distmuon.comm.group import Mesh, mesh_ranks, own_rank
from distmuon.plan.boxes import Box

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_parameter(name: str, param: Tensor) -> None:
    """Refuse parameters that no algorithm of this package can update.

    Args:
        name: For the message.
        param: A parameter, plain or DTensor.

    Raises:
        TypeError: for complex, sparse, quantized, integer and 8-bit parameters.
    """
    advice = "leave it out of the optimizer, or keep a floating-point master copy to optimize"
    if param.is_complex():
        raise TypeError(f"parameter {name!r} is complex ({param.dtype}): use torch.view_as_real, or {advice}.")
    if param.layout is not torch.strided:
        raise TypeError(f"parameter {name!r} has the layout {param.layout}, not a dense one: {advice}.")
    if param.is_quantized or not param.dtype.is_floating_point or param.dtype.itemsize < 2:
        raise TypeError(f"parameter {name!r} is quantized ({param.dtype}): {advice}.")


@dataclass(frozen=True)
class LocalLayout:
    """What this rank knows of a parameter before it has talked to others.

    Attributes:
        shape: The global shape.
        dtype: The dtype, such as ``"float32"``.
        device: The device type.
        ranks: The global ranks that store it together, ascending; one rank: it is this rank's own.
        replica: Coordinates on the replicated axes of its mesh.
        box: What this rank stores.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    ranks: tuple[int, ...]
    replica: tuple[int, ...]
    box: Box


def read_layout(name: str, param: Tensor, mesh: Mesh | None) -> LocalLayout:
    """Find out what this rank stores of a parameter.

    Args:
        name: For messages.
        param: Plain or DTensor.
        mesh: Over which plain parameters are replicated; None: they are this rank's own.

    Raises:
        ValueError: for a DTensor that is not made of shards and replicas, or stores more than one box here.
    """
    shape, rank = tuple(param.shape), own_rank()
    dtype, device = str(param.dtype).removeprefix("torch."), param.device.type
    dtensor = as_dtensor(param)
    if dtensor is None:
        ranks = (rank,) if mesh is None else mesh_ranks(mesh)
        # copies are told apart by a coordinate, as on the replicated axis of a mesh
        return LocalLayout(shape, dtype, device, ranks, (ranks.index(rank),), Box.whole(shape))
    for placement in dtensor.placements:
        if placement.is_partial():
            raise ValueError(
                f"parameter {name!r} has the placements {dtensor.placements}, and sums that are still to be reduced "
                "cannot be optimized: redistribute it to Replicate() or Shard(dim) first."
            )
    device_mesh = dtensor.device_mesh
    coordinate = device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"parameter {name!r} lives on the mesh of ranks {mesh_ranks(device_mesh)}, and rank {rank} is not among "
            "them: give the optimizer of this rank its own parameters only."
        )
    replica = tuple(
        int(place) for place, placement in zip(coordinate, dtensor.placements, strict=True) if placement.is_replicate()
    )
    with torch.no_grad():
        stored = tuple(dtensor.to_local().shape)
    chunks = dtensor.__create_chunk_list__()
    boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
    if not boxes and 0 in stored:
        boxes = [Box((0,) * len(shape), stored)]
    if len(boxes) != 1 or boxes[0].sizes != stored:
        raise ValueError(
            f"parameter {name!r} with the placements {dtensor.placements} stores {stored} on rank {rank}, which is "
            f"not one box of it ({boxes}): shard it by torch's Shard and Replicate placements."
        )
    return LocalLayout(shape, dtype, device, mesh_ranks(device_mesh), replica, boxes[0])


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a DTensor, else None."""
    if type(tensor) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor  # slow to import, and most programs hold none

    return tensor if isinstance(tensor, DTensor) else None


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank stores of ``tensor``, as a plain tensor that shares its memory; call it under no_grad."""
    dtensor = as_dtensor(tensor)
    return tensor.detach() if dtensor is None else dtensor.to_local()


def lay_out(what: str, value: Tensor, param: Tensor) -> Tensor:
    """Give a loaded tensor the layout of its parameter, without talking to other ranks.

    Args:
        what: For the message.
        value: Of the parameter's global shape: whole, or laid out as the parameter is.
        param: The parameter.

    Raises:
        ValueError: if it is laid out in another way.
    """
    theirs, ours = as_dtensor(value), as_dtensor(param)
    if ours is None and theirs is None:
        return value
    if theirs is not None and ours is not None and _laid_out_alike(theirs, ours):
        return value
    if theirs is not None or ours is None:
        layouts = ["a plain tensor" if t is None else f"{t.placements} on {t.device_mesh}" for t in (theirs, ours)]
        raise ValueError(
            f"{what} is {layouts[0]} and the parameter {layouts[1]}: save and load over other layouts with "
            "torch.distributed.checkpoint and its get_optimizer_state_dict and set_optimizer_state_dict."
        )
    from torch.distributed.tensor import DTensor

    box = read_layout(what, param, None).box
    mine = value[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))]
    local = mine.to(param.device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, ours.device_mesh, ours.placements, run_check=False, shape=ours.shape, stride=ours.stride()
    )


def laid_out_beside(param: Tensor, local: Tensor, shape: Sequence[int], *, whole_axes: Sequence[int]) -> Tensor:
    """Make a tensor of as many axes as a parameter from what this rank stores of it, without talking to other ranks.

    Args:
        param: Plain or DTensor.
        local: Of this rank.
        shape: Of the whole tensor.
        whole_axes: What shards the parameter along these replicates the tensor, which is sharded alike along others.

    Returns:
        ``local`` itself beside a plain parameter.
    """
    dtensor = as_dtensor(param)
    if dtensor is None:
        return local
    from torch.distributed.tensor import DTensor, Replicate

    placements = [
        # strided shards have no public class, but their axis
        Replicate() if getattr(placement, "dim", None) in whole_axes else placement
        for placement in dtensor.placements
    ]
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local, dtensor.device_mesh, placements, run_check=False, shape=size, stride=stride)


def _laid_out_alike(a: DTensor, b: DTensor) -> bool:
    return a.placements == b.placements and torch.equal(a.device_mesh.mesh, b.device_mesh.mesh)


def check_gradient(name: str, param: Tensor, grad: Tensor) -> bool:
    """Look at a gradient without talking to other ranks.

    Args:
        name: Of the parameter, for messages.
        param: The parameter.
        grad: Its gradient.

    Returns:
        Whether it has to be redistributed first: sequence parallelism, for one, leaves gradients that are
        still to be summed over an axis of the mesh.

    Raises:
        TypeError: for a sparse gradient, or one that is a DTensor where the parameter is not.
        ValueError: for a gradient of another shape.
    """
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name!r} has the layout {grad.layout}: build the layer with sparse=False, or put "
            "the parameter in an optimizer made for sparse gradients."
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {name!r} has shape {tuple(grad.shape)} and the parameter {tuple(param.shape)}: a "
            "gradient is set for the whole parameter."
        )
    theirs, ours = as_dtensor(grad), as_dtensor(param)
    if (theirs is None) != (ours is None):
        kinds = ["a plain tensor" if tensor is None else "a DTensor" for tensor in (theirs, ours)]
        raise TypeError(f"the gradient of {name!r} is {kinds[0]} and the parameter {kinds[1]}: make them alike.")
    return theirs is not None and ours is not None and theirs.placements != ours.placements


def local_gradient(param: Tensor) -> Tensor | None:
    """What this rank stores of a parameter's gradient, as a plain tensor; None where it has none.

    A gradient in other placements than its parameter is redistributed, by all ranks of the mesh together.
    """
    grad = param.grad
    if grad is None:
        return None
    theirs, ours = as_dtensor(grad), as_dtensor(param)
    if theirs is not None and ours is not None and theirs.placements != ours.placements:
        grad = theirs.redistribute(ours.device_mesh, ours.placements)
    return local_tensor(grad)
