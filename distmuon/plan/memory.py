"""What a plan takes of each rank's memory, in elements."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distmuon.plan.plan import Plan
from distmuon.plan.schedule import Schedule
from distmuon.plan.schedule import schedule as schedule_of
from distmuon.plan.simulate_loads import LegLoad, WaveLoad, loads


@dataclass(frozen=True, slots=True)
class Memory:
    """Elements that one rank holds for the optimizer; of what size is for the caller to say.

    Attributes:
        momentum: Of the shards of all planned parameters, between steps too.
        buffers: Most at once while waves arrive, are computed and leave, in the dtype that travels.
    """

    momentum: int
    buffers: int


def memory(plan: Plan, *, schedule: Schedule | None = None, all_gather: bool = True) -> Mapping[int, Memory]:
    """What each rank of a plan holds, counted as :meth:`distmuon.pipeline.Pipeline.buffer_bytes` does.

    Temporary memory of the orthogonalization itself, a few squares of the short side, is not in it.

    Args:
        plan: What to do.
        schedule: When waves set out; None: that of the plan.
        all_gather: Whether updates of replicated buckets come back by an all-gather instead of an all-to-all.
    """
    order = schedule_of(plan) if schedule is None else schedule
    momentum = dict.fromkeys(plan.ranks, 0)
    for spec in plan.parameters:
        for holding in spec.holdings:
            momentum[holding.rank] += holding.box.numel
    waves = list(loads(plan, all_gather=all_gather))
    return {rank: Memory(momentum[rank], _peak(waves, place, order)) for place, rank in enumerate(plan.ranks)}


def _peak(waves: Sequence[WaveLoad], place: int, order: Schedule) -> int:
    """Most elements at once: as a wave is unpacked, while it is computed, and when its update leaves."""
    arriving = [_moved(load.gather, place) + load.kept[place] for load in waves]
    leaving = [_leaving(load, place) for load in waves]
    came = [0, *itertools.accumulate(arriving)]
    left = [0, *itertools.accumulate(leaving)]
    most = before = 0
    for number, load in enumerate(waves):
        own, begun, settled = load.owned[place], order.begun[number], order.settled[number]
        on_its_way = left[number] - left[before]
        ahead = came[max(begun, number + 1)] - came[number + 1]
        sent = left[number + 1] - left[settled]
        most = max(most, own + arriving[number] + on_its_way, own + ahead + max(on_its_way, sent))
        before = settled
    return most


def _leaving(load: WaveLoad, place: int) -> int:
    """Of several legs two are on their way at a time, and the matrices wait for the last one."""
    moved = sum(_moved(load.scatter.cut(part, load.legs), place) for part in range(min(2, load.legs)))
    return moved + (load.owned[place] if load.legs > 1 else 0)


def _moved(leg: LegLoad, place: int) -> int:
    """Elements of the send and the receive buffer of a rank."""
    if leg.gathered is not None:
        return leg.gathered * (1 + len(leg.sent[0]))
    return sum(numels[place] for numels in (*leg.sent, *leg.received))
