"""The first step of a wave: momentum is blended where it lives, into what is sent to owners and what is kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from distmuon.flight import Flight, LocalParameter, at, packed, parts_by_group, read_words
from distmuon.groups import Group
from distmuon.numerics.update import blend_momentum
from distmuon.numerics.variants import takes_signs
from distmuon.plan.routes import Part


def blend_wave(
    flight: Flight,
    groups: Sequence[Group],
    local: Mapping[int, LocalParameter],
    *,
    whole: bool,
    elsewhere: Collection[int],
    foreach: bool,
) -> None:
    """Update the momentum averages, and fill the buffers of a wave with what is blended of them and the gradients.

    Second moments go into the same buffers, word by word.

    Args:
        flight: The wave.
        groups: All parameter groups of the optimizer.
        local: What this rank stores, by place in the plan.
        whole: What is kept goes straight to its place among the owned matrices.
        elsewhere: Parameters, by place in the plan, of which another rank alone has gradient and momentum.
        foreach: See :mod:`distmuon.numerics.elementwise`.
    """
    places: dict[tuple[int, bool], Tensor] = {}
    for part in flight.routes.kept:
        places[part.slot, part.moments] = flight.view(part) if whole else packed(flight.kept, part)

    def place(part: Part) -> Tensor | None:
        """Where a part goes; None: another rank that stores the same sends it."""
        return places.get((part.slot, part.moments)) if part.start is None else packed(flight.gather.send, part)

    held = []
    for part in flight.routes.held:
        number = flight.parameter(part)
        out = place(part)
        if not part.moments and number not in elsewhere:
            held.append(part)
        elif part.moments and out is not None:
            out.copy_(read_words(local[number], part.box, out.dtype))
    for index, parts in parts_by_group(flight, held).items():
        grads, buffers = [], []
        for part in parts:
            mine = local[flight.parameter(part)]
            buffer = at(mine.momentum, part.box, mine.box)
            buffers.append(buffer)
            grads.append(torch.zeros_like(buffer) if mine.grad is None else at(mine.grad, part.box, mine.box))
        blend_momentum(
            grads,
            buffers,
            [place(part) for part in parts],
            momentum=groups[index]["momentum"],
            nesterov=groups[index]["nesterov"],
            signs=takes_signs(groups[index]["variant"]),
            foreach=foreach,
        )
