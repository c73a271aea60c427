"""A wave of buckets on its way through the step: what is known of it, and where its elements lie."""

from __future__ import annotations

from collections import deque
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
    """

    box: Box
    param: Tensor
    grad: Tensor | None
    momentum: Tensor


@dataclass
class Flight:
    """A wave on its way through the step.

    Attributes:
        matrices: All that this rank owns of it, 1-D; None before they are together and after they are sent.
        scatter: The leg of the updates that is on its way.
        legs: Those that have still to set out.
        staging: Copies it between host and device, where all that this rank stores of it is on the host.
        lifted: Where the copies to the device end.
        home: Updates of own matrices on their way to the host.
    """

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


def at(tensor: Tensor, box: Box, outer: Box) -> Tensor:
    """The elements ``box`` of a tensor that holds ``outer``."""
    return tensor if box == outer else tensor[box.within(outer)]


def packed(buffer: Tensor, part: Part) -> Tensor:
    """The elements of a part in a packed buffer."""
    assert part.start is not None
    return buffer[part.start : part.start + part.box.numel].view(part.box.sizes)
