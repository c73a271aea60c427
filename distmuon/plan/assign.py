"""Who orthogonalizes what: owners of matrices, balanced over the ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distmuon.plan.boxes import Box
from distmuon.plan.homes import Homes
from distmuon.plan.molds import mold
from distmuon.plan.nodes import Nodes
from distmuon.plan.parameters import ParameterSpec
from distmuon.plan.pieces import batches_of


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


def assign(specs: Sequence[ParameterSpec], *, most_numel: int, nodes: Nodes) -> list[Assignment]:
    """Give every matrix an owner, or a team of them.

    Three costs count, in this order: time to orthogonalize (the makespan, :func:`~distmuon.plan.molds.mold`; what is
    within half a percent of the best counts as equal, and teams must bring two percent), the elements that the rank
    owns that owns most, which arrive over its links and fill its memory, and the elements that cross nodes
    (:class:`~distmuon.plan.homes.Homes`). A matrix that some ranks store whole is owned by one of them, so it needs no
    gathering, unless a team shortens the makespan. A pure function of its arguments.

    Args:
        specs: The parameters.
        most_numel: Most elements of one assignment; a single matrix may exceed it.
        nodes: Which ranks share a node.

    Returns:
        Assignments that hold every matrix once, by parameter, first matrix, and slab.
    """
    batches = batches_of(specs, most_numel=most_numel, nodes=nodes)
    world = 1 + max(map(max, nodes))
    packing = mold(batches, world=world, ranks=sum(map(len, nodes)))
    homes = Homes(specs, nodes, packing)
    assigned = []
    for b, batch in enumerate(batches):
        start = 0
        for w, way in enumerate(batch.ways):
            taken = packing.placed.get((b, w), {})
            stop = start + sum(taken.values())
            for piece, unit in homes.give(batch, way, batch.pieces[start:stop], taken):
                for part, owner in enumerate(way.units[unit]):
                    assigned.append(Assignment(piece.parameter, piece.first, piece.count, owner, part, way.size))
            start = stop
    return sorted(assigned, key=lambda a: (a.parameter, a.first, a.part))


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
