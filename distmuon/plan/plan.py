"""The plan of a step: owners, and the buckets that are exchanged and orthogonalized together."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.plan.assign import Assignment, assign, balance, lots
from distmuon.plan.layouts import Shares
from distmuon.plan.nodes import Nodes, one_node, teams_of
from distmuon.plan.parameters import ParameterSpec, check_cover

# Updates that come back to a rank in one exchange may take this many times what it may own of a bucket
_RETURNING = 8


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
        legs: In how many exchanges these come back.
    """

    rows: int
    cols: int
    parts: int
    assignments: tuple[Assignment, ...]
    gathers: bool
    scatters: bool
    replicated: bool
    returns: int = 0
    legs: int = 1

    def owned_numel(self) -> Counter[int]:
        """Elements by owner."""
        owned: Counter[int] = Counter()
        for assignment in self.assignments:
            # the slabs of a team differ by less than a row of the long side
            owned[assignment.owner] += assignment.count * -(-self.rows * self.cols // self.parts)
        return owned


@dataclass(frozen=True)
class Plan:
    """Who does what in a step. Equal on every rank, and never saved.

    Attributes:
        ranks: The global ranks that take part, ascending.
        parameters: What is planned.
        buckets: In the order in which they are run.
        nodes: Which of them share a node.
    """

    ranks: tuple[int, ...]
    parameters: tuple[ParameterSpec, ...]
    buckets: tuple[Bucket, ...]
    nodes: Nodes

    def loads(self) -> dict[int, int]:
        """Cost by owner."""
        loads: Counter[int] = Counter()
        for bucket in self.buckets:
            for assignment in bucket.assignments:
                loads[assignment.owner] += assignment.cost(self.parameters[assignment.parameter])
        return dict(loads)

    @functools.cached_property
    def teams(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each team that owns a matrix, ascending; the teams by size."""
        sizes = {bucket.parts for bucket in self.buckets if bucket.parts > 1}
        owners = {(b.parts, a.owner) for b in self.buckets for a in b.assignments if b.parts > 1}
        return tuple(team for size in sorted(sizes) for team in teams_of(self.nodes, size) if (size, team[0]) in owners)

    @functools.cached_property
    def sole_owners(self) -> dict[int, int]:
        """The owner of each parameter that every rank stores whole and one rank owns whole, by place."""
        owners: dict[int, set[int]] = {}
        apart = set()
        for bucket in self.buckets:
            for assignment in bucket.assignments:
                owners.setdefault(assignment.parameter, set()).add(assignment.owner)
                if not bucket.replicated:
                    apart.add(assignment.parameter)
        return {place: next(iter(found)) for place, found in owners.items() if len(found) == 1 and place not in apart}

    @property
    def imbalance(self) -> float:
        """Cost of the busiest rank over the mean, 1.0 at best."""
        return balance(self.loads(), self.ranks)

    def digest(self) -> str:
        """SHA-256 of everything in the plan, the same in every process that made the same plan."""
        sha = hashlib.sha256(repr((self.ranks, self.buckets, self.nodes)).encode())
        for spec in self.parameters:
            sha.update(spec.digest().encode())
        return sha.hexdigest()


def build_plan(
    parameters: Sequence[ParameterSpec], *, ranks: Sequence[int], bucket_numel: int, nodes: Nodes | None = None
) -> Plan:
    """Choose owners, single ones or teams, and put matrices of equal shape together.

    A pure function of its arguments: it reads no rank, clock or hash seed.

    Args:
        parameters: What is to be planned.
        ranks: The global ranks that take part.
        bucket_numel: Most elements that one rank owns of a bucket; a single matrix may exceed it.
        nodes: Which ranks share a node; None: all do.

    Returns:
        A plan whose buckets hold every matrix once.

    Raises:
        ValueError: if the shards of a parameter do not make up the parameter.
    """
    looked_at: set[tuple[tuple[int, ...], int]] = set()
    for spec in parameters:
        # models repeat a few layouts hundreds of times
        if (spec.shape, id(spec.layout)) not in looked_at:
            looked_at.add((spec.shape, id(spec.layout)))
            check_cover(spec)
    ordered = tuple(sorted(ranks))
    nodes = nodes or one_node(ordered)
    classes: dict[tuple[int, int, str, int, int], list[Assignment]] = {}
    costs: Counter[tuple[int, int, str, int, int]] = Counter()
    for assignment in assign(parameters, most_numel=bucket_numel, nodes=nodes):
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
            buckets.append(_bucket(rows, cols, parts, lot, parameters, ordered, bucket_numel))
    return Plan(ordered, tuple(parameters), tuple(buckets), nodes)


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
    bucket_numel: int,
) -> Bucket:
    gathers = scatters = False
    replicated = True
    returns = 0
    for assignment in members:
        shares = _shares(parameters, assignment)
        gathers |= shares.by_rank.get(assignment.owner, 0) != shares.numel
        scatters |= len(shares.by_rank) > (assignment.owner in shares.by_rank)
        replicated &= len(shares.wholes) == len(ranks)
        returns += assignment.count * shares.most
    replicated &= len(ranks) > 1
    # no more than there are rows, or columns, to send
    legs = min(-(-returns // (_RETURNING * bucket_numel)), max(rows, cols)) if scatters else 1
    return Bucket(rows, cols, parts, tuple(members), gathers, scatters, replicated, returns, legs)
