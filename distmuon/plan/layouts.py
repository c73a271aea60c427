"""Layouts: who stores which elements, worked out once for the many parameters that share one."""

from __future__ import annotations

import functools
import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distmuon.plan.boxes import Box


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank stores of a parameter.

    Attributes:
        rank: The global rank.
        box: Its elements; may be empty.
        replica: Coordinates on the replicated axes of the parameter's mesh. Ranks of equal ``replica``
            store the parameter once among them, and are the ones that it is gathered from.
    """

    rank: int
    box: Box
    replica: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shares:
    """Who stores how much of a box.

    Attributes:
        by_rank: Elements by the rank that stores some of them, by ascending rank.
        numel: Elements of the box.
        stored: Elements that all ranks store of it together, copies counted.
        wholes: The ranks that store all of it.
    """

    by_rank: Mapping[int, int]
    numel: int
    stored: int
    wholes: tuple[int, ...]

    @classmethod
    def of(cls, by_rank: Mapping[int, int], numel: int) -> Shares:
        """From the elements by rank."""
        wholes = tuple(rank for rank, stored in by_rank.items() if stored == numel)
        return cls(by_rank, numel, sum(by_rank.values()), wholes)


class Layout:
    """The holdings of a parameter, indexed.

    Attributes:
        holdings: Who stores what, by ascending rank.
        ranks: Everyone who shares the parameter, also those that store nothing of it.
        replicated: Whether elements are stored by more than one rank.
    """

    def __init__(self, holdings: tuple[Holding, ...]) -> None:
        self.holdings = holdings
        self.ranks = tuple(holding.rank for holding in holdings)
        self.replicated = len({holding.replica for holding in holdings}) > 1
        self._shares: dict[Box, Shares] = {}

    @functools.cached_property
    def of_rank(self) -> Mapping[int, Holding]:
        """The holding of each rank."""
        return {holding.rank: holding for holding in self.holdings}

    @functools.cached_property
    def _by_start(self) -> tuple[list[Holding], list[int], int]:
        """Holdings that are not empty by where they begin on the first axis, these places, and the longest of them."""
        kept = [holding for holding in self.holdings if holding.box.numel]
        kept.sort(key=lambda holding: holding.box.offsets[0])
        longest = max((holding.box.sizes[0] for holding in kept), default=0)
        return kept, [holding.box.offsets[0] for holding in kept], longest

    def meeting(self, box: Box) -> list[tuple[Holding, Box]]:
        """The holdings that have elements of ``box``, by ascending rank, and these elements."""
        kept, starts, longest = self._by_start
        # on the first axis only neighbours can meet, which leaves few of thousands of shards
        low = bisect_right(starts, box.offsets[0] - longest)
        high = bisect_left(starts, box.offsets[0] + box.sizes[0])
        found = [(holding, shared) for holding in kept[low:high] if (shared := holding.box.intersect(box)) is not None]
        found.sort(key=lambda item: item[0].rank)
        return found

    def shares(self, box: Box) -> Shares:
        """Who stores how much of ``box``; remembered, so ask for a stack by its runs."""
        found = self._shares.get(box)
        if found is None:
            found = self._shares[box] = Shares.of({h.rank: shared.numel for h, shared in self.meeting(box)}, box.numel)
        return found

    @functools.cached_property
    def cuts(self) -> tuple[int, ...]:
        """Where on the first axis shards begin or end, ascending."""
        ends = {holding.box.offsets[0] + holding.box.sizes[0] for holding in self.holdings if holding.box.numel}
        return tuple(sorted(ends.union(holding.box.offsets[0] for holding in self.holdings if holding.box.numel)))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of who stores what."""
        return hashlib.sha256(repr(self.holdings).encode()).hexdigest()

    def runs(self, count: int) -> Iterator[tuple[int, int]]:
        """``(first, number)`` of runs of a first axis of ``count`` matrices that are stored alike."""
        ends = sorted({0, count, *(cut for cut in self.cuts if cut < count)})
        return ((start, stop - start) for start, stop in itertools.pairwise(ends))

    def run_of(self, place: int) -> int:
        """Where the run begins that a place on the first axis is in."""
        at = bisect_right(self.cuts, place)
        return self.cuts[at - 1] if at else 0


class _Same:
    """A key that is equal to keys of the very same object only, which it keeps alive."""

    __slots__ = ("holdings",)

    def __init__(self, holdings: tuple[Holding, ...]) -> None:
        self.holdings = holdings

    def __hash__(self) -> int:
        return id(self.holdings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.holdings is other.holdings


@functools.lru_cache(maxsize=256)
def _equal(holdings: tuple[Holding, ...]) -> Layout:
    return Layout(holdings)


@functools.lru_cache(maxsize=65536)
def _identical(key: _Same) -> Layout:
    return _equal(key.holdings)


def forget() -> None:
    """Let go of tuples that were asked about: a plan keeps its layouts, and others ask anew."""
    _identical.cache_clear()


def layout_of(holdings: tuple[Holding, ...]) -> Layout:
    """The layout of ``holdings``; that of equal ones is the same object as long as it is remembered.

    Hashing thousands of holdings takes milliseconds, so it is done once for each tuple, not for each question.
    """
    return _identical(_Same(holdings))


def check_holdings(name: str, shape: Sequence[int], holdings: Sequence[Holding]) -> None:
    """Refuse holdings that are not one copy of the parameter for each replica.

    Raises:
        ValueError: naming the parameter, if boxes overlap, leave its shape, or miss elements.
    """
    whole = Box.whole(shape)
    by_replica: dict[tuple[int, ...], list[Holding]] = {}
    for holding in holdings:
        by_replica.setdefault(holding.replica, []).append(holding)
    for replica, members in by_replica.items():
        parts = [holding for holding in members if holding.box.numel]
        inside = all(whole.covers(holding.box) for holding in parts)
        if inside and sum(holding.box.numel for holding in parts) == whole.numel and _disjoint(parts):
            continue
        boxes = ", ".join(f"rank {h.rank}: {h.box.offsets} + {h.box.sizes}" for h in members[:8])
        raise ValueError(
            f"the shards of parameter {name!r}, shape {tuple(shape)}, do not cover it once in replica "
            f"{replica} ({boxes}): this layout is not one that torch's DTensor shards describe."
        )


def _disjoint(holdings: Sequence[Holding]) -> bool:
    """Whether no two boxes meet: along the axis that is cut most, only neighbours are compared."""
    boxes = [holding.box for holding in holdings]
    if not boxes:
        return True
    axis = max(range(len(boxes[0].offsets)), key=lambda a: len({box.offsets[a] for box in boxes}))
    ordered = sorted(boxes, key=lambda box: box.offsets[axis])
    for index, box in enumerate(ordered):
        for other in itertools.islice(ordered, index + 1, None):
            if other.offsets[axis] >= box.offsets[axis] + box.sizes[axis]:
                break
            if box.intersect(other) is not None:
                return False
    return True
