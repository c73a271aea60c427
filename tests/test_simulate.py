"""A simulated step: by hand where it is small, by its laws where it is drawn."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from distmuon.pipeline import Pipeline
from distmuon.plan.assign import Assignment
from distmuon.plan.boxes import Box
from distmuon.plan.buckets import Bucket
from distmuon.plan.matrices import matrix_spec
from distmuon.plan.memory import Memory, memory
from distmuon.plan.nodes import node_of
from distmuon.plan.parameters import Holding, ParameterSpec, TeamCost
from distmuon.plan.plan import Plan, build_plan
from distmuon.plan.routes import route
from distmuon.plan.schedule import Schedule
from distmuon.plan.simulate import GLOO, NCCL, Traffic, Transport, simulate
from distmuon.plan.simulate_loads import loads
from distmuon.plan.waves import Wave
from distmuon.speeds import Link, Speeds

FREE = Link(0.0, 0.0, 0.0, 0.0)
SLOW = Link(0.0, 1.0, 1.0, 1.0)  # a second a byte
ENGINE = ("pack", "ns", "apply", "wait")


def second(number):
    return round(1e9 * number)


def rows_of(shape, ranks):
    """Holdings of a matrix whose rows are cut into equal parts."""
    step = shape[0] // len(ranks)
    return tuple(Holding(rank, Box((step * n, 0), (step, shape[1]))) for n, rank in enumerate(ranks))


def everywhere(shape, ranks):
    return tuple(Holding(rank, Box((0, 0), shape), (n,)) for n, rank in enumerate(ranks))


def a_plan(owners, costs, *, ranks=(0, 1), shape=(4, 4), held=rows_of, nodes=None):
    """A bucket for each list of owners, of a matrix for each owner; ``costs`` in seconds, alike."""
    specs, buckets = [], []
    for number, (members, seconds) in enumerate(zip(owners, costs, strict=True)):
        assignments = []
        for owner, cost in zip(members, seconds, strict=True):
            matrices = matrix_spec(f"w{number} {len(specs)}", shape, flatten=False)
            assignments.append(Assignment(len(specs), 0, 1, owner))
            specs.append(ParameterSpec(matrices, shape, held(shape, ranks), cost=second(cost)))
        whole = len(ranks) > 1 and held is everywhere
        several = len(ranks) > 1
        returns = len(members) * shape[0] * shape[1] // (1 if whole else len(ranks))
        buckets.append(Bucket(*shape, 1, tuple(assignments), several and not whole, several, whole, returns, ()))
    return Plan(tuple(ranks), tuple(specs), tuple(buckets), nodes or (tuple(ranks),), each_alone(buckets))


def each_alone(buckets):
    """A wave of every bucket."""
    return tuple(Wave((bucket,), number, 1) for number, bucket in enumerate(buckets))


def in_turn(plan):
    """No bucket ahead of its turn, no update behind."""
    places = range(len(plan.buckets))
    return Schedule(tuple(n + 1 for n in places), tuple(places))


def one_ahead(plan):
    count = len(plan.buckets)
    return Schedule(tuple(min(n + 2, count) for n in range(count)), tuple(range(count)))


def bars(timeline, rank, *kinds):
    return [(s.kind, s.bucket, s.start, s.end) for s in timeline.spans if s.rank == rank and s.kind in kinds]


def test_one_rank_does_one_thing_after_another():
    plan = a_plan([[7], [7]], [[3.0], [5.0]], ranks=(7,))
    speeds = Speeds(FREE, FREE, blend=1.0, copy=100.0, apply=2.0)
    found = simulate(plan, speeds, itemsize=2, schedule=one_ahead(plan), spans=True, startup=0.5)
    assert found.seconds == 0.5 + 2 * 16 + 8 + 2 * 32
    assert (found.ns[7], found.waiting[7], found.bytes[7]) == (8.0, 0.0, Traffic(0, 0, 0, 0))
    assert bars(found, 7, *ENGINE) == [
        ("pack", 0, 0.5, 16.5),
        ("pack", 1, 16.5, 32.5),
        ("ns", 0, 32.5, 35.5),
        ("apply", 0, 35.5, 67.5),
        ("ns", 1, 67.5, 72.5),
        ("apply", 1, 72.5, 104.5),
    ]


def test_two_ranks_exchange_halves_of_their_matrices():
    plan = a_plan([[0, 1]], [[20.0, 30.0]])
    speeds = Speeds(SLOW, SLOW, blend=1.0, copy=10.0, apply=2.0)
    found = simulate(plan, speeds, itemsize=2, spans=True)
    # each stores 8 elements of either matrix: 16 are blended, 8 travel in 16 bytes, 16 are unpacked
    assert bars(found, 0, *ENGINE, "gather", "scatter") == [
        ("pack", 0, 0.0, 16.0),
        ("wait", 0, 16.0, 32.0),
        ("gather", 0, 16.0, 32.0),
        ("pack", 0, 32.0, 192.0),
        ("ns", 0, 192.0, 212.0),
        ("pack", 0, 212.0, 292.0),
        ("apply", 0, 292.0, 308.0),
        ("scatter", 0, 292.0, 318.0),
        ("wait", 0, 308.0, 318.0),
        ("apply", 0, 318.0, 334.0),
    ]
    # the other begins its update 10 seconds later, and the bytes move only once both have
    assert bars(found, 1, "scatter") == [("scatter", 0, 302.0, 318.0)]
    assert found.seconds == found.finish[0] == found.finish[1] == 334.0
    assert found.ns == {0: 20.0, 1: 30.0}
    assert found.waiting == {0: 26.0, 1: 16.0}
    assert set(found.bytes.values()) == {Traffic(32, 32, 0, 0)}


def test_a_gather_arrives_while_the_bucket_before_is_orthogonalized():
    plan = a_plan([[0, 1], [0, 1]], [[20.0, 20.0], [20.0, 20.0]])
    speeds = Speeds(SLOW, SLOW)
    apart = simulate(plan, speeds, itemsize=1, schedule=in_turn(plan), spans=True)
    assert apart.seconds == 2 * (8 + 20 + 8)
    ahead = simulate(plan, speeds, itemsize=1, schedule=one_ahead(plan), spans=True)
    assert bars(ahead, 0, "gather", "scatter", "ns") == [
        ("gather", 0, 0.0, 8.0),
        ("gather", 1, 8.0, 16.0),
        ("ns", 0, 8.0, 28.0),
        ("scatter", 0, 28.0, 36.0),
        ("ns", 1, 28.0, 48.0),
        ("scatter", 1, 48.0, 56.0),
    ]
    assert ahead.waiting == {0: 16.0, 1: 16.0}


def test_a_link_that_is_too_slow_bounds_the_step():
    plan = a_plan([[0, 1]] * 4, [[1.0, 1.0]] * 4)
    found = simulate(plan, Speeds(SLOW, SLOW), itemsize=1, schedule=Schedule((4,) * 4, (0,) * 4))
    # gathers in a row, then updates in a row: the link never rests
    assert found.seconds == found.bytes[0].seconds(Speeds(SLOW, SLOW)) == 4 * 8 + 4 * 8
    assert found.waiting == {0: 60.0, 1: 60.0}


def test_links_without_cost_leave_the_busiest_rank():
    plan = a_plan([[0, 1], [1, 1], [0]], [[1.0, 2.0], [3.0, 4.0], [1.0]])
    found = simulate(plan, Speeds(FREE, FREE), itemsize=2, schedule=Schedule((3, 3, 3), (0, 0, 0)))
    assert found.ns == {0: 2.0, 1: 9.0}
    assert found.seconds == 9.0


def test_a_team_meets_before_it_computes():
    ranks = (0, 1, 2)
    specs = [
        ParameterSpec(matrix_spec("w", (6, 6), flatten=False), (6, 6), rows_of((6, 6), ranks), cost=second(9.0)),
        ParameterSpec(
            matrix_spec("v", (4, 12), flatten=False),
            (4, 12),
            tuple(Holding(rank, Box((0, 4 * rank), (4, 4))) for rank in ranks),
            cost=second(9.0),
            teams=(TeamCost(2, second(5.0)),),
        ),
    ]
    slabs = tuple(Assignment(1, 0, 1, owner, part, 2) for part, owner in enumerate((0, 1)))
    buckets = (
        Bucket(6, 6, 1, (Assignment(0, 0, 1, 0),), True, True, False, 12, ()),
        Bucket(4, 12, 2, slabs, True, True, False, 24, ()),
    )
    plan = Plan(ranks, tuple(specs), buckets, (ranks,), each_alone(buckets))
    found = simulate(plan, Speeds(SLOW, SLOW), itemsize=1, schedule=Schedule((2, 2), (0, 0)), spans=True)
    # rank 1 has its slab when the first matrix and all slabs are there, and waits for rank 0
    assert bars(found, 0, "ns") == [("ns", 0, 24.0, 33.0), ("ns", 1, 33.0, 38.0)]
    assert bars(found, 1, "ns") == [("ns", 1, 33.0, 38.0)]
    assert bars(found, 2, "ns") == []
    assert found.ns == {0: 14.0, 1: 5.0, 2: 0.0}


def test_a_rank_that_owns_nothing_of_a_bucket_goes_on():
    plan = a_plan([[0], [1]], [[100.0], [1.0]])
    found = simulate(plan, Speeds(SLOW, SLOW), itemsize=1, schedule=Schedule((2, 2), (0, 0)), spans=True)
    assert bars(found, 1, "ns") == [("ns", 1, 16.0, 17.0)]
    # exchanges follow one another, so its update waits for the other one
    assert bars(found, 1, "scatter") == [("scatter", 0, 16.0, 116.0), ("scatter", 1, 116.0, 124.0)]
    both = simulate(
        plan,
        Speeds(SLOW, SLOW),
        itemsize=1,
        schedule=Schedule((2, 2), (0, 0)),
        spans=True,
        transport=Transport(at_once=2),
    )
    assert bars(both, 1, "scatter")[1] == ("scatter", 1, 17.0, 116.0)


def test_exchanges_under_way_together_share_a_link_that_one_does_not_fill():
    plan = a_plan([[0, 1]] * 3, [[1.0, 1.0]] * 3)
    order = Schedule((3,) * 3, (0,) * 3)
    halves = Transport(at_once=2, duty=0.5)
    found = simulate(plan, Speeds(SLOW, SLOW), itemsize=1, schedule=order, spans=True, transport=halves)
    # the second and third gather set out once the first is there, and overlap by half
    assert bars(found, 0, "gather") == [("gather", 0, 0.0, 8.0), ("gather", 1, 8.0, 16.0), ("gather", 2, 8.0, 20.0)]


@pytest.mark.parametrize(("joint", "waiting"), [(False, 0.0), (True, 3.0)])
def test_who_sends_nothing_is_waited_for_where_the_backend_does(joint, waiting):
    # rank 2 stores nothing of the second matrix, and is busy with its own
    ranks = (0, 1, 2)
    specs = [
        ParameterSpec(
            matrix_spec("w", (4, 4), flatten=False), (4, 4), (Holding(2, Box((0, 0), (4, 4))),), cost=second(3.0)
        ),
        ParameterSpec(matrix_spec("v", (4, 4), flatten=False), (4, 4), rows_of((4, 4), (0, 1)), cost=second(1.0)),
    ]
    buckets = (
        Bucket(4, 4, 1, (Assignment(0, 0, 1, 2),), False, False, False, 16, ()),
        Bucket(4, 4, 1, (Assignment(1, 0, 1, 0),), True, True, False, 8, ()),
    )
    plan = Plan(ranks, tuple(specs), buckets, (ranks,), each_alone(buckets))
    order = Schedule((1, 2), (0, 0))
    found = simulate(plan, Speeds(FREE, FREE), itemsize=1, schedule=order, transport=Transport(joint=joint))
    assert found.waiting[0] == waiting
    assert found.ns == {0: 1.0, 1: 0.0, 2: 3.0}


def test_bytes_are_told_by_link_class():
    ranks = (0, 1, 2, 3)
    plan = a_plan([[0, 2]], [[1.0, 1.0]], ranks=ranks, nodes=((0, 1), (2, 3)))
    speeds = Speeds(dataclasses.replace(SLOW, latency=0.5), Link(0.25, 10.0, 10.0, 10.0))
    found = simulate(plan, speeds, itemsize=1, spans=True)
    # of either matrix a rank stores 4 elements; an owner takes 4 of its own node and 8 of the other one
    assert found.bytes[0] == Traffic(0 + 4, 4 + 0, 4 + 8, 8 + 4)
    assert found.bytes[1] == Traffic(4 + 0, 0 + 4, 4 + 0, 0 + 4)
    assert bars(found, 0, "gather", "scatter") == [("gather", 0, 0.0, 80.25), ("scatter", 0, 81.25, 161.5)]
    near = simulate(plan, Speeds(speeds.local, FREE), itemsize=1, spans=True)
    assert bars(near, 0, "gather") == [("gather", 0, 0.0, 4.5)]


def test_replicated_updates_come_back_by_all_gather_or_all_to_all():
    ranks = (0, 1, 2, 3)
    plan = a_plan([[0, 1, 2]], [[1.0] * 3], ranks=ranks, held=everywhere)
    speeds = Speeds(Link(0.0, 1.0, 1.0, 10.0), FREE, copy=1.0)
    packed = simulate(plan, speeds, itemsize=1, transport=Transport(all_gather=False))
    assert packed.bytes[0] == Traffic(48, 32, 0, 0)
    assert packed.bytes[3] == Traffic(0, 48, 0, 0)
    # one copy for each of three others, which then travels
    assert packed.seconds == 1 + 48 + 48
    gathered = simulate(plan, speeds, itemsize=1)
    assert set(gathered.bytes.values()) == {Traffic(48, 48, 0, 0)}
    assert gathered.seconds == 1 + 16 + 480
    # a node takes what is not its own once, over the links of its ranks together
    apart = dataclasses.replace(plan, nodes=((0, 1), (2, 3)))
    assert simulate(apart, speeds, itemsize=1).bytes[0] == Traffic(32, 32, 16, 16)


def test_ranks_share_cores_while_they_compute():
    plan = a_plan([[0, 1, 1]], [[2.0, 2.0, 4.0]])
    free = Speeds(FREE, FREE)
    assert simulate(plan, free, itemsize=1, ranks_per_core=1.0).seconds == 6.0
    # both halves of a core until the first is done, then all of it: 2 + 6 seconds of work
    shared = simulate(plan, free, itemsize=1, ranks_per_core=2.0, spans=True)
    assert bars(shared, 0, "ns", "wait") == [("ns", 0, 0.0, 4.0), ("wait", 0, 4.0, 8.0)]
    assert bars(shared, 1, "ns", "wait") == [("ns", 0, 0.0, 8.0)]


def test_bytes_that_a_cpu_moves_keep_it_from_computing():
    plan = a_plan([[0, 1], [0, 1]], [[20.0, 20.0], [20.0, 20.0]])
    order = one_ahead(plan)
    base = simulate(plan, Speeds(SLOW, SLOW), itemsize=1, schedule=order)
    found = simulate(plan, Speeds(SLOW, SLOW), itemsize=1, schedule=order, transport=Transport(handling=0.25))
    # 16 bytes come and go with each exchange: the first gather is waited for and costs no more, others do
    assert found.seconds == base.seconds + 2 * 16 * 0.25
    assert found.waiting == base.waiting


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"itemsize": 0}, "itemsize=0"),
        ({"ranks_per_core": 0.5}, "ranks_per_core=0.5"),
        ({"startup": -1.0}, "startup=-1.0"),
        ({"schedule": Schedule((1,), (0,))}, "schedule is for 1 waves, the plan has 2"),
    ],
)
def test_what_cannot_be_simulated_is_refused(wrong, says):
    plan = a_plan([[0, 1], [0, 1]], [[20.0, 20.0], [20.0, 20.0]])
    with pytest.raises(ValueError, match=says):
        simulate(plan, Speeds(SLOW, SLOW), **{"itemsize": 2, **wrong})
    for bad in ({"at_once": 0}, {"handling": -1.0}, {"duty": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Transport(**bad)


@st.composite
def worlds(draw):
    """Plans of up to 6 ranks on nodes of 1 to 3, their layouts cut along an axis, or copied, or both."""
    ranks = tuple(range(draw(st.integers(1, 6))))
    per_node = draw(st.integers(1, 3))
    nodes = tuple(ranks[start : start + per_node] for start in range(0, len(ranks), per_node))
    specs = []
    for number in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
        copies = draw(st.sampled_from([n for n in (1, 2, 3, len(ranks)) if len(ranks) % n == 0]))
        axis = draw(st.integers(0, len(shape) - 1))
        teams = []
        cost = draw(st.integers(1, 50))
        if min(shape[-2:]) > 1 and draw(st.booleans()):
            teams = [TeamCost(size, max(1, cost // size)) for size in (2, 3) if size <= max(shape[-2:])]
        specs.append(
            ParameterSpec(
                matrix_spec(f"w{number}", shape, flatten=False),
                shape,
                sharded(shape, ranks, axis, copies),
                cost=second(cost),
                teams=tuple(TeamCost(team.size, second(team.cost)) for team in teams),
            )
        )
    return build_plan(specs, ranks=ranks, bucket_numel=draw(st.integers(1, 200)), nodes=nodes)


def sharded(shape, ranks, axis, copies):
    """Holdings as FSDP2 cuts an axis among the ranks of each copy; the last may be empty."""
    parts = len(ranks) // copies
    step = -(-shape[axis] // parts)
    found = []
    for number, rank in enumerate(ranks):
        start = min(shape[axis], step * (number % parts))
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[axis], sizes[axis] = start, min(shape[axis], start + step) - start
        found.append(Holding(rank, Box(tuple(offsets), tuple(sizes)), (number // parts,)))
    return tuple(found)


links = st.builds(Link, *(st.sampled_from([0.0, 0.125, 0.5, 2.0]) for _ in range(4)))
passes = st.sampled_from([0.0, 0.25, 1.0])
speeds_of = st.builds(Speeds, links, links, passes, passes, passes)


@given(worlds(), st.booleans())
def test_loads_are_those_of_the_routes(plan, all_gather):
    node = node_of(plan.nodes)
    for wave, load in zip(plan.waves, loads(plan, all_gather=all_gather), strict=True):
        for place, rank in enumerate(plan.ranks):
            mine = route(plan, wave, rank, active=None, all_gather=all_gather)
            assert load.held[place] == sum(part.box.numel for part in mine.held)
            assert load.owned[place] == mine.owned_numel
            assert load.legs == len(mine.scatters)
            assert load.kept[place] == sum(part.box.numel for part in mine.updated)
            for legs, found in (([mine.gather], load.gather), (mine.scatters, load.scatter)):
                if found.gathered is not None:
                    # each leg is padded on its own
                    shares = [leg.gathered for leg in legs]
                    assert found.gathered <= sum(shares) and (len(legs) > 1 or shares == [found.gathered])
                    continue
                for name, numels in (("send_splits", found.sent), ("receive_splits", found.received)):
                    splits = [sum(of_rank) for of_rank in zip(*(getattr(leg, name) for leg in legs), strict=True)]
                    near = sum(n for other, n in zip(plan.ranks, splits, strict=True) if node[other] == node[rank])
                    assert (numels[0][place], numels[1][place]) == (near, sum(splits) - near)


@given(worlds(), st.booleans())
def test_memory_is_that_of_the_pipeline(plan, all_gather):
    # how legs are cut is known to routes alone
    assume(all(wave.legs == 1 for wave in plan.waves))
    found = memory(plan, all_gather=all_gather)
    for rank in plan.ranks:
        held = sum(h.box.numel for spec in plan.parameters for h in spec.holdings if h.rank == rank)
        assert found[rank] == Memory(held, buffers_of(plan, rank, all_gather=all_gather))


def buffers_of(plan, rank, *, all_gather):
    pipeline = Pipeline(
        plan,
        rank,
        exchange=None,
        device=None,
        options=SimpleNamespace(wire_dtype=torch.bfloat16),
        table=None,
        all_gather=all_gather,
        clock=None,
    )
    return pipeline.buffer_bytes() // 2


@given(worlds(), speeds_of, st.sampled_from([NCCL, GLOO, Transport(handling=0.01)]), st.sampled_from([1.0, 2.0]))
def test_laws(plan, speeds, transport, ranks_per_core):
    found = simulate(
        plan, speeds, itemsize=1, spans=True, startup=0.5, transport=transport, ranks_per_core=ranks_per_core
    )
    assert found == simulate(
        plan, speeds, itemsize=1, spans=True, startup=0.5, transport=transport, ranks_per_core=ranks_per_core
    )
    assert found.seconds == max(found.finish.values())
    busiest = max(plan.loads().values(), default=0) / 1e9
    assert found.seconds >= busiest - 1e-9
    assert found.seconds >= transport.duty * max(traffic.seconds(speeds) for traffic in found.bytes.values()) - 1e-9
    # what leaves arrives
    for way in ("local", "remote"):
        totals = [sum(getattr(traffic, f"{way}_{end}") for traffic in found.bytes.values()) for end in ("out", "in")]
        assert totals[0] == totals[1]
    for rank in plan.ranks:
        engine = bars(found, rank, *ENGINE)
        assert all(before[3] <= after[2] for before, after in itertools.pairwise(engine))
        assert sum(end - start for kind, _, start, end in engine if kind == "ns") == pytest.approx(found.ns[rank])
        idle = sum(end - start for kind, _, start, end in engine if kind == "wait")
        assert idle == pytest.approx(found.waiting[rank])
        # an engine rests only where it waits
        assert 0.5 + sum(end - start for *_, start, end in engine) == pytest.approx(found.finish[rank])
        if transport.handling == 0.0 and ranks_per_core == 1.0:
            assert found.ns[rank] == pytest.approx(plan.loads().get(rank, 0) / 1e9)


@given(worlds(), speeds_of, st.sampled_from([0.0, 0.5]))
def test_faster_links_are_never_slower(plan, speeds, factor):
    def faster(link):
        return Link(*(factor * seconds for seconds in dataclasses.astuple(link)))

    base = simulate(plan, speeds, itemsize=1)
    better = Speeds(faster(speeds.local), faster(speeds.remote), speeds.blend, speeds.copy, speeds.apply)
    assert simulate(plan, better, itemsize=1).seconds <= base.seconds + 1e-9


@given(worlds(), speeds_of)
def test_more_ranks_a_core_are_never_faster(plan, speeds):
    times = [simulate(plan, speeds, itemsize=1, ranks_per_core=share).seconds for share in (1.0, 6.0)]
    assert times[1] >= times[0] - 1e-9


def test_spans_are_noted_of_the_ranks_asked_for():
    plan = a_plan([[0, 1]], [[20.0, 30.0]])
    everything = simulate(plan, Speeds(SLOW, SLOW), itemsize=2, spans=True)
    found = simulate(plan, Speeds(SLOW, SLOW), itemsize=2, spans=[1])
    assert found.spans == tuple(span for span in everything.spans if span.rank == 1) != ()
    assert simulate(plan, Speeds(SLOW, SLOW), itemsize=2).spans == ()


def test_legs_of_many_replicas_wait_for_nobody_before_the_end():
    """What one rank owns is orthogonalized while it has yet to be sent in further legs."""
    ranks = tuple(range(16))
    held = everywhere((8, 8), ranks)
    specs = [
        ParameterSpec(
            matrix_spec(f"w{n:02}", (8, 8), flatten=False), (8, 8), held, cost=second(1.0 + n % 2), kind="ab"[n % 2]
        )
        for n in range(32)
    ]
    plan = build_plan(specs, ranks=ranks, bucket_numel=64)
    assert all(wave.legs > 1 for wave in plan.waves)
    waves = len(plan.waves)
    found = simulate(plan, Speeds(FREE, FREE), itemsize=2, schedule=Schedule((waves,) * waves, (0,) * waves))
    assert found.seconds == pytest.approx(max(plan.loads().values()) / 1e9)
