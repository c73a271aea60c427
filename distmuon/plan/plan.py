"""The plan of a step: owners, and the buckets that are exchanged and orthogonalized together."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.plan.assign import assign, balance
from distmuon.plan.buckets import Bucket, buckets_of
from distmuon.plan.layouts import forget
from distmuon.plan.nodes import Nodes, one_node, teams_of
from distmuon.plan.parameters import ParameterSpec, check_cover
from distmuon.plan.waves import Wave, waves_of


@dataclass(frozen=True)
class Plan:
    """Who does what in a step. Equal on every rank, and never saved.

    Attributes:
        ranks: The global ranks that take part, ascending.
        parameters: What is planned.
        buckets: In the order in which they are run.
        nodes: Which of them share a node.
        waves: The buckets again, in the order in which they are exchanged.
    """

    ranks: tuple[int, ...]
    parameters: tuple[ParameterSpec, ...]
    buckets: tuple[Bucket, ...]
    nodes: Nodes
    waves: tuple[Wave, ...]

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
        """The owner of each whole parameter that every rank stores and one rank owns, by place."""
        owners: dict[int, set[int]] = {}
        apart = set()
        for bucket in self.buckets:
            for assignment in bucket.assignments:
                owners.setdefault(assignment.parameter, set()).add(assignment.owner)
                if not (bucket.replicated and self.parameters[assignment.parameter].whole):
                    apart.add(assignment.parameter)
        return {place: next(iter(found)) for place, found in owners.items() if len(found) == 1 and place not in apart}

    @property
    def imbalance(self) -> float:
        """Cost of the busiest rank over the mean, 1.0 at best."""
        return balance(self.loads(), self.ranks)

    def digest(self) -> str:
        """SHA-256 of everything in the plan, the same in every process that made the same plan."""
        sha = hashlib.sha256(repr((self.ranks, self.waves, self.nodes)).encode())
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
    assigned = assign(parameters, most_numel=bucket_numel, nodes=nodes)
    buckets = buckets_of(assigned, parameters, ordered, bucket_numel)
    forget()
    return Plan(ordered, tuple(parameters), buckets, nodes, waves_of(buckets, bucket_numel))
