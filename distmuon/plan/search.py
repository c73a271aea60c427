"""Local search: pieces leave the busiest rank, or change places with smaller ones, for as long as that helps."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from distmuon.plan.packing import Packing
from distmuon.plan.pieces import Batch

# A count, so that every rank stops at the same place: steps a rank, and emptiest units that are looked at for a swap
_STEPS = 3
_LOOKED_AT = 8

Kind: TypeAlias = tuple[int, int]
"""Batch and way."""


class _Rooms:
    """The emptiest units of each set of units, while loads change."""

    def __init__(self, batches: Sequence[Batch], loads: list[int], kinds: Sequence[Kind]) -> None:
        self._loads = loads
        self._sets: dict[int, tuple[tuple[int, ...], ...]] = {}
        self._set_of: dict[Kind, int] = {}
        for b, w in kinds:
            units = batches[b].ways[w].units
            self._sets[id(units)] = units
            self._set_of[b, w] = id(units)
        self._members: dict[int, list[tuple[int, int]]] = {}
        self._heaps: dict[int, list[tuple[int, int]]] = {}
        for number, units in self._sets.items():
            for u, unit in enumerate(units):
                for rank in unit:
                    self._members.setdefault(rank, []).append((number, u))
            self._heaps[number] = [(self.filled(unit), u) for u, unit in enumerate(units)]
            heapq.heapify(self._heaps[number])

    def filled(self, unit: tuple[int, ...]) -> int:
        """Time of the busiest rank of a unit."""
        return max([self._loads[rank] for rank in unit])

    def emptiest(self, kind: Kind, most: int) -> list[int]:
        """Up to ``most`` units of a kind, the emptiest first."""
        number = self._set_of[kind]
        heap, units = self._heaps[number], self._sets[number]
        found: list[tuple[int, int]] = []
        while heap and len(found) < most:
            load, u = entry = heapq.heappop(heap)
            # entries of loads that have changed since are left behind
            if load == self.filled(units[u]) and entry not in found:
                found.append(entry)
        for entry in found:
            heapq.heappush(heap, entry)
        return [u for _, u in found]

    def add(self, unit: tuple[int, ...], cost: int) -> None:
        """Change the loads of a unit."""
        for rank in unit:
            self._loads[rank] += cost
        for number, u in {member for rank in unit for member in self._members.get(rank, ())}:
            heapq.heappush(self._heaps[number], (self.filled(self._sets[number][u]), u))


def refine(batches: Sequence[Batch], packing: Packing) -> Packing:
    """Shorten the makespan by moves and swaps; team sizes stay.

    Each step takes a piece off the busiest rank: to another rank or team, or in exchange for a smaller piece of it, so
    that both end up below what the busiest was. It ends where no such step is left, or after a number of steps that
    depends on the number of ranks alone.

    Args:
        batches: What is owned.
        packing: By whom.
    """
    loads, numels = list(packing.loads), list(packing.numels)
    placed = {kind: dict(taken) for kind, taken in packing.placed.items()}
    rooms = _Rooms(batches, loads, list(placed))
    at: dict[int, dict[tuple[Kind, int], None]] = {}
    for (b, w), taken in placed.items():
        for u in taken:
            for rank in batches[b].ways[w].units[u]:
                at.setdefault(rank, {})[(b, w), u] = None
    unit_of = _Places(batches)
    busiest = [(-load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(busiest)

    def change(kind: Kind, u: int, number: int) -> None:
        """Give a unit one piece more, or one less."""
        batch, way = batches[kind[0]], batches[kind[0]].ways[kind[1]]
        taken = placed[kind]
        taken[u] = taken.get(u, 0) + number
        if not taken[u]:
            del taken[u]
        rooms.add(way.units[u], number * way.cost)
        for rank in way.units[u]:
            numels[rank] += number * -(-batch.numel // way.size)
            if u in taken:
                at.setdefault(rank, {})[kind, u] = None
            else:
                del at[rank][kind, u]
            heapq.heappush(busiest, (-loads[rank], rank))

    for _ in range(_STEPS * len(at)):
        while -busiest[0][0] != loads[busiest[0][1]]:
            heapq.heappop(busiest)
        rank = busiest[0][1]
        steps = _steps(batches, loads, rooms, at, unit_of, rank)
        best = min(steps, key=lambda step: step[0], default=None)
        if best is None:
            break
        for kind, u, number in best[1]:
            change(kind, u, number)
    return Packing(placed, loads, numels)


class _Places:
    """Where a rank is among the units of a kind of single owners."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._known: dict[int, dict[int, int]] = {}

    def find(self, b: int, rank: int) -> int | None:
        """The unit of a rank; None: it may not own any of the batch."""
        units = self._batches[b].ways[0].units
        if id(units) not in self._known:
            self._known[id(units)] = {unit[0]: u for u, unit in enumerate(units)}
        return self._known[id(units)].get(rank)


Step: TypeAlias = "tuple[tuple[int, int], tuple[tuple[Kind, int, int], ...]]"
"""The larger load after it and its number, and what changes: kind, unit, pieces more or less."""


def _steps(
    batches: Sequence[Batch],
    loads: Sequence[int],
    rooms: _Rooms,
    at: dict[int, dict[tuple[Kind, int], None]],
    places: _Places,
    rank: int,
) -> Iterator[Step]:
    """Steps after which neither ``rank`` nor the other end is as busy as it is."""
    top, number = loads[rank], 0
    for kind, u in sorted(at.get(rank, ())):
        batch = batches[kind[0]]
        way = batch.ways[kind[1]]
        if len(way.units) == 1:
            continue
        for other in rooms.emptiest(kind, _LOOKED_AT):
            unit = way.units[other]
            if other == u or rank in unit:
                continue
            after = max(rooms.filled(unit) + way.cost, top - way.cost)
            number += 1
            if after < top:
                yield (after, number), ((kind, u, -1), (kind, other, 1))
            if way.size > 1:
                continue
            for back, v in sorted(at.get(unit[0], ())):
                small = batches[back[0]].ways[back[1]]
                if back[1] or small.cost >= way.cost:
                    continue
                home = places.find(back[0], rank)
                after = max(loads[unit[0]] + way.cost - small.cost, top - way.cost + small.cost)
                number += 1
                if home is not None and after < top:
                    yield (after, number), ((kind, u, -1), (kind, other, 1), (back, v, -1), (back, home, 1))
