"""Buckets: matrices of one shape that are orthogonalized together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.plan.assign import Assignment, lots
from distmuon.plan.layouts import Shares
from distmuon.plan.parameters import ParameterSpec


@dataclass(frozen=True)
class Bucket:
    """Matrices of one shape that go through the step together.

    Attributes:
        rows: Rows of every matrix.
        cols: Columns of every matrix.
        parts: How many ranks own each matrix together, every one a slab of it; 1: single owners.
        assignments: What is in it and who owns it.
        gathers: Whether any matrix has to be moved to its owner.
        scatters: Whether any update has to be moved from its owner.
        replicated: Whether every rank of the plan stores all of it.
        returns: Elements of updates that come back to a rank, at most.
        sends: By owner: elements of updates that leave it, a copy for each replica.
    """

    rows: int
    cols: int
    parts: int
    assignments: tuple[Assignment, ...]
    gathers: bool
    scatters: bool
    replicated: bool
    returns: int
    sends: tuple[tuple[int, int], ...]

    def owned_numel(self) -> Counter[int]:
        """Elements by owner."""
        owned: Counter[int] = Counter()
        for assignment in self.assignments:
            # an even share: the largest slab of a team may be larger by a row, or by what one input channel takes
            owned[assignment.owner] += assignment.count * -(-self.rows * self.cols // self.parts)
        return owned


def buckets_of(
    assigned: Sequence[Assignment], parameters: Sequence[ParameterSpec], ranks: tuple[int, ...], bucket_numel: int
) -> tuple[Bucket, ...]:
    """Put matrices of equal shape together.

    Args:
        assigned: Who owns what, by parameter, first matrix, and slab.
        parameters: What is planned.
        ranks: The global ranks that take part.
        bucket_numel: Most elements that one rank owns of a bucket; a single matrix may exceed it.
    """
    classes: dict[tuple[int, int, str, int, int], list[Assignment]] = {}
    costs: Counter[tuple[int, int, str, int, int]] = Counter()
    for assignment in assigned:
        spec, parts = parameters[assignment.parameter], assignment.parts
        # flattened convolutions are cut between input channels, so their slabs may differ from those of a matrix
        extent = spec.shape[spec.slab_axis] if parts > 1 else 0
        key = (spec.matrices.rows, spec.matrices.cols, spec.kind, parts, extent)
        classes.setdefault(key, []).append(assignment)
        costs[key] = max(costs[key], spec.cost_of(parts))
    buckets = []
    # teams first, while all their ranks are free, then what takes longest, so that little is left to send at the end
    for key in sorted(classes, key=lambda key: (-key[3], -costs[key], key)):
        rows, cols, _, parts, _ = key
        for lot in _cut(classes[key], parameters, bucket_numel):
            buckets.append(_bucket(rows, cols, parts, lot, parameters, ranks))
    return tuple(buckets)


def _cut(
    members: Sequence[Assignment], parameters: Sequence[ParameterSpec], bucket_numel: int
) -> list[list[Assignment]]:
    """Cut matrices of one shape into buckets, of which each owner has its next lot."""
    by_owner: dict[int, list[int]] = {}
    for place, assignment in enumerate(members):
        by_owner.setdefault(assignment.owner, []).append(place)
    lot_of = [0] * len(members)
    for owned in by_owner.values():
        # rounded up, so that the slabs of a team, all of whose ranks own the same matrices, are in one lot
        numels = [
            members[p].count * -(-parameters[members[p].parameter].matrix_numel // members[p].parts) for p in owned
        ]
        for place, lot in zip(owned, lots(numels, bucket_numel), strict=True):
            lot_of[place] = lot
    buckets: list[list[Assignment]] = [[] for _ in range(1 + max(lot_of))]
    for place, assignment in enumerate(members):
        buckets[lot_of[place]].append(assignment)
    return buckets


def _shares(parameters: Sequence[ParameterSpec], assignment: Assignment) -> Shares:
    """Who stores how much of each matrix, or slab, of an assignment."""
    return parameters[assignment.parameter].shares(assignment.first, assignment.part, assignment.parts)


def _bucket(
    rows: int,
    cols: int,
    parts: int,
    members: Sequence[Assignment],
    parameters: Sequence[ParameterSpec],
    ranks: tuple[int, ...],
) -> Bucket:
    gathers = scatters = False
    replicated = len(ranks) > 1
    sends: Counter[int] = Counter()
    kept: Counter[int] = Counter()
    # matrices by how they are stored, as most are stored alike
    alike: dict[int, tuple[Shares, int]] = {}
    for assignment in members:
        shares, count = _shares(parameters, assignment), assignment.count
        own = shares.by_rank.get(assignment.owner, 0)
        gathers |= own != shares.numel
        scatters |= len(shares.by_rank) > (assignment.owner in shares.by_rank)
        replicated &= len(shares.wholes) == len(ranks)
        companion = parameters[assignment.parameter].companion
        if companion is not None:
            # a rank without any of the columns keeps a copy of what belongs to the rows
            box = companion.box_of(assignment.first, assignment.count)
            scatters |= any(holding.rank != assignment.owner for holding, _ in companion.layout.meeting(box))
        sends[assignment.owner] += count * (shares.stored - own)
        kept[assignment.owner] += count * own
        _, before = alike.get(id(shares), (shares, 0))
        alike[id(shares)] = shares, before + count
    stored: Counter[int] = Counter()
    for shares, count in alike.values():
        for rank, numel in shares.by_rank.items():
            stored[rank] += count * numel
    returns = max((numel - kept[rank] for rank, numel in stored.items()), default=0)
    leaving = tuple(sorted(sends.items()))
    return Bucket(rows, cols, parts, tuple(members), gathers, scatters, replicated, returns, leaving)
