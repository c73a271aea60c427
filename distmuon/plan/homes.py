"""Which of equal pieces goes to which owner: those that store most of it, so that fewest bytes cross nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from distmuon.plan.layouts import Shares
from distmuon.plan.nodes import Nodes, node_of
from distmuon.plan.packing import Packing
from distmuon.plan.parameters import ParameterSpec
from distmuon.plan.pieces import Batch, Piece, Way

# A node, or rank, that stores less of a matrix than this is as good as any other
_MATTERS = 1 / 8


class Homes:
    """Gives the pieces of each batch to the owners of a packing.

    Equal pieces change places, and equally loaded owners do, so the makespan and the elements of the fullest rank stay
    what they are.
    """

    def __init__(self, specs: Sequence[ParameterSpec], nodes: Nodes, packing: Packing) -> None:
        self._specs = specs
        self._node = node_of(nodes)
        self._packing = packing
        self._matter: dict[int, tuple[Shares, dict[int, float], dict[int, float]]] = {}

    def give(
        self, batch: Batch, way: Way, pieces: Sequence[Piece], taken: Mapping[int, int]
    ) -> list[tuple[Piece, int]]:
        """Each piece and its unit.

        Args:
            batch: The batch.
            way: One of its ways.
            pieces: Those that are owned in this way, as many as ``taken`` in all.
            taken: Pieces by unit.
        """
        if len(way.units) == 1:
            return [(piece, 0) for piece in pieces]
        slots = _Slots(self._packing, batch, way, taken)
        given, homeless = [], []
        for piece, wishes in self._wishes(pieces, way):
            unit = next((unit for unit in wishes if slots.take(unit)), None)
            if unit is None:
                homeless.append(piece)
            else:
                given.append((piece, unit))
        return given + list(zip(homeless, slots.rest(), strict=True))

    def _wishes(self, pieces: Sequence[Piece], way: Way) -> Iterator[tuple[Piece, Sequence[int]]]:
        """The units that store much of a piece: by what their node stores of it, then by what they do themselves."""
        at: dict[int, list[int]] = {}
        for u, unit in enumerate(way.units):
            for node in sorted({self._node[rank] for rank in unit}):
                at.setdefault(node, []).append(u)
        known: dict[int, Sequence[int]] = {}
        for piece in pieces:
            shares, nodes, ranks = self._what_matters(piece)
            wishes = known.get(id(shares))
            if wishes is None:
                near = sorted({u for node in nodes for u in at.get(node, ())})
                scores = {
                    u: (
                        max(nodes.get(self._node[rank], 0.0) for rank in way.units[u]),
                        sum(ranks.get(rank, 0.0) for rank in way.units[u]),
                    )
                    for u in near
                }
                # where all are equal, there is nothing to wish for
                alike = len(near) == len(way.units) and len(set(scores.values())) == 1
                wishes = () if alike else sorted(near, key=lambda u: (-scores[u][0], -scores[u][1], u))
                known[id(shares)] = wishes
            yield piece, wishes

    def _what_matters(self, piece: Piece) -> tuple[Shares, dict[int, float], dict[int, float]]:
        """Who stores a matrix of a piece, and the shares that matter by node and by rank."""
        spec = self._specs[piece.parameter]
        shares = spec.shares(piece.first)
        found = self._matter.get(id(shares))
        if found is None:
            nodes: Counter[int] = Counter()
            for rank, numel in shares.by_rank.items():
                nodes[self._node[rank]] += numel
            least = _MATTERS * shares.numel
            found = self._matter[id(shares)] = (
                shares,
                {node: numel / shares.numel for node, numel in nodes.items() if numel >= least},
                {rank: numel / shares.numel for rank, numel in shares.by_rank.items() if numel >= least},
            )
        return found


class _Slots:
    """How many pieces of a batch its units have still to get."""

    def __init__(self, packing: Packing, batch: Batch, way: Way, taken: Mapping[int, int]) -> None:
        self._packing = packing
        self._way = way
        self._numel = batch.numel
        self._left = dict(sorted(taken.items()))
        self._waiting: dict[tuple[int, int], list[int]] = {}
        if way.size == 1:
            for u in reversed(self._left):
                self._waiting.setdefault(self._filled(u), []).append(u)

    def take(self, u: int) -> bool:
        """Whether unit ``u`` can have a piece, its own or that of one which would be as full as it is then."""
        if self._left.get(u):
            self._left[u] -= 1
            return True
        if self._way.size > 1:
            return False
        load, numel = self._filled(u)
        key = (load + self._way.cost, numel + self._numel)
        waiting = self._waiting.get(key, [])
        while waiting and not (self._left[waiting[-1]] and self._filled(waiting[-1]) == key):
            waiting.pop()
        if not waiting:
            return False
        other = waiting.pop()
        self._left[other] -= 1
        for unit, sign in ((other, -1), (u, 1)):
            (rank,) = self._way.units[unit]
            self._packing.loads[rank] += sign * self._way.cost
            self._packing.numels[rank] += sign * self._numel
        return True

    def rest(self) -> Iterator[int]:
        """The units that still have room: each once, then those that have more, and so on."""
        left = {unit: number for unit, number in self._left.items() if number}
        while left:
            yield from left
            left = {unit: number - 1 for unit, number in left.items() if number > 1}

    def _filled(self, u: int) -> tuple[int, int]:
        (rank,) = self._way.units[u]
        return self._packing.loads[rank], self._packing.numels[rank]
