"""What is handed out: matrices that go to one owner, in batches of equal ones, so that thousands cost little."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distmuon.plan.nodes import Nodes, teams_of
from distmuon.plan.parameters import ParameterSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive matrices of one parameter that go to one owner, or one team."""

    parameter: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Way:
    """How a piece of a batch may be owned.

    Attributes:
        size: Number of ranks.
        cost: Time of a piece on each of them.
        units: The ranks, or teams of ranks, that may.
    """

    size: int
    cost: int
    units: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Batch:
    """Pieces that are alike for a planner: none costs more than another, and the same ranks may own them.

    Attributes:
        pieces: By shape, name and place.
        numel: Elements of a piece.
        ways: By ascending size and falling cost; a single owner first.
    """

    pieces: tuple[Piece, ...]
    numel: int
    ways: tuple[Way, ...]

    @property
    def pinned(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.ways) == 1 and len(self.ways[0].units) == 1


def batches_of(specs: Sequence[ParameterSpec], *, most_numel: int, nodes: Nodes) -> tuple[Batch, ...]:
    """All matrices, cut into pieces, the costliest batches first.

    Args:
        specs: The parameters.
        most_numel: Most elements of a piece; a single matrix may exceed it.
        nodes: Which ranks share a node.
    """
    rooms = _Rooms(nodes)
    alike: dict[tuple[object, ...], list[tuple[tuple[str, int, str, int, int], Piece]]] = {}
    kinds: dict[tuple[object, ...], tuple[int, tuple[Way, ...]]] = {}
    for index, spec in enumerate(specs):
        for piece, candidates in _cut(index, spec, most_numel):
            numel = piece.count * spec.matrix_numel
            where = rooms.number(candidates), rooms.number(spec.layout.ranks)
            key: tuple[object, ...] = (numel, piece.count, spec.cost, spec.teams, where)
            if key not in kinds:
                kinds[key] = numel, tuple(rooms.ways(spec, piece.count, candidates))
            # the name, not the place in the list, orders equals: ranks may list parameters in another order
            place = (spec.kind, spec.matrices.rows, spec.name, piece.first, candidates[0])
            alike.setdefault(key, []).append((place, piece))
    found = []
    for key, members in alike.items():
        members.sort(key=lambda item: item[0])
        numel, ways = kinds[key]
        order = (-ways[0].cost, -numel, members[0][0])
        found.append((order, Batch(tuple(piece for _, piece in members), numel, ways)))
    found.sort(key=lambda item: item[0])
    return tuple(batch for _, batch in found)


def _cut(index: int, spec: ParameterSpec, most_numel: int) -> Iterator[tuple[Piece, tuple[int, ...]]]:
    """Pieces of a parameter, each with the ranks of which one may own it alone."""
    most = max(1, most_numel // spec.matrix_numel)
    for first, count in spec.layout.runs(spec.shape[0]) if spec.stacked else [(0, 1)]:
        candidates = _candidates(spec, first)
        # a stack is cut into as many parts as can own one, so that few, large copies move it
        size = min(most, -(-count // len(candidates)))
        for start in range(first, first + count, size):
            yield Piece(index, start, min(size, first + count - start)), candidates


def _candidates(spec: ParameterSpec, first: int) -> tuple[int, ...]:
    """A matrix that some ranks store whole is owned by one of them, so it needs no gathering."""
    return spec.shares(first).wholes or spec.layout.ranks


class _Rooms:
    """Which ranks and teams may own what, each set built once."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._numbers: dict[tuple[int, ...], int] = {}
        # thousands of ranks take long to hash, so a tuple that was seen is known by its identity
        self._seen: dict[int, tuple[tuple[int, ...], int]] = {}
        self._units: dict[tuple[int, int], tuple[tuple[int, ...], ...]] = {}

    def number(self, ranks: tuple[int, ...]) -> int:
        """The same number for equal ranks."""
        seen = self._seen.get(id(ranks))
        if seen is None:
            seen = self._seen[id(ranks)] = (ranks, self._numbers.setdefault(ranks, len(self._numbers)))
        return seen[1]

    def units(self, ranks: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...]:
        """The teams of ``size`` ranks among ``ranks``."""
        key = (self.number(ranks), size)
        if key not in self._units:
            members = set(ranks)
            teams = teams_of(self._nodes, size) if size > 1 else tuple((rank,) for rank in ranks)
            self._units[key] = tuple(team for team in teams if members.issuperset(team))
        return self._units[key]

    def ways(self, spec: ParameterSpec, count: int, candidates: tuple[int, ...]) -> Iterator[Way]:
        """How a piece may be owned: larger teams only where they are faster than smaller ones."""
        best = count * spec.cost
        yield Way(1, best, self.units(candidates, 1))
        for team in spec.teams:
            cost = count * team.cost
            units = self.units(spec.layout.ranks, team.size) if team.size > 1 else ()
            if cost < best and units:
                best = cost
                yield Way(team.size, cost, units)
