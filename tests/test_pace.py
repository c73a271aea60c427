"""Buckets are cut finer where more overlap pays, and nothing else of a plan changes."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_models import models, spec
from test_plan import matrices_of

from distmuon.plan.boxes import Box
from distmuon.plan.pace import Pace, paced, plan_step
from distmuon.plan.parameters import Holding
from distmuon.plan.plan import build_plan
from distmuon.plan.simulate import GLOO, NCCL, simulate
from distmuon.speeds import Link, Speeds

FREE = Link(0.0, 0.0, 0.0, 0.0)
# an element takes a second on its way, or a nanosecond to be orthogonalized
SLOW = Link(0.0, 1.0, 1.0, 1.0)


def halves(count, rows=4, cols=8, cost=1):
    """Matrices whose rows are halved over two ranks; ``cost`` in seconds."""
    held = tuple(Holding(rank, Box((rank * rows // 2, 0), (rows // 2, cols))) for rank in (0, 1))
    found = [spec(f"w{number}", (rows, cols), held) for number in range(count)]
    return [dataclasses.replace(one, cost=cost * 10**9) for one in found]


def owners(plan):
    return {
        (*matrix, a.part): (a.owner, a.parts)
        for bucket in plan.buckets
        for a in bucket.assignments
        for matrix in matrices_of(a)
    }


links = st.floats(0, 1e3, allow_nan=False).map(lambda rate: Link(rate / 100, rate, rate, rate))
paces = st.builds(
    Pace,
    st.builds(Speeds, links, links, bucket=st.floats(0, 10)),
    itemsize=st.sampled_from([2, 4]),
    transport=st.sampled_from([NCCL, GLOO]),
    least_numel=st.integers(1, 20),
)


@given(models(), paces)
def test_owners_stay_buckets_stay_in_bounds_and_the_step_ends_no_later(drawn, pace):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    found = paced(plan, bucket_numel, pace)
    assert owners(found) == owners(plan)
    assert found.loads() == plan.loads()
    for bucket in found.buckets:
        for numel in bucket.owned_numel().values():
            assert numel <= max(bucket_numel, -(-bucket.rows * bucket.cols // bucket.parts))
    first, last = (
        simulate(p, pace.speeds, itemsize=pace.itemsize, transport=pace.transport).seconds
        + pace.speeds.bucket * len(p.buckets)
        for p in (plan, found)
    )
    assert last <= first
    assert paced(plan, bucket_numel, pace) == found


def test_what_is_waited_for_falls_with_the_buckets():
    # 2 ranks own 8 matrices each: half of each comes from the other rank, in 16 s, and it is orthogonalized in 64 s
    specs = halves(16, cost=64)
    pace = Pace(Speeds(SLOW, SLOW), itemsize=1)
    at_once = plan_step(specs, ranks=(0, 1), nodes=None, bucket_bytes=math.inf, pace=pace)
    cut = plan_step(specs, ranks=(0, 1), nodes=None, bucket_bytes=1 << 20, pace=pace)
    assert (len(at_once.buckets), len(cut.buckets)) == (1, 8)
    seconds = [simulate(plan, pace.speeds, itemsize=1).seconds for plan in (at_once, cut)]
    # beside computing, all gathers and updates are waited for; with buckets of one the first and the last
    assert seconds == [8 * 64 + 8 * 16 + 8 * 16, 8 * 64 + 16 + 16]


@pytest.mark.parametrize(
    "speeds",
    [Speeds(FREE, FREE), Speeds(FREE, FREE, bucket=1.0), Speeds(SLOW, SLOW, bucket=1e6)],
    ids=["nothing to hide", "nothing to hide and buckets cost", "buckets cost more than they hide"],
)
def test_a_plan_stays_where_a_cut_brings_nothing(speeds):
    plan = build_plan(halves(16), ranks=(0, 1), bucket_numel=1 << 20)
    assert paced(plan, 1 << 20, Pace(speeds, itemsize=1)) == plan


def test_lots_keep_what_a_device_needs_to_be_busy():
    plan = build_plan(halves(16, cost=64), ranks=(0, 1), bucket_numel=1 << 20)
    found = paced(plan, 1 << 20, Pace(Speeds(SLOW, SLOW), itemsize=1, least_numel=2 * 32))
    assert min(min(bucket.owned_numel().values()) for bucket in found.buckets) == 2 * 32


def test_stacks_are_cut_between_their_matrices():
    held = tuple(Holding(rank, Box((0, 2 * rank, 0), (8, 2, 8))) for rank in (0, 1))
    stack = dataclasses.replace(spec("experts", (8, 4, 8), held), cost=10**10)
    plan = build_plan([stack], ranks=(0, 1), bucket_numel=1 << 20)
    assert max(a.count for bucket in plan.buckets for a in bucket.assignments) > 1
    found = paced(plan, 1 << 20, Pace(Speeds(SLOW, SLOW), itemsize=1))
    assert len(found.buckets) > len(plan.buckets)
    assert owners(found) == owners(plan)


def test_one_rank_and_no_matrix_are_left_alone():
    pace = Pace(Speeds(SLOW, SLOW), itemsize=1)
    alone = Holding(0, Box((0, 0), (4, 8)))
    for specs, ranks in (([spec("w", (4, 8), (alone,))] * 3, (0,)), ([], (0, 1))):
        plan = build_plan(specs, ranks=ranks, bucket_numel=1 << 20)
        assert paced(plan, 1 << 20, pace) == plan
