"""Who orthogonalizes what: owners of matrices, balanced over the ranks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distmuon.plan.boxes import Box
from distmuon.plan.nodes import Nodes
from distmuon.plan.parameters import ParameterSpec, stored_numel


@dataclass(frozen=True, slots=True)
class Assignment:
    """Consecutive matrices of one parameter, or a slab of each, and the rank that orthogonalizes them.

    Attributes:
        parameter: Place of the parameter among those planned.
        first: Its first matrix that is meant.
        count: Number of matrices.
        owner: The global rank.
        part: Which slab along the long side.
        parts: Number of slabs: the size of the team that owns the matrices, 1 for a single owner.
    """

    parameter: int
    first: int
    count: int
    owner: int
    part: int = 0
    parts: int = 1

    def box(self, spec: ParameterSpec) -> Box:
        """Its elements of the parameter ``spec``."""
        return spec.box_of(self.first, self.count, self.part, self.parts)

    def shape(self, spec: ParameterSpec) -> tuple[int, int]:
        """Rows and columns of each matrix, or of the slab of each."""
        sizes = self.box(spec).sizes[int(spec.stacked) :]
        return sizes[0], math.prod(sizes[1:])

    def cost(self, spec: ParameterSpec) -> int:
        """Time that its owner spends on it."""
        return self.count * spec.cost_of(self.parts)


@dataclass(frozen=True)
class _Piece:
    """Matrices that go to one owner, whoever that will be."""

    parameter: int
    first: int
    count: int
    candidates: tuple[int, ...]
    cost: int
    numel: int


def assign(specs: Sequence[ParameterSpec], *, most_numel: int, nodes: Nodes) -> list[Assignment]:
    """Give every matrix an owner.

    Owners are found by longest processing time first (Graham 1969: at most 4/3 of the best possible
    makespan): the costliest matrix goes to the rank with the least load, among equals to the one with the
    fewest elements so far, then to the one that stores most of it, then to the lowest. Where dealing the
    matrices out in turn would end sooner, that is taken. A matrix that some ranks store whole is owned by
    one of them, so it needs no gathering. A pure function of its arguments.

    Args:
        specs: The parameters.
        most_numel: Most elements of one assignment; a single matrix may exceed it.
        nodes: Which ranks share a node.

    Returns:
        Assignments that hold every matrix once, by parameter and first matrix.
    """
    pieces = [piece for index, spec in enumerate(specs) for piece in _pieces(index, spec, most_numel)]
    order = sorted(pieces, key=lambda piece: _place(specs[piece.parameter], piece))
    owners = min(_longest_first(specs, order), _in_turn(order), key=lambda owners: makespan(order, owners))
    assigned = [Assignment(p.parameter, p.first, p.count, owner) for p, owner in zip(order, owners, strict=True)]
    return sorted(assigned, key=lambda assignment: (assignment.parameter, assignment.first))


def makespan(pieces: Sequence[_Piece], owners: Sequence[int]) -> int:
    """Cost of the most loaded owner."""
    loads: Counter[int] = Counter()
    for piece, owner in zip(pieces, owners, strict=True):
        loads[owner] += piece.cost
    return max(loads.values(), default=0)


def _place(spec: ParameterSpec, piece: _Piece) -> tuple[object, ...]:
    """Costliest first; matrices of one shape, which share buckets, follow one another so that all ranks get some.

    The name, not the place in the list, breaks ties: ranks may list parameters in another order.
    """
    return -piece.cost, -piece.numel, spec.kind, spec.matrices.rows, spec.name, piece.first


def _pieces(index: int, spec: ParameterSpec, most_numel: int) -> Iterator[_Piece]:
    most = max(1, most_numel // spec.matrix_numel)
    for first, count in _spans(spec):
        candidates = _candidates(spec, spec.box_of(first, count))
        # a stack is cut into as many parts as can own one, so that few, large copies move it
        size = min(most, -(-count // len(candidates)))
        for start in range(first, first + count, size):
            number = min(size, first + count - start)
            yield _Piece(index, start, number, candidates, number * spec.cost, number * spec.matrix_numel)


def _spans(spec: ParameterSpec) -> list[tuple[int, int]]:
    """``(first, count)`` of runs of matrices that are stored alike."""
    if not spec.stacked:
        return [(0, 1)]
    cuts = {0, spec.shape[0]}
    for holding in spec.holdings:
        if holding.box.numel:
            cuts.update((holding.box.offsets[0], holding.box.offsets[0] + holding.box.sizes[0]))
    ordered = sorted(cuts)
    return [(start, stop - start) for start, stop in itertools.pairwise(ordered)]


def _candidates(spec: ParameterSpec, box: Box) -> tuple[int, ...]:
    stored = stored_numel(spec.holdings, box)
    whole = tuple(rank for rank, numel in stored.items() if numel == box.numel)
    return whole or tuple(holding.rank for holding in spec.holdings)


def _longest_first(specs: Sequence[ParameterSpec], order: Sequence[_Piece]) -> list[int]:
    loads: Counter[int] = Counter()
    numels: Counter[int] = Counter()
    owners = {}
    # what only one rank can own is known beforehand
    for number, piece in sorted(enumerate(order), key=lambda item: len(item[1].candidates) > 1):
        spec = specs[piece.parameter]
        stored = stored_numel(spec.holdings, spec.box_of(piece.first, piece.count))
        owner = min(piece.candidates, key=lambda rank: (loads[rank], numels[rank], -stored.get(rank, 0), rank))
        loads[owner] += piece.cost
        numels[owner] += piece.numel
        owners[number] = owner
    return [owners[number] for number in range(len(order))]


def _in_turn(order: Sequence[_Piece]) -> list[int]:
    return [piece.candidates[number % len(piece.candidates)] for number, piece in enumerate(order)]


def balance(loads: Mapping[int, int], ranks: Sequence[int]) -> float:
    """Load of the busiest rank over the mean, 1.0 at best."""
    total = sum(loads.values())
    return max(loads.values()) * len(ranks) / total if total else 1.0


def lots(numels: Sequence[int], most: int) -> list[int]:
    """Cut a row of sizes into lots of at most ``most`` (or one size); the lot of each."""
    ends = [0]
    numbers = []
    filled = 0
    for numel in numels:
        if filled and filled + numel > most:
            ends.append(ends[-1] + 1)
            filled = 0
        filled += numel
        numbers.append(ends[-1])
    return numbers
