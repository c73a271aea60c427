"""Filling ranks with batches of pieces, by best fit under a target and by longest processing time first beyond it."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from distmuon.plan.pieces import Batch, Way

Counts: TypeAlias = tuple[tuple[int, ...], ...]
"""For each batch, how many of its pieces are owned in each of its ways."""
Placed: TypeAlias = dict[tuple[int, int], dict[int, int]]
"""By batch and way: pieces by unit."""


@dataclass
class Packing:
    """How many pieces of each batch every rank, or team, owns.

    Attributes:
        placed: By batch and way: pieces by unit.
        loads: Time by rank; ranks are places in the list.
        numels: Elements by rank, those of teams shared.
    """

    placed: Placed
    loads: list[int]
    numels: list[int]
    effort: int = field(default=0, compare=False)

    @functools.cached_property
    def makespan(self) -> int:
        """Time of the busiest rank."""
        return max(self.loads, default=0)

    @functools.cached_property
    def work(self) -> int:
        """Time of all ranks together."""
        return sum(self.loads)

    @functools.cached_property
    def most_numel(self) -> int:
        """Elements of the rank that owns most."""
        return max(self.numels, default=0)

    def excess(self, target: int) -> int:
        """Time beyond ``target`` of all ranks together."""
        return sum(load - target for load in self.loads if load > target)


def singles(batches: Sequence[Batch]) -> Counts:
    """All pieces to single owners."""
    return tuple((len(batch.pieces), *(0,) * (len(batch.ways) - 1)) for batch in batches)


@dataclass(frozen=True)
class Rule:
    """Which pieces go to the fullest rank that they fit on; all others go to the emptiest.

    Attributes:
        target: Time of a rank to stay within; 0: nothing fits.
        teams: Whether those of teams do.
        last: Only the first so many batches and ways do; None: all.
        narrow: Whether pieces that only some ranks may own come before all that any single rank may.
    """

    target: int
    teams: bool = True
    last: int | None = None
    narrow: bool = False


def pack(batches: Sequence[Batch], counts: Counts, rule: Rule, world: int) -> Packing:
    """Hand out the pieces: what cannot be chosen first, then large teams before small ones, costly before cheap.

    A piece goes to the fullest rank that it does not lift above the target (best fit decreasing, with which
    MULTIFIT of Coffman, Garey and Johnson 1978 stays within 13/11 of the best makespan); where there is none, or by
    rule, to the one with the least load, among equals to the one with the fewest elements, then to the first. With a
    target of 0 this is longest processing time first (Graham 1969: at most 4/3 of the best possible makespan).

    Args:
        batches: What is handed out.
        counts: In which ways.
        rule: What is fitted.
        world: Ranks are below this.
    """
    packing = Packing({}, [0] * world, [0] * world)
    loads, numels = packing.loads, packing.numels
    entries = [(b, w) for b, row in enumerate(counts) for w, number in enumerate(row) if number]
    widest = max((len(batches[b].ways[w].units) for b, w in entries), default=0) if rule.narrow else 0
    entries.sort(key=lambda entry: (*_urgency(batches[entry[0]].ways[entry[1]], widest), entry))
    for place, (b, w) in enumerate(entries):
        batch, way, left = batches[b], batches[b].ways[w], counts[b][w]
        units, cost, share = way.units, way.cost, -(-batch.numel // way.size)
        if way.size == 1:
            filled = [loads[unit[0]] for unit in units]
        else:
            filled = [max([loads[rank] for rank in unit]) for unit in units]
        taken: dict[int, int] = {}
        target = rule.target if rule.teams or way.size == 1 else 0
        room = target - cost
        packing.effort += len(units)
        if room >= 0 and (rule.last is None or place < rule.last) and min(filled) <= room:
            for u in sorted(range(len(units)), key=filled.__getitem__, reverse=True):
                if filled[u] <= room:
                    number = min(left, (target - filled[u]) // cost) if cost else left
                    taken[u] = number
                    filled[u] += number * cost
                    left -= number
                    if not left:
                        break
        if left:
            packing.effort += left
            # so many pieces reach no more than so many of the emptiest units
            limit = sorted(filled)[min(left, len(filled)) - 1]
            heap = [
                (load, max([numels[rank] for rank in units[u]]) + share * taken.get(u, 0), u)
                for u, load in enumerate(filled)
                if load <= limit
            ]
            heapq.heapify(heap)
            for _ in range(left):
                load, numel, u = heap[0]
                taken[u] = taken.get(u, 0) + 1
                filled[u] = load + cost
                heapq.heapreplace(heap, (load + cost, numel + share, u))
        for u, number in taken.items():
            for rank in units[u]:
                # teams run first and large ones before small ones, so no rank of one waits for another
                loads[rank] += number * cost
                numels[rank] += number * share
        packing.placed[b, w] = taken
    return packing


def _urgency(way: Way, widest: int) -> tuple[bool, int, bool, int]:
    """By which ways are ordered; with ``widest`` those of single owners with so many units come last."""
    return len(way.units) > 1, -way.size, len(way.units) == widest, -way.cost


def deal(batches: Sequence[Batch], world: int) -> Packing:
    """Single owners in turn, the costliest first."""
    packing = Packing({}, [0] * world, [0] * world)
    number = 0
    for b, batch in enumerate(batches):
        way = batch.ways[0]
        taken = packing.placed.setdefault((b, 0), {})
        for _ in batch.pieces:
            u = number % len(way.units)
            number += 1
            taken[u] = taken.get(u, 0) + 1
            packing.loads[way.units[u][0]] += way.cost
            packing.numels[way.units[u][0]] += batch.numel
    return packing
