"""What a simulated step shares: links on which bytes queue, exchanges that ranks wait for, and cores."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from distmuon.plan.simulate_loads import LegLoad
from distmuon.speeds import Link


class Lanes:
    """The links of one class, one in each direction at each rank.

    Attributes:
        link: Their speed.
        duty: Share of an exchange's time for which it fills them.
        out: When each rank's is free for what leaves next.
        into: When each rank's is free for what arrives next.
    """

    def __init__(self, link: Link, ranks: int, duty: float) -> None:
        self.link = link
        self.duty = duty
        self.out = [0.0] * ranks
        self.into = [0.0] * ranks


class _Earliest:
    """The earliest of some ranks, but for one that asks: owners are among those that store."""

    __slots__ = ("_first", "_place", "_second")

    def __init__(self) -> None:
        self._first = self._second = float("inf")
        self._place = -1

    def add(self, place: int, time: float) -> None:
        if time < self._first:
            self._first, self._place, self._second = time, place, self._first
        elif time < self._second:
            self._second = time

    def beside(self, place: int) -> float:
        return self._second if place == self._place else self._first


class Exchange:
    """One leg of one bucket, and how far each rank, meant by its place, is with it.

    What leaves a rank moves once the rank and the first of those it sends to have begun. A rank is done when its own
    bytes have moved, all that sends to it has left, and all that it sends to have begun.

    Args:
        number: Place among the exchanges of the step.
        kind: ``"gather"`` or ``"scatter"``.
        bucket: Place of the bucket.
        leg: Who sends how much.
        itemsize: Bytes of an element.
        lanes: Links inside and between nodes.
        joint: Whether it waits for all ranks to begin, even those that send nothing.
    """

    def __init__(
        self, number: int, kind: str, bucket: int, leg: LegLoad, itemsize: int, lanes: Sequence[Lanes], *, joint: bool
    ) -> None:
        ranks = len(leg.sent[0])
        self.number, self.kind, self.bucket = number, kind, bucket
        self.sent = [[itemsize * numel for numel in numels] for numels in leg.sent]
        self.received = [[itemsize * numel for numel in numels] for numels in leg.received]
        self.called: dict[int, float] = {}
        self.started: set[int] = set()
        self.begun = [0.0] * ranks
        self.done = [0.0] * ranks
        self._lanes = lanes
        links = [lane.link for lane in lanes]
        if leg.gathered is None:
            self._prices = [(link.latency, link.exchange) for link in links]
        else:
            self._prices = [(link.latency + link.gather_extra, link.gather) for link in links]
        self._groups = leg.groups
        self._sends: list[list[int]] = [[] for _ in range(ranks)]
        self._takes: list[list[int]] = [[] for _ in range(ranks)]
        for index, group in enumerate(leg.groups):
            for place in group.sources:
                self._sends[place].append(index)
            for place in group.targets:
                self._takes[place].append(index)
        # by group: how many have yet to begin to take, or to have sent everything
        self._to_begin = [len(group.targets) for group in leg.groups]
        self._to_leave = [len(group.sources) for group in leg.groups]
        self._sources = [_Earliest() for _ in leg.groups]
        self._targets = [_Earliest() for _ in leg.groups]
        self._last = [0.0] * len(leg.groups)
        self._left = [0.0] * len(leg.groups)
        # what a rank has yet to know before its bytes leave, and before it is done
        self._held_back = [1 + len(sends) for sends in self._sends]
        self.open = [1 + len(takes) + joint for takes in self._takes]
        self._missing = ranks if joint else 0
        self._met = 0.0

    def bytes_of(self, place: int) -> int:
        """Bytes that a rank sends and receives."""
        return sum(amounts[place] for amounts in (*self.sent, *self.received))

    def begin(self, place: int, start: float) -> list[int]:
        """A rank begins; those that are now known to be done, and when, are returned."""
        self.started.add(place)
        self.begun[place] = start
        done: list[int] = []
        for index in self._takes[place]:
            self._targets[index].add(place, start)
            self._last[index] = max(self._last[index], start)
            self._to_begin[index] -= 1
            if not self._to_begin[index]:
                for source in self._groups[index].sources:
                    self._may_leave(source, done)
        for index in self._sends[place]:
            self._sources[index].add(place, start)
        self._may_leave(place, done)
        if self._missing:
            self._met = max(self._met, start)
            self._missing -= 1
            if not self._missing:
                for member in range(len(self.open)):
                    self._may_end(member, done)
        return done

    def _may_leave(self, place: int, done: list[int]) -> None:
        """One thing less that keeps the bytes of a rank from leaving."""
        self._held_back[place] -= 1
        if self._held_back[place]:
            return
        sends = self._sends[place]
        start = max(self.begun[place], min((self._targets[index].beside(place) for index in sends), default=0.0))
        end = self.begun[place]
        for lane, sent, (latency, seconds) in zip(self._lanes, self.sent, self._prices, strict=True):
            if sent[place]:
                first, whole = max(start, lane.out[place]), latency + seconds * sent[place]
                lane.out[place] = first + lane.duty * whole
                end = max(end, first + whole)
        self.done[place] = max([end, *(self._last[index] for index in sends)])
        for index in sends:
            self._left[index] = max(self._left[index], end)
            self._to_leave[index] -= 1
            if not self._to_leave[index]:
                for target in self._groups[index].targets:
                    self._may_end(target, done)
        self._may_end(place, done)

    def _may_end(self, place: int, done: list[int]) -> None:
        """One thing less that keeps a rank from being done."""
        self.open[place] -= 1
        if self.open[place]:
            return
        takes = self._takes[place]
        start = max(self.begun[place], min((self._sources[index].beside(place) for index in takes), default=0.0))
        end = max([self.done[place], self._met, *(self._left[index] for index in takes)])
        for lane, received, (latency, seconds) in zip(self._lanes, self.received, self._prices, strict=True):
            if received[place]:
                first, whole = max(start, lane.into[place]), latency + seconds * received[place]
                lane.into[place] = first + lane.duty * whole
                end = max(end, first + whole)
        self.done[place] = end
        done.append(place)


class Cores:
    """Cores that ranks share equally while they compute.

    Time is kept as the work that each computing rank has done since the start, so that one number serves all.

    Args:
        number: Of cores.
        now: Seconds at which ranks begin.
    """

    def __init__(self, number: float, now: float) -> None:
        self.now = now
        self._number = number
        self._done = 0.0
        self._working: list[tuple[float, int]] = []
        self._sleeping: list[tuple[float, int]] = []

    @property
    def busy(self) -> bool:
        """Whether any rank computes or sleeps."""
        return bool(self._working or self._sleeping)

    def work(self, place: int, seconds: float) -> None:
        """A rank computes, for so long if it has a core of its own."""
        heapq.heappush(self._working, (self._done + seconds, place))

    def sleep(self, place: int, until: float) -> None:
        """A rank does nothing until then."""
        heapq.heappush(self._sleeping, (until, place))

    def advance(self) -> tuple[int, float]:
        """The next rank that goes on, and when."""
        ended = float("inf")
        rate = min(1.0, self._number / len(self._working)) if self._working else 1.0
        if self._working:
            ended = self.now + max(0.0, self._working[0][0] - self._done) / rate
        if self._sleeping and self._sleeping[0][0] <= ended:
            now, place = heapq.heappop(self._sleeping)
            now = max(now, self.now)
            self._done += (now - self.now) * rate
        else:
            self._done, place = heapq.heappop(self._working)
            now = ended
        self.now = now
        return place, now
