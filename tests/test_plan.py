"""Plans without process groups: every matrix has one owner, every element one way there and back."""

import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_models import holdings, models, spec

from distmuon.plan.assign import assign
from distmuon.plan.boxes import Box
from distmuon.plan.matrices import matrix_spec
from distmuon.plan.nodes import one_node
from distmuon.plan.parameters import Holding
from distmuon.plan.plan import build_plan
from distmuon.plan.routes import route


def matrices_of(assignment):
    return [(assignment.parameter, first) for first in range(assignment.first, assignment.first + assignment.count)]


@given(models())
def test_every_matrix_is_owned_once_in_a_bucket_of_its_shape(drawn):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    found = [matrix for b in plan.buckets for a in b.assignments if a.part == 0 for matrix in matrices_of(a)]
    everything = [(number, first) for number, s in enumerate(specs) for first in range(s.matrices.count)]
    assert sorted(found) == everything
    for bucket in plan.buckets:
        members = [specs[assignment.parameter] for assignment in bucket.assignments]
        assert {(m.matrices.rows, m.matrices.cols) for m in members} == {(bucket.rows, bucket.cols)}
        assert len({m.kind for m in members}) == 1
        for owner, numel in bucket.owned_numel().items():
            assert owner in ranks
            assert numel <= max(bucket_numel, -(-bucket.rows * bucket.cols // bucket.parts))


@given(models())
def test_teams_run_before_single_owners_and_what_takes_long_before_what_does_not(drawn):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    order = [(-b.parts, -max(s.cost_of(b.parts) for s in shapes(specs, plan, b))) for b in plan.buckets]
    assert order == sorted(order)


def shapes(specs, plan, bucket):
    """The parameters of every bucket of the same class, which share their place in the order."""
    kind = specs[bucket.assignments[0].parameter].kind
    key = (bucket.rows, bucket.cols, bucket.parts)
    return [
        specs[a.parameter]
        for b in plan.buckets
        if (b.rows, b.cols, b.parts) == key and specs[b.assignments[0].parameter].kind == kind
        for a in b.assignments
    ]


def loads(specs, assignments, ranks):
    found = dict.fromkeys(ranks, 0)
    for a in assignments:
        found[a.owner] += a.cost(specs[a.parameter])
    return found


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 3))
def test_makespan_is_within_four_thirds_of_the_best(sizes, world):
    ranks = tuple(range(world))
    specs = [
        spec(f"w{i}", (2, 2), holdings((2, 2), ranks, axis=0, replicas=1), cost=size) for i, size in enumerate(sizes)
    ]
    makespan = max(loads(specs, assign(specs, most_numel=10**9, nodes=one_node(ranks)), ranks).values())
    best = min(
        max(sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in ranks)
        for owners in itertools.product(ranks, repeat=len(sizes))
    )
    assert 3 * makespan <= 4 * best


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9))
def test_never_worse_than_dealing_out_in_turn(sizes, world):
    ranks = tuple(range(world))
    shape = (2 * world, 2)
    specs = [
        spec(f"w{i:03}", shape, holdings(shape, ranks, axis=0, replicas=1), cost=size) for i, size in enumerate(sizes)
    ]
    makespan = max(loads(specs, assign(specs, most_numel=10**9, nodes=one_node(ranks)), ranks).values())
    ordered = sorted(sizes, reverse=True)
    assert makespan <= max(sum(ordered[rank::world]) for rank in ranks)


def test_gpt2_on_8_ranks_is_balanced():
    ranks = tuple(range(8))
    specs = []
    for layer in range(12):
        for name, shape in {"q": (768, 768), "k": (768, 768), "v": (768, 768), "o": (768, 768)}.items():
            specs.append(spec(f"{layer}.{name}", shape, holdings(shape, ranks, axis=0, replicas=1)))
        for name, shape in {"up": (3072, 768), "down": (768, 3072)}.items():
            specs.append(spec(f"{layer}.{name}", shape, holdings(shape, ranks, axis=0, replicas=1)))
    assert build_plan(specs, ranks=ranks, bucket_numel=1 << 26).imbalance <= 1.01


def test_owners_are_spread_over_replicas():
    ranks = tuple(range(4))
    specs = [spec(f"w{i}", (8, 8), holdings((8, 8), ranks, axis=0, replicas=2)) for i in range(8)]
    plan = build_plan(specs, ranks=ranks, bucket_numel=1 << 20)
    owners = [assignment.owner for bucket in plan.buckets for assignment in bucket.assignments]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]
    for wave in plan.waves:
        for rank in ranks:
            gather = route(plan, wave, rank, active=None, all_gather=False).gather
            # shards come from the owner's own replica, {0, 1} or {2, 3}
            assert all(n == 0 or (r < 2) == (rank < 2) for r, n in enumerate(gather.receive_splits))


def test_experts_that_are_whole_somewhere_stay_there():
    ranks = tuple(range(4))
    specs = [spec("experts", (8, 6, 4), holdings((8, 6, 4), ranks, axis=0, replicas=1))]
    plan = build_plan(specs, ranks=ranks, bucket_numel=1 << 20)
    assert not any(bucket.gathers or bucket.scatters for bucket in plan.buckets)
    assert [a.owner for a in assign(specs, most_numel=1 << 20, nodes=one_node(ranks))] == [0, 1, 2, 3]


def test_a_matrix_is_owned_where_most_of_it_lives():
    uneven = (
        Holding(0, Box((0, 0), (2, 4))),
        Holding(1, Box((2, 0), (7, 4))),
        Holding(2, Box((9, 0), (1, 4))),
    )
    assert [a.owner for a in assign([spec("w", (10, 4), uneven)], most_numel=10**9, nodes=one_node((0, 1, 2)))] == [1]


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (3, 4)), ((2, 0), (2, 4))],
        [((0, 0), (2, 4)), ((3, 0), (1, 4))],
        [((0, 0), (2, 4)), ((2, 0), (3, 4))],
    ],
)
def test_shards_that_do_not_make_up_the_parameter_are_an_error(boxes):
    held = tuple(Holding(rank, Box(*box)) for rank, box in enumerate(boxes))
    with pytest.raises(ValueError, match=r"'odd', shape \(4, 4\), do not cover it once"):
        build_plan([spec("odd", (4, 4), held)], ranks=(0, 1), bucket_numel=100)


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from plan_models import holdings, in_nodes, spec
from distmuon.plan.parameters import TeamCost
from distmuon.plan.plan import build_plan
ranks = tuple(range(6))
shapes = [(8, 8), (6, 24), (24, 6), (4, 6, 6), (5, 7)] * 3 + [(8, 8)]
teams = (TeamCost(2, 600), TeamCost(3, 450))
specs = [
    spec("w%d" % i, s, holdings(s, ranks, axis=0, replicas=1 + i % 2), cost=1000 + i // 2, teams=teams)
    for i, s in enumerate(shapes)
]
plan = build_plan(specs, ranks=ranks, bucket_numel=300, nodes=in_nodes(ranks, 3))
assert any(bucket.parts > 1 for bucket in plan.buckets)
print(plan.digest())
"""


def test_the_plan_depends_on_no_hash_seed():
    code = PROGRAM.format(tests=os.path.dirname(__file__))
    digests = set()
    for seed in ("0", "1", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


@given(models())
def test_the_order_of_parameters_changes_no_owner(drawn):
    _, specs, bucket_numel, nodes = drawn
    owners = named(specs, assign(specs, most_numel=bucket_numel, nodes=nodes))
    backwards = specs[::-1]
    assert owners == named(backwards, assign(backwards, most_numel=bucket_numel, nodes=nodes))


def named(specs, assignments):
    return {(specs[a.parameter].name, a.first, a.part): (a.owner, a.count, a.parts) for a in assignments}


@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=5), flatten=st.booleans())
def test_a_spec_covers_its_parameter(shape, flatten):
    if len(shape) > 3 and not flatten:
        with pytest.raises(ValueError, match="matrix axes are not known"):
            matrix_spec("w", shape, flatten=flatten)
        return
    found = matrix_spec("w", shape, flatten=flatten)
    product = 1
    for size in shape:
        product *= size
    assert found.numel == product
    assert found.count == (shape[0] if len(shape) == 3 and not flatten else 1)


def test_buckets_of_other_owners_travel_together():
    """Twice as many ranks as matrices of either shape: one exchange for all of them, with all owners' links in use."""
    ranks = tuple(range(8))
    specs = [spec(f"a{i}", (8, 16), holdings((8, 16), ranks, axis=0, replicas=1)) for i in range(4)]
    specs += [spec(f"b{i}", (8, 12), holdings((8, 12), ranks, axis=0, replicas=1)) for i in range(4)]
    plan = build_plan(specs, ranks=ranks, bucket_numel=1 << 20)
    assert len(plan.buckets) == 2
    (wave,) = plan.waves
    assert wave.buckets == plan.buckets
    assert max(wave.owned_numel().values()) == 8 * 16


def test_buckets_of_the_same_owners_travel_one_after_another():
    ranks = tuple(range(4))
    specs = [spec(f"a{i}", (8, 16), holdings((8, 16), ranks, axis=0, replicas=1)) for i in range(4)]
    specs += [spec(f"b{i}", (8, 12), holdings((8, 12), ranks, axis=0, replicas=1)) for i in range(4)]
    plan = build_plan(specs, ranks=ranks, bucket_numel=1 << 20)
    assert [len(wave.buckets) for wave in plan.waves] == [1, 1]


@given(models())
def test_waves_are_the_buckets_in_their_order_and_no_rank_owns_more(drawn):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    assert tuple(bucket for wave in plan.waves for bucket in wave.buckets) == plan.buckets
    assert [wave.first for wave in plan.waves] == [plan.buckets.index(wave.buckets[0]) for wave in plan.waves]
    for wave in plan.waves:
        alone = max(max(bucket.owned_numel().values()) for bucket in wave.buckets)
        assert max(wave.owned_numel().values()) <= max(alone, bucket_numel)
