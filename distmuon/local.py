"""What this rank stores of the blocks of a plan: views of parameters, gradients and momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distmuon.binding import Part
from distmuon.comm.layout import local_gradient, local_tensor
from distmuon.flight import LocalParameter
from distmuon.plan.blocks import Block
from distmuon.plan.boxes import Box


def local_blocks(
    part: Part, active: Sequence[bool], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[int, LocalParameter]:
    """The plain tensors that a step of a part reads and writes, by place in the plan.

    Ranks whose gradients are in other placements than their parameters call this together.

    Args:
        part: Some of the optimizer's parameters.
        active: Which of its parameters take part.
        state: Of the optimizer.
    """
    # a parameter of many blocks is looked at once, as its gradient may have to be redistributed
    whole: dict[int, LocalParameter] = {}
    local = {}
    for place, entry in part.matrices.items():
        number = part.planned[place]
        if active[number]:
            if number not in whole:
                whole[number] = LocalParameter(
                    box=entry.fact.layout.box,
                    param=local_tensor(entry.param),
                    grad=local_gradient(entry.param),
                    momentum=local_tensor(state[entry.param]["momentum_buffer"]),
                )
            local[place] = _block_of(whole[number], part.blocks[place])
    return local


def _block_of(stored: LocalParameter, block: Block) -> LocalParameter:
    cut = block.cut
    if cut is None:
        return stored
    index, box = cut.index(stored.box), cut.box(stored.box)

    def view(tensor: Tensor) -> Tensor:
        return _stacked(tensor[index], cut.axis, box) if cut.head else tensor[index]

    grad = None if stored.grad is None else view(stored.grad)
    return LocalParameter(box, view(stored.param), grad, view(stored.momentum))


def _stacked(tensor: Tensor, axis: int, box: Box) -> Tensor:
    """Heads along an axis of a matrix as a stack of them."""
    if not box.numel:
        return tensor.new_empty(box.sizes)
    return tensor.unflatten(axis, (box.sizes[0], box.sizes[1 + axis])).movedim(axis, 0)
