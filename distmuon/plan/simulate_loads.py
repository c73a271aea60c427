"""What every rank computes and moves for a wave of buckets, by link class: the input of a simulation.

:mod:`distmuon.plan.routes` says the same of one rank, part by part. Here it is counted for all ranks at a time, and
once for matrices that are stored alike, so that thousands of ranks take seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from distmuon.plan.assign import Assignment
from distmuon.plan.boxes import chunk
from distmuon.plan.buckets import Bucket
from distmuon.plan.nodes import node_of
from distmuon.plan.parameters import Holding, ParameterSpec
from distmuon.plan.plan import Plan
from distmuon.plan.waves import Wave


@dataclass(frozen=True)
class Group:
    """Ranks of which each of ``sources`` sends to each of ``targets``; by place in the plan, as all ranks here."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class LegLoad:
    """One direction of an exchange. Lists have an entry for each rank of the plan, in elements.

    Attributes:
        sent: What leaves each rank for its node, and for other nodes.
        received: What reaches it from its node, and from others.
        groups: Who waits for whom.
        gathered: None for an all-to-all, else what each rank contributes to an all-gather, padding included.
    """

    sent: tuple[list[int], list[int]]
    received: tuple[list[int], list[int]]
    groups: tuple[Group, ...]
    gathered: int | None = None

    def cut(self, part: int, parts: int) -> LegLoad:
        """One of so many exchanges, equal but for rounding, that move this together."""
        if parts == 1:
            return self
        sent, received = (
            tuple([_slice(numel, part, parts) for numel in numels] for numels in pair)
            for pair in (self.sent, self.received)
        )
        gathered = None if self.gathered is None else _slice(self.gathered, part, parts)
        return LegLoad((sent[0], sent[1]), (received[0], received[1]), self.groups, gathered)

    @property
    def moves(self) -> bool:
        """Whether there is anything to exchange."""
        return self.gathered is not None or bool(self.groups)


@dataclass(frozen=True)
class Work:
    """What ranks orthogonalize of a bucket.

    Attributes:
        bucket: Its place in the plan.
        cost: Time of each rank, in the unit of the plan.
        teams: Places of the ranks of each team that owns something.
    """

    bucket: int
    cost: list[int]
    teams: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class WaveLoad:
    """A wave as all ranks see it; lists have an entry for each rank of the plan.

    Attributes:
        held: Elements that it stores, whose momentum it blends.
        owned: Elements that it orthogonalizes.
        kept: Elements that it both stores and owns.
        work: Of each of its buckets.
        gather: Shards to owners.
        scatter: Updates from owners, in all legs.
        legs: In how many exchanges these come back.
    """

    held: list[int]
    owned: list[int]
    kept: list[int]
    work: tuple[Work, ...]
    gather: LegLoad
    scatter: LegLoad
    legs: int


@dataclass(eq=False)
class _Shares:
    """Elements of one matrix, or slab, by the place of the rank that stores some of it."""

    numel: dict[int, int]
    total: int = field(init=False)
    by_node: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = sum(self.numel.values())

    def of_node(self, node: int, members: Sequence[int]) -> int:
        """Elements that the ranks of a node store together."""
        if node not in self.by_node:
            get = self.numel.get
            self.by_node[node] = sum(get(member, 0) for member in members)
        return self.by_node[node]


@dataclass(eq=False)
class _Unit:
    """Matrices of a layout, or equal slabs of them, that are stored alike.

    Attributes:
        everyone: By everyone who stores some.
        replicas: By the ranks of each replica.
    """

    everyone: _Shares
    replicas: dict[tuple[int, ...], _Shares]

    def sources(self, replica: tuple[int, ...] | None) -> _Shares:
        """Who hands a matrix to an owner of ``replica``; an owner that is in none takes it from the first."""
        if replica in self.replicas:
            return self.replicas[replica]
        return self.replicas[min(self.replicas)]


class _Layout:
    """A shape and who stores what of it."""

    def __init__(self, spec: ParameterSpec, places: Mapping[int, int]) -> None:
        self._spec = spec
        self._places = places
        self.replica_of = {places[holding.rank]: holding.replica for holding in spec.holdings}
        self._beside = {} if spec.companion is None else {h.rank: h.box for h in spec.companion.holdings}
        self._runs: dict[tuple[int, int], list[Holding]] = {}
        for holding in spec.holdings:
            if holding.box.numel:
                start = holding.box.offsets[0] if spec.stacked else 0
                stop = start + holding.box.sizes[0] if spec.stacked else 1
                self._runs.setdefault((start, stop), []).append(holding)
        self._found: dict[tuple[int, int, int, int], list[tuple[_Unit, int]]] = {}
        self._units: dict[tuple[int, int, int, int], _Unit] = {}

    def units(self, assignment: Assignment) -> list[tuple[_Unit, int]]:
        """The runs of matrices that an assignment touches, and how many of each."""
        a = assignment
        key = (a.first, a.count, a.part, a.parts)
        found = self._found.get(key)
        if found is None:
            found = []
            for start, stop in self._runs:
                count = min(stop, a.first + a.count) - max(start, a.first)
                if count <= 0:
                    continue
                unit = self._unit(start, stop, a.part, a.parts)
                # the last slab of a short axis may be empty
                if unit.replicas:
                    found.append((unit, count))
            self._found[key] = found
        return found

    def _unit(self, start: int, stop: int, part: int, parts: int) -> _Unit:
        key = (start, stop, part, parts)
        if key not in self._units:
            by_replica: dict[tuple[int, ...], dict[int, int]] = {}
            for holding in self._runs[start, stop]:
                numel = self._numel(holding, part, parts)
                if numel:
                    by_replica.setdefault(holding.replica, {})[self._places[holding.rank]] = numel
            shares = {replica: _Shares(numel) for replica, numel in by_replica.items()}
            merged = {place: numel for numels in by_replica.values() for place, numel in numels.items()}
            everyone = next(iter(shares.values())) if len(shares) == 1 else _Shares(merged)
            self._units[key] = _Unit(everyone, shares)
        return self._units[key]

    def _numel(self, holding: Holding, part: int, parts: int) -> int:
        spec, box = self._spec, holding.box
        numel = box.numel // box.sizes[0] if spec.stacked else box.numel
        if parts == 1:
            # of rows that several ranks store one sends, and all are counted: few words beside the matrix
            beside = self._beside.get(holding.rank)
            if beside is None or not numel:
                return numel
            return numel + (beside.numel // beside.sizes[0] if spec.stacked else beside.numel)
        axis = spec.slab_axis
        start, size = chunk(spec.shape[axis], part, parts)
        shared = min(start + size, box.offsets[axis] + box.sizes[axis]) - max(start, box.offsets[axis])
        return numel // box.sizes[axis] * max(0, shared)


@dataclass
class _Way:
    """What all owners take from the same sources, or hand to the same targets, in one wave."""

    matrices: int = 0
    by_node: Counter[int] = field(default_factory=Counter)
    owners: dict[int, None] = field(default_factory=dict)

    def add(self, count: int, node: int, owner: int) -> None:
        self.matrices += count
        self.by_node[node] += count
        self.owners[owner] = None


def loads(plan: Plan, *, all_gather: bool) -> Iterator[WaveLoad]:
    """What each wave asks of each rank.

    Args:
        plan: The plan.
        all_gather: Whether updates of replicated waves come back by an all-gather instead of an all-to-all.
    """
    world = _World(plan)
    for wave in plan.waves:
        yield world.load(wave, all_gather=all_gather)


class _World:
    """The ranks of a plan, and the layouts of its parameters."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._places = {rank: place for place, rank in enumerate(plan.ranks)}
        self._members = [[self._places[rank] for rank in members] for members in plan.nodes]
        numbers = node_of(plan.nodes)
        self._node = [numbers[rank] for rank in plan.ranks]
        layouts: dict[tuple[tuple[int, ...], bool, bool, int, tuple[Holding, ...]], _Layout] = {}
        # tuples of thousands of holdings are slow to compare, and most parameters share theirs
        known: dict[tuple[tuple[int, ...], bool, bool, int, int], _Layout] = {}
        self._layouts = []
        for spec in plan.parameters:
            # stacks of convolutions and of experts may have one shape
            facts = (spec.shape, spec.stacked, spec.matrices.cols >= spec.matrices.rows, id(spec.companion))
            quick, thorough = (*facts, id(spec.holdings)), (*facts, spec.holdings)
            layout = known.get(quick)
            if layout is None:
                layout = layouts.get(thorough) or _Layout(spec, self._places)
                layouts[thorough] = known[quick] = layout
            self._layouts.append(layout)

    def work(self, bucket: Bucket, number: int) -> Work:
        """What ranks orthogonalize of one bucket."""
        cost = [0] * len(self._places)
        teams: dict[tuple[int, int], list[int]] = {}
        for a in bucket.assignments:
            owner = self._places[a.owner]
            cost[owner] += a.cost(self._plan.parameters[a.parameter])
            if a.parts > 1:
                teams.setdefault((a.parameter, a.first), []).append(owner)
        return Work(number, cost, tuple(dict.fromkeys(tuple(sorted(team)) for team in teams.values())))

    def load(self, wave: Wave, *, all_gather: bool) -> WaveLoad:
        """What one wave asks of each rank."""
        ranks = len(self._places)
        owned, kept = [0] * ranks, [0] * ranks
        arriving, leaving = _pair(ranks), _pair(ranks)
        gathered: dict[_Shares, _Way] = {}
        scattered: dict[_Shares, _Way] = {}
        for a in wave.assignments:
            layout, owner = self._layouts[a.parameter], self._places[a.owner]
            node = self._node[owner]
            members = self._members[node]
            for unit, count in layout.units(a):
                sources = unit.sources(layout.replica_of.get(owner))
                own = unit.everyone.numel.get(owner, 0) * count
                kept[owner] += own
                owned[owner] += sources.total * count
                near = sources.of_node(node, members) * count
                arriving[0][owner] += near - own
                arriving[1][owner] += sources.total * count - near
                near = unit.everyone.of_node(node, members) * count
                leaving[0][owner] += near - own
                leaving[1][owner] += unit.everyone.total * count - near
                gathered.setdefault(sources, _Way()).add(count, node, owner)
                scattered.setdefault(unit.everyone, _Way()).add(count, node, owner)
        sent, _ = self._far_ends(gathered, kept)
        received, held = self._far_ends(scattered, kept)
        gather = LegLoad(sent, arriving, _groups(gathered) if wave.gathers else ())
        if wave.replicated and all_gather:
            scatter = self._all_gather(max(owned))
        else:
            backwards = _groups(scattered) if wave.scatters else ()
            scatter = LegLoad(leaving, received, tuple(Group(g.targets, g.sources) for g in backwards))
        work = tuple(self.work(bucket, number) for number, bucket in enumerate(wave.buckets, start=wave.first))
        return WaveLoad(held, owned, kept, work, gather, scatter, wave.legs)

    def _far_ends(
        self, ways: Mapping[_Shares, _Way], kept: Sequence[int]
    ) -> tuple[tuple[list[int], list[int]], list[int]]:
        """Elements that ranks exchange with owners in their node and elsewhere, and with all owners, themselves too."""
        everything = [0] * len(kept)
        near = [-own for own in kept]
        for shares, way in ways.items():
            for place, numel in shares.numel.items():
                everything[place] += numel * way.matrices
            for node, count in way.by_node.items():
                for member in self._members[node]:
                    near[member] += shares.numel.get(member, 0) * count
        far = [total - own - close for total, own, close in zip(everything, kept, near, strict=True)]
        return (near, far), everything

    def _all_gather(self, share: int) -> LegLoad:
        """Everything reaches every rank; it comes to each node once, over the links of all its ranks."""
        ranks = len(self._places)
        near, far = _pair(ranks)
        for members in self._members:
            for member in members:
                far[member] = -(-share * (ranks - len(members)) // len(members))
                near[member] = share * (ranks - 1) - far[member]
        everyone = tuple(range(ranks))
        return LegLoad((near, far), (near, far), (Group(everyone, everyone),), share)


def _slice(numel: int, part: int, parts: int) -> int:
    return numel * (part + 1) // parts - numel * part // parts


def _pair(ranks: int) -> tuple[list[int], list[int]]:
    return [0] * ranks, [0] * ranks


def _groups(ways: Mapping[_Shares, _Way]) -> tuple[Group, ...]:
    """Storing ranks as sources and owners as targets, where anything moves between them."""
    found = []
    for shares, way in ways.items():
        sources, targets = tuple(shares.numel), tuple(way.owners)
        if len(sources) > 1 or sources != targets:
            found.append(Group(sources, targets))
    return tuple(found)
