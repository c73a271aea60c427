"""The step of lmo groups: of unit size in a norm, by the momentum average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distmuon.comm.layout import local_gradient, local_tensor
from distmuon.comm.sums import add_over_ranks_
from distmuon.facts import Entry
from distmuon.groups import Group
from distmuon.numerics.lmo import squares_along, unit_step, wide_dtype
from distmuon.numerics.update import apply_direction, blend_momentum
from distmuon.participation import Turn


def step_units(turn: Turn, groups: Sequence[Group], state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Update what has an ``lmo``, each rank its own shard.

    Norms are those of whole vectors: where ranks store parts of them, sums of squares of all parameters are added up
    in one all-reduce, which all ranks of the part enter if any such parameter takes part.

    Raises:
        RuntimeError: if the ranks do not come together.
    """
    part = turn.part
    waiting: dict[int, tuple[Entry, Tensor]] = {}
    squares: dict[int, Tensor] = {}
    for number, entry in part.entries.items():
        if not turn.active[number] or entry.fact.lmo is None:
            continue
        group = groups[entry.fact.group]
        average = _average(entry, group, state)
        mine = None if entry.fact.lmo == "sign" else squares_along(average, entry.fact.norm_axes)
        if number in part.sums:
            assert mine is not None
            waiting[number], squares[number] = (entry, average), mine
        else:
            _apply(entry, average, mine, group)
    _add_up(turn, squares)
    for number, (entry, average) in waiting.items():
        _apply(entry, average, squares[number], groups[entry.fact.group])


def _average(entry: Entry, group: Group, state: Mapping[Tensor, Mapping[str, Any]]) -> Tensor:
    """Blend the gradient into the momentum average; returns that, or with Nesterov both blended once more."""
    buffer = local_tensor(state[entry.param]["momentum_buffer"])
    grad = local_gradient(entry.param)
    out = torch.empty_like(buffer) if group["nesterov"] else None
    blend_momentum(
        # a shard whose gradient other ranks have takes part with zeros
        [torch.zeros_like(buffer) if grad is None else grad],
        [buffer],
        [out],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        foreach=False,
    )
    return buffer if out is None else out


def _apply(entry: Entry, average: Tensor, squares: Tensor | None, group: Group) -> None:
    assert entry.fact.lmo is not None
    reading = entry.fact.reading
    update = unit_step(
        entry.fact.lmo,
        average,
        squares,
        entry.fact.layout.shape,
        flatten=reading.flatten,
        transposed=reading.transposed,
        eps=group["eps"],
    )
    apply_direction(
        [local_tensor(entry.param)],
        [update],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        scale=1.0,
        foreach=False,
        cautious_wd=group["cautious_wd"],
    )


def _add_up(turn: Turn, squares: dict[int, Tensor]) -> None:
    """Replace this rank's sums by those of whole vectors, where any that take part are cut."""
    part = turn.part
    cut = {number: found for number, found in part.sums.items() if turn.active[number]}
    if not cut:
        return
    assert part.group is not None
    rank, device = part.pipeline.rank, part.pipeline.device
    lengths = [found.whole.numel for found in cut.values()]
    packet = torch.zeros(sum(lengths), dtype=wide_dtype(device), device=device)
    pieces = dict(zip(cut, packet.split(lengths), strict=True))
    mine = {}
    for number in squares:
        found = cut[number]
        if rank in found.places:
            whole = pieces[number].view(found.whole.sizes)
            mine[number] = whole[found.places[rank].within(found.whole)]
            if rank in found.adds:
                mine[number].copy_(squares[number])
    add_over_ranks_(packet, part.group, "the norms of vectors that ranks store parts of")
    for number, sums in mine.items():
        squares[number] = sums.to(squares[number].device)
