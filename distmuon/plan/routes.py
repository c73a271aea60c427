"""One rank's part in the exchange of a wave: what it packs, what it unpacks, and where that lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distmuon.plan.assign import Assignment
from distmuon.plan.boxes import Box
from distmuon.plan.layouts import Holding, Layout
from distmuon.plan.plan import Plan
from distmuon.plan.waves import Wave


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of one assignment that are moved, or updated, together.

    Attributes:
        slot: Which assignment of the wave.
        box: The elements, in coordinates of the parameter, or of its companion.
        start: Where they lie in a packed buffer, in elements; None where they are in none.
        moments: Whether they are of the companion, the second moments that travel with the matrices.
    """

    slot: int
    box: Box
    start: int | None
    moments: bool = False


@dataclass(frozen=True)
class Leg:
    """One direction of an exchange, as this rank sees it.

    Attributes:
        sends: What is packed, in the order in which it lies in the send buffer.
        receives: What is unpacked.
        send_splits: Elements for each rank of the plan.
        receive_splits: Elements from each rank of the plan.
        gathered: None for an all-to-all. Otherwise every rank sends the same to all: the elements that
            each contributes to an all-gather, padding included.
    """

    sends: tuple[Part, ...]
    receives: tuple[Part, ...]
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    gathered: int | None = None

    @property
    def send_numel(self) -> int:
        """Elements of the send buffer."""
        return sum(self.send_splits) if self.gathered is None else self.gathered

    @property
    def receive_numel(self) -> int:
        """Elements of the receive buffer."""
        return sum(self.receive_splits) if self.gathered is None else self.gathered * len(self.receive_splits)


@dataclass(frozen=True)
class Stack:
    """The matrices of one bucket that a rank owns, one after another.

    Attributes:
        start: Where they lie among all that it owns of the wave, in elements.
        count: How many there are.
        rows: Rows of each; where a team owns them, of this rank's slab.
        cols: Columns of each.
        moments: Elements that the companions of all take, which follow the matrices.
    """

    start: int
    count: int
    rows: int
    cols: int
    moments: int = 0

    @property
    def numel(self) -> int:
        """Elements of all matrices."""
        return self.count * self.rows * self.cols

    @property
    def end(self) -> int:
        """Where the next stack begins."""
        return self.start + self.numel + self.moments


@dataclass(frozen=True)
class Routes:
    """What one rank does with a wave.

    Attributes:
        place: By slot that this rank owns, and whether the companion is meant, where its first matrix begins among all
            that it owns, in elements.
        stacks: What it owns of each bucket.
        held: Every part that this rank stores: its momentum is blended here. ``start`` says where in the
            gather's send buffer the result goes, None: it is not sent.
        kept: Parts that this rank both stores and hands to itself as the owner, one after another in a
            buffer of their own.
        gather: Shards to owners.
        updated: Parts that this rank both owns and stores.
        scatters: Updates from owners to everybody who stores them; several where more comes back than is to be held.
    """

    place: Mapping[tuple[int, bool], int]
    stacks: tuple[Stack, ...]
    held: tuple[Part, ...]
    kept: tuple[Part, ...]
    gather: Leg
    updated: tuple[Part, ...]
    scatters: tuple[Leg, ...]

    @property
    def owned_numel(self) -> int:
        """Elements that this rank owns, with companions."""
        return self.stacks[-1].end if self.stacks else 0


def route(plan: Plan, wave: Wave, rank: int, *, active: Sequence[bool] | None, all_gather: bool) -> Routes:
    """Work out one rank's part in a wave.

    Both ends of every transfer order it alike: by assignment, then by box.

    Args:
        plan: The plan.
        wave: One of its waves.
        rank: The global rank.
        active: Whether each parameter of the plan takes part; None: all do.
        all_gather: Bring updates of replicated waves back by an all-gather instead of an all-to-all.
    """
    slots = [
        (slot, assignment)
        for slot, assignment in enumerate(wave.assignments)
        if active is None or active[assignment.parameter]
    ]
    index = {member: number for number, member in enumerate(plan.ranks)}
    gather_out: list[list[Part]] = [[] for _ in plan.ranks]
    gather_in: list[list[Part]] = [[] for _ in plan.ranks]
    scatter_out: list[list[Part]] = [[] for _ in plan.ranks]
    scatter_in: list[list[Part]] = [[] for _ in plan.ranks]
    held, kept, updated = [], [], []
    owned = set()
    for slot, assignment, load in _loads(plan, slots):
        owner, layout = assignment.owner, load.layout
        own = layout.of_rank.get(rank)
        mine = None if own is None else own.box.intersect(load.box)
        if owner == rank:
            owned.add(slot)
            for box, holders in _pieces(layout, load.box):
                part = Part(slot, box, None, load.moments)
                source = _source(holders, owner, layout)
                if source == rank:
                    kept.append(part)
                else:
                    gather_in[index[source]].append(part)
                for holding in holders:
                    if holding.rank != rank:
                        scatter_out[index[holding.rank]].append(part)
        if mine is None:
            continue
        part = Part(slot, mine, None, load.moments)
        held.append(part)
        if owner == rank:
            updated.append(part)
            continue
        scatter_in[index[owner]].append(part)
        if not layout.replicated or _source(_holders(layout, mine), owner, layout) == rank:
            gather_out[index[owner]].append(part)
    gather = _leg(gather_out, gather_in)
    starts = {dataclasses.replace(part, start=None): part.start for part in gather.sends}
    placed = tuple(dataclasses.replace(part, start=starts.get(part)) for part in held)
    if wave.replicated and all_gather:
        scatters = tuple(_all_gather_leg(plan, wave, slots, rank, number) for number in range(wave.legs))
    else:
        legs = range(wave.legs)
        scatters = tuple(_leg(_slice(scatter_out, leg, wave), _slice(scatter_in, leg, wave)) for leg in legs)
    return Routes(*_stack(plan, wave, owned), placed, _place([kept])[0], gather, tuple(updated), scatters)


@dataclass(frozen=True, slots=True)
class _Load:
    """What of one assignment travels: its matrices, or their companion.

    Attributes:
        layout: Who stores what of them.
        box: All of them.
        moments: Whether it is the companion.
    """

    layout: Layout
    box: Box
    moments: bool


def _loads(plan: Plan, slots: Iterable[tuple[int, Assignment]]) -> Iterator[tuple[int, Assignment, _Load]]:
    for slot, assignment in slots:
        spec = plan.parameters[assignment.parameter]
        yield slot, assignment, _Load(spec.layout, assignment.box(spec), moments=False)
        if spec.companion is not None:
            box = spec.companion.box_of(assignment.first, assignment.count)
            yield slot, assignment, _Load(spec.companion.layout, box, moments=True)


def _stack(plan: Plan, wave: Wave, owned: Collection[int]) -> tuple[dict[tuple[int, bool], int], tuple[Stack, ...]]:
    """Where the matrices of each owned slot begin, and the stacks that they make up."""
    place: dict[tuple[int, bool], int] = {}
    stacks = []
    start = first = 0
    for bucket in wave.buckets:
        mine = [(slot, a) for slot, a in enumerate(bucket.assignments, start=first) if slot in owned]
        stack = Stack(start, 0, bucket.rows, bucket.cols)
        for slot, assignment in mine:
            place[slot, False] = start + stack.numel
            shape = assignment.shape(plan.parameters[assignment.parameter])
            stack = Stack(start, stack.count + assignment.count, *shape)
        for slot, assignment in mine:
            companion = plan.parameters[assignment.parameter].companion
            if companion is not None:
                place[slot, True] = stack.end
                more = assignment.count * companion.matrix_numel
                stack = dataclasses.replace(stack, moments=stack.moments + more)
        stacks.append(stack)
        start = stack.end
        first += len(bucket.assignments)
    return place, tuple(stacks)


def _slice(by_rank: Sequence[Sequence[Part]], leg: int, wave: Wave) -> list[list[Part]]:
    """What of all parts goes with one leg: a slice of each, so that all owners send in every leg."""
    if wave.legs == 1:
        return [list(parts) for parts in by_rank]
    cut = [[dataclasses.replace(part, box=part.box.cut(leg, wave.legs)) for part in parts] for parts in by_rank]
    return [[part for part in parts if part.box.numel] for parts in cut]


def _holders(layout: Layout, box: Box) -> list[Holding]:
    return [holding for holding, shared in layout.meeting(box) if shared == box]


def _pieces(layout: Layout, whole: Box) -> Iterable[tuple[Box, list[Holding]]]:
    """The distinct boxes that ``whole`` is stored in, each with everyone who stores it."""
    pieces: dict[Box, list[Holding]] = {}
    for holding, box in layout.meeting(whole):
        pieces.setdefault(box, []).append(holding)
    return sorted(pieces.items(), key=lambda item: item[0].offsets)


def _source(holders: Sequence[Holding], owner: int, layout: Layout) -> int:
    """Who of those that store a piece hands it to the owner: itself, else the nearest of its own replica."""
    if any(holding.rank == owner for holding in holders):
        return owner
    own = layout.of_rank.get(owner)
    replica = None if own is None else own.replica
    return min(holders, key=lambda h: (h.replica != replica, abs(h.rank - owner), h.rank)).rank


def _leg(out: Sequence[Sequence[Part]], into: Sequence[Sequence[Part]]) -> Leg:
    sends, send_splits = _place(out)
    receives, receive_splits = _place(into)
    return Leg(sends, receives, send_splits, receive_splits)


def _place(by_rank: Sequence[Sequence[Part]]) -> tuple[tuple[Part, ...], tuple[int, ...]]:
    """Lay parts one after another."""
    placed, splits, start = [], [], 0
    for parts in by_rank:
        before = start
        for part in parts:
            placed.append(dataclasses.replace(part, start=start))
            start += part.box.numel
        splits.append(start - before)
    return tuple(placed), tuple(splits)


def _all_gather_leg(plan: Plan, wave: Wave, slots: Sequence[tuple[int, Assignment]], rank: int, leg: int) -> Leg:
    by_owner: dict[int, list[Part]] = {member: [] for member in plan.ranks}
    for slot, assignment, load in _loads(plan, slots):
        part = Part(slot, load.box.cut(leg, wave.legs), None, load.moments)
        if part.box.numel:
            by_owner[assignment.owner].append(part)
    share = max(sum(part.box.numel for part in parts) for parts in by_owner.values())
    sends, receives = [], []
    for index, owner in enumerate(plan.ranks):
        start = 0
        for part in by_owner[owner]:
            if owner == rank:
                sends.append(dataclasses.replace(part, start=start))
            else:
                receives.append(dataclasses.replace(part, start=index * share + start))
            start += part.box.numel
    everyone = (share,) * len(plan.ranks)
    return Leg(tuple(sends), tuple(receives), everyone, everyone, gathered=share)
