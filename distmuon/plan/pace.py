"""How finely buckets are cut: so that one is orthogonalized while others are on their way.

With all matrices of a shape in one bucket nothing overlaps: ranks wait for all of the gather, and then for all of the
updates. Cut into n buckets, about 1/n of both is left to wait for, and each bucket costs a start of its own. A small
model fits into one bucket of the bound on memory, so the bound alone would leave it without overlap.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distmuon.plan.assign import Assignment
from distmuon.plan.buckets import buckets_of
from distmuon.plan.nodes import Nodes
from distmuon.plan.parameters import ParameterSpec
from distmuon.plan.plan import Plan, build_plan
from distmuon.plan.simulate import NCCL, Transport, simulate
from distmuon.plan.waves import waves_of
from distmuon.speeds import Speeds

# Of so many buckets the first gather and the last update, which nothing hides, are a small share
_ENOUGH = 64


@dataclass(frozen=True)
class Pace:
    """What decides how finely buckets are cut; the same on every rank.

    Attributes:
        speeds: Of links and memory, and what a bucket costs beside its matrices.
        itemsize: Bytes of an element on the wire.
        transport: How collectives are run.
        least_numel: Elements that a rank should have of a bucket to keep its device busy.
    """

    speeds: Speeds
    itemsize: int
    transport: Transport = NCCL
    least_numel: int = 1


def plan_step(
    parameters: Sequence[ParameterSpec], *, ranks: Sequence[int], nodes: Nodes | None, bucket_bytes: float, pace: Pace
) -> Plan:
    """Plan a step.

    Args:
        parameters: What is planned.
        ranks: The global ranks that take part.
        nodes: Which of them share a node; None: all do.
        bucket_bytes: Most bytes on the wire that one rank owns of a bucket. ``inf``: all matrices of a shape are one
            bucket, and of it nothing overlaps.
        pace: What moving them takes.
    """
    unbound = math.isinf(bucket_bytes)
    numel = sys.maxsize if unbound else max(1, int(bucket_bytes) // pace.itemsize)
    plan = build_plan(parameters, ranks=ranks, bucket_numel=numel, nodes=nodes)
    return plan if unbound else paced(plan, numel, pace)


def paced(plan: Plan, most_numel: int, pace: Pace) -> Plan:
    """The plan with buckets cut in halves as often as a step then ends sooner, by simulation.

    If it then ends sooner still, the smallest bucket is the first. Owners stay as they are. A pure function of its
    arguments.

    Args:
        plan: What to do, in buckets as large as memory allows.
        most_numel: How large that is: elements that one rank owns; a single matrix may exceed it.
        pace: What moving them takes.
    """
    if len(plan.ranks) == 1 or not 0 < len(plan.buckets) < _ENOUGH:
        return plan
    best, least, bound = plan, _seconds(plan, pace), most_numel
    numel = min(most_numel, max(max(bucket.owned_numel().values()) for bucket in plan.buckets))
    while numel // 2 >= pace.least_numel and _divisible(best):
        numel //= 2
        finer = _recut(plan, numel)
        if len(finer.buckets) == len(best.buckets):
            continue
        seconds = _seconds(finer, pace)
        if seconds >= least:
            break
        best, least, bound = finer, seconds, numel
    opened = _opened(best, bound)
    return opened if _seconds(opened, pace) < least else best


def _seconds(plan: Plan, pace: Pace) -> float:
    found = simulate(plan, pace.speeds, itemsize=pace.itemsize, transport=pace.transport)
    return found.seconds + pace.speeds.bucket * len(plan.buckets)


def _divisible(plan: Plan) -> bool:
    """Whether any rank owns more than one matrix of a bucket."""
    for bucket in plan.buckets:
        owned: Counter[int] = Counter()
        for assignment in bucket.assignments:
            owned[assignment.owner] += assignment.count
        if max(owned.values()) > 1:
            return True
    return False


def _recut(plan: Plan, numel: int) -> Plan:
    assigned = [
        part for bucket in plan.buckets for a in bucket.assignments for part in _runs(a, plan.parameters, numel)
    ]
    assigned.sort(key=lambda a: (a.parameter, a.first, a.part))
    buckets = buckets_of(assigned, plan.parameters, plan.ranks, numel)
    return dataclasses.replace(plan, buckets=buckets, waves=waves_of(buckets, numel))


def _opened(plan: Plan, numel: int) -> Plan:
    """The same with the smallest bucket first, for whose gather all ranks wait."""
    first = min(plan.buckets, key=lambda bucket: sum(bucket.owned_numel().values()))
    buckets = (first, *(bucket for bucket in plan.buckets if bucket is not first))
    return dataclasses.replace(plan, buckets=buckets, waves=waves_of(buckets, numel))


def _runs(assignment: Assignment, parameters: Sequence[ParameterSpec], numel: int) -> Iterator[Assignment]:
    """Consecutive matrices of a stack, a run of at most ``numel`` elements at a time."""
    one = -(-parameters[assignment.parameter].matrix_numel // assignment.parts)
    most = max(1, numel // one)
    for start in range(0, assignment.count, most):
        count = min(most, assignment.count - start)
        yield dataclasses.replace(assignment, first=assignment.first + start, count=count)
