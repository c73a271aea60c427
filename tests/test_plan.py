"""Plans without process groups: every matrix has one owner, every element one way there and back."""

import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmuon.plan.assign import assign
from distmuon.plan.boxes import Box
from distmuon.plan.matrices import matrix_spec
from distmuon.plan.nodes import one_node
from distmuon.plan.parameters import Holding, ParameterSpec
from distmuon.plan.plan import build_plan
from distmuon.plan.routes import route


def chunks(size, parts):
    """Offsets and lengths as torch.chunk and FSDP2 cut a dimension; trailing parts may be empty."""
    step = -(-size // parts)
    starts = [min(size, step * part) for part in range(parts)]
    return [(start, min(size, start + step) - start) for start in starts]


def holdings(shape, ranks, *, axis, replicas):
    """Who stores what when ``ranks`` shard a dimension inside each of ``replicas`` copies."""
    per_replica = len(ranks) // replicas
    found = []
    for number, rank in enumerate(ranks):
        replica, place = divmod(number, per_replica)
        offset, length = chunks(shape[axis], per_replica)[place]
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[axis], sizes[axis] = offset, length
        found.append(Holding(rank, Box(tuple(offsets), tuple(sizes)), (replica,)))
    return tuple(found)


def spec(name, shape, held, **keywords):
    matrices = matrix_spec(name, shape, flatten=False)
    short, long = sorted((matrices.rows, matrices.cols))
    cost = short * short * (2 * long + short)
    return ParameterSpec(matrices, tuple(shape), held, **{"cost": cost, **keywords})


@st.composite
def models(draw):
    """Parameters of several layouts on up to 6 ranks."""
    replicas = draw(st.integers(1, 3))
    ranks = tuple(range(replicas * draw(st.integers(1, 3 if replicas < 3 else 2))))
    small = st.integers(1, 9)
    specs = []
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(small, min_size=2, max_size=3))
        copies = draw(st.sampled_from(sorted({1, replicas, len(ranks)})))
        axis = draw(st.integers(0, len(shape) - 1))
        held = holdings(shape, ranks, axis=axis, replicas=copies)
        specs.append(spec(f"w{number}", shape, held, group=draw(st.integers(0, 1)), kind=draw(st.sampled_from("ab"))))
    return ranks, specs, draw(st.integers(1, 200))


def matrices_of(assignment):
    return [(assignment.parameter, first) for first in range(assignment.first, assignment.first + assignment.count)]


@given(models())
def test_every_matrix_is_owned_once_in_a_bucket_of_its_shape(drawn):
    ranks, specs, bucket_numel = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel)
    found = [matrix for bucket in plan.buckets for a in bucket.assignments for matrix in matrices_of(a)]
    everything = [(number, first) for number, s in enumerate(specs) for first in range(s.matrices.count)]
    assert sorted(found) == everything
    for bucket in plan.buckets:
        members = [specs[assignment.parameter] for assignment in bucket.assignments]
        assert {(m.matrices.rows, m.matrices.cols) for m in members} == {(bucket.rows, bucket.cols)}
        assert len({m.kind for m in members}) == 1
        for owner, numel in bucket.owned_numel().items():
            assert owner in ranks
            assert numel <= max(bucket_numel, bucket.rows * bucket.cols)


@given(models(), st.booleans())
def test_every_element_travels_to_its_owner_and_home_to_everyone_who_stores_it(drawn, all_gather):
    ranks, specs, bucket_numel = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel)
    for bucket in plan.buckets:
        routes = {rank: route(plan, bucket, rank, active=None, all_gather=all_gather) for rank in ranks}
        arrived = {slot: [] for slot in range(len(bucket.assignments))}
        for rank in ranks:
            mine = routes[rank]
            for slot in mine.place:
                assert bucket.assignments[slot].owner == rank
            for part in [*mine.kept, *mine.gather.receives]:
                arrived[part.slot] += elements(part.box)
            home = sorted(e for part in [*mine.updated, *mine.scatter.receives] for e in tagged(part, bucket))
            stored = sorted(e for part in mine.held for e in tagged(part, bucket))
            assert home == stored
        for slot, assignment in enumerate(bucket.assignments):
            box = specs[assignment.parameter].box_of(assignment.first, assignment.count)
            assert sorted(arrived[slot]) == sorted(elements(box))
        for leg in ("gather", "scatter"):
            check_leg({rank: getattr(routes[rank], leg) for rank in ranks}, ranks)
        assert bucket.gathers == any(r.gather.send_numel for r in routes.values())
        if not all_gather:
            assert bucket.scatters == any(r.scatter.send_numel for r in routes.values())


def elements(box):
    return list(itertools.product(*(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))))


def tagged(part, bucket):
    return [(bucket.assignments[part.slot].parameter, *element) for element in elements(part.box)]


def check_leg(legs, ranks):
    """Sender and receiver mean the same elements by the same place in the message."""
    for i, sender in enumerate(ranks):
        for j, receiver in enumerate(ranks):
            out, into = legs[sender], legs[receiver]
            if out.gathered is not None:
                if sender != receiver:
                    a = [(p.slot, p.box, p.start) for p in out.sends]
                    base = i * into.gathered
                    b = [
                        (p.slot, p.box, p.start - base) for p in into.receives if base <= p.start < base + out.gathered
                    ]
                    assert a == b
                continue
            assert out.send_splits[j] == into.receive_splits[i]
            assert message(out.sends, out.send_splits, j) == message(into.receives, into.receive_splits, i)


def message(parts, splits, index):
    begin = sum(splits[:index])
    inside = [p for p in parts if begin <= p.start < begin + splits[index]]
    return [(p.slot, p.box, p.start - begin) for p in inside]


@given(models(), st.data())
def test_what_takes_no_part_is_not_routed(drawn, data):
    ranks, specs, bucket_numel = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel)
    active = data.draw(st.lists(st.booleans(), min_size=len(specs), max_size=len(specs)))
    for bucket in plan.buckets:
        for rank in ranks:
            mine = route(plan, bucket, rank, active=active, all_gather=False)
            parts = [*mine.held, *mine.kept, *mine.updated, *mine.gather.sends, *mine.scatter.receives]
            slots = {part.slot for part in parts} | set(mine.place)
            assert all(active[bucket.assignments[slot].parameter] for slot in slots)


def loads(specs, assignments, ranks):
    found = dict.fromkeys(ranks, 0)
    for a in assignments:
        found[a.owner] += a.count * specs[a.parameter].cost
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
    for bucket in plan.buckets:
        for rank in ranks:
            gather = route(plan, bucket, rank, active=None, all_gather=False).gather
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
from test_plan import holdings, spec
from distmuon.plan.plan import build_plan
ranks = tuple(range(6))
shapes = [(8, 8), (6, 24), (24, 6), (4, 6, 6), (5, 7)] * 3
specs = [spec("w%d" % i, s, holdings(s, ranks, axis=0, replicas=1 + i % 2)) for i, s in enumerate(shapes)]
print(build_plan(specs, ranks=ranks, bucket_numel=300).digest())
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
    ranks, specs, bucket_numel = drawn
    nodes = one_node(ranks)
    owners = {(specs[a.parameter].name, a.first): a.owner for a in assign(specs, most_numel=bucket_numel, nodes=nodes)}
    backwards = specs[::-1]
    again = {
        (backwards[a.parameter].name, a.first): a.owner for a in assign(backwards, most_numel=bucket_numel, nodes=nodes)
    }
    assert owners == again


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
