"""What this rank stores of the blocks of a plan: views of parameters, gradients and momentum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distmuon.comm.layout import local_gradient, local_tensor
from distmuon.courses import Course
from distmuon.flight import LocalParameter
from distmuon.moments import STATE_KEY
from distmuon.plan.blocks import Block
from distmuon.plan.boxes import Box
from distmuon.plan.companions import Companion


def local_blocks(
    course: Course, active: Sequence[bool], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[int, LocalParameter]:
    """The plain tensors that a course reads and writes, by place in the plan.

    Ranks whose gradients are in other placements than their parameters call this together.

    Args:
        course: A plan of some of the optimizer's parameters.
        active: Which of these take part.
        state: Of the optimizer.
    """
    # a parameter of many blocks is looked at once, as its gradient may have to be redistributed
    whole: dict[int, LocalParameter] = {}
    local = {}
    for place, entry in course.matrices.items():
        number = course.planned[place]
        if active[number]:
            if number not in whole:
                whole[number] = LocalParameter(
                    box=entry.fact.layout.box,
                    param=local_tensor(entry.param),
                    grad=local_gradient(entry.param),
                    momentum=local_tensor(state[entry.param]["momentum_buffer"]),
                )
            mine = _block_of(whole[number], course.blocks[place])
            companion = course.pipeline.plan.parameters[place].companion
            if companion is not None:
                assert entry.fact.moments_layout is not None
                moments = local_tensor(state[entry.param][STATE_KEY])
                mine = _with_moments(mine, moments, entry.fact.moments_layout.box, companion)
            local[place] = mine
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


def _with_moments(block: LocalParameter, moments: Tensor, stored: Box, companion: Companion) -> LocalParameter:
    cut, box = companion.cut, companion.box_in(stored, companion.cut, companion.words)
    if cut is not None:
        inner = cut.box(stored)
        moments = _stacked(moments[cut.index(stored)], cut.axis, inner) if cut.head else moments[cut.index(stored)]
    return dataclasses.replace(block, moments=moments, moments_box=box)


def _stacked(tensor: Tensor, axis: int, box: Box) -> Tensor:
    """Heads along an axis of a matrix as a stack of them."""
    if not box.numel:
        return tensor.new_empty(box.sizes)
    return tensor.unflatten(axis, (box.sizes[0], box.sizes[1 + axis])).movedim(axis, 0)
