"""A wave of buckets on its way through the step: what is known of it, and where its elements lie."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmuon.comm.exchange import Transfer
from distmuon.plan.boxes import Box
from distmuon.plan.plan import Plan
from distmuon.plan.routes import Leg, Part, Routes
from distmuon.plan.waves import Wave
from distmuon.staging import Arrival, Mark, Staging


@dataclass(frozen=True)
class LocalParameter:
    """What this rank stores of a parameter, as plain tensors that share its memory.

    Attributes:
        box: Which elements these are.
        param: The weights, of shape ``box.sizes``.
        grad: Their gradient; None where this rank has none and others have: it counts as zero.
        momentum: Their momentum average.
        moments: Their second moments; None: there are none.
        moments_box: Which words of all second moments these are.
    """

    box: Box
    param: Tensor
    grad: Tensor | None
    momentum: Tensor
    moments: Tensor | None = None
    moments_box: Box | None = None


@dataclass
class Flight:
    """A wave on its way through the step.

    Attributes:
        plan: What it is of.
        matrices: All that this rank owns of it, 1-D; None before they are together and after they are sent.
        scatter: The leg of the updates that is on its way.
        legs: Those that have still to set out.
        staging: Copies it between host and device, where all that this rank stores of it is on the host.
        lifted: Where the copies to the device end.
        home: Updates of own matrices on their way to the host.
    """

    plan: Plan
    wave: Wave
    routes: Routes
    kept: Tensor
    gather: Transfer
    matrices: Tensor | None = None
    scatter: tuple[Leg, Transfer] | None = None
    legs: deque[Leg] = field(default_factory=deque)
    staging: Staging | None = None
    lifted: Mark | None = None
    home: Arrival | None = None

    def parameter(self, part: Part) -> int:
        """The parameter of a part, by place in the plan."""
        return self.wave.assignments[part.slot].parameter

    def view(self, part: Part) -> Tensor:
        """The elements of a part among the owned matrices and their companions."""
        assert self.matrices is not None
        assignment = self.wave.assignments[part.slot]
        spec = self.plan.parameters[assignment.parameter]
        outer = assignment.box(spec)
        if part.moments:
            assert spec.companion is not None
            outer = spec.companion.box_of(assignment.first, assignment.count)
        start = self.routes.place[part.slot, part.moments]
        return at(self.matrices[start : start + outer.numel].view(outer.sizes), part.box, outer)


def parts_by_group(flight: Flight, parts: Sequence[Part]) -> dict[int, list[Part]]:
    """Parts by the index of their parameter group, which has their hyperparameters."""
    found: dict[int, list[Part]] = {}
    for part in parts:
        found.setdefault(flight.plan.parameters[flight.parameter(part)].group, []).append(part)
    return found


def in_words(plan: Plan, wave: Wave, direction: str, dtype: torch.dtype, step: int) -> str:
    """An exchange in words that are the same on every rank.

    Args:
        plan: The plan.
        wave: One of its waves.
        direction: ``"gather"`` or ``"update"``.
        dtype: Of what travels.
        step: Which one it is since the optimizer was made.
    """
    specs = [plan.parameters[number] for number in {a.parameter: None for a in wave.assignments}]
    more = f" and {len(specs) - 1} more" if len(specs) > 1 else ""
    numel = sum(assignment.box(plan.parameters[assignment.parameter]).numel for assignment in wave.assignments)
    return (
        f"the exchange of the bucket of {specs[0].name!r} {specs[0].shape}{more} ({direction} of "
        f"{numel * dtype.itemsize:,} bytes, wave {plan.waves.index(wave) + 1} of {len(plan.waves)} in step {step})"
    )


def read_words(mine: LocalParameter, box: Box, dtype: torch.dtype) -> Tensor:
    """The words ``box`` of second moments, bit by bit as numbers of ``dtype``."""
    assert mine.moments is not None and mine.moments_box is not None
    return at(_block_of_memory(mine.moments).view(dtype), box, mine.moments_box)


def write_words(mine: LocalParameter, box: Box, words: Tensor) -> None:
    """Put words of second moments where they belong; the inverse of :func:`read_words`."""
    assert mine.moments is not None and mine.moments_box is not None
    whole = _block_of_memory(mine.moments)
    at(whole.view(words.dtype), box, mine.moments_box).copy_(words)
    if whole is not mine.moments:
        mine.moments.copy_(whole)


def _block_of_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose last axis can be viewed in words; one of length 1 may have any stride."""
    whole = tensor.is_contiguous() and tensor.stride(-1) == 1
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def at(tensor: Tensor, box: Box, outer: Box) -> Tensor:
    """The elements ``box`` of a tensor that holds ``outer``."""
    return tensor if box == outer else tensor[box.within(outer)]


def packed(buffer: Tensor, part: Part) -> Tensor:
    """The elements of a part in a packed buffer."""
    assert part.start is not None
    return buffer[part.start : part.start + part.box.numel].view(part.box.sizes)
