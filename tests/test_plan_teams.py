"""Teams: which ranks own slabs of a matrix together, and that they pay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_models import elements, holdings, in_nodes, models, spec, team_costs

from distmuon.plan.assign import assign
from distmuon.plan.baselines import largest_first, longest_first, lower_bound, round_robin
from distmuon.plan.boxes import Box
from distmuon.plan.nodes import one_node, teams_of
from distmuon.plan.parameters import Holding, TeamCost
from distmuon.plan.plan import build_plan


def slabs(assignments):
    """The assignments of each matrix, or run of matrices, by slab."""
    found = {}
    for a in assignments:
        found.setdefault((a.parameter, a.first), []).append(a)
    return found


def loads(specs, assignments, ranks):
    found = dict.fromkeys(ranks, 0)
    for a in assignments:
        found[a.owner] += a.cost(specs[a.parameter])
    return found


@given(models())
def test_the_slabs_of_a_matrix_cover_it_by_the_ranks_of_one_team_in_order(drawn):
    _, specs, most_numel, nodes = drawn
    for (parameter, first), members in slabs(assign(specs, most_numel=most_numel, nodes=nodes)).items():
        whole = specs[parameter]
        size = members[0].parts
        assert [a.part for a in members] == list(range(size))
        assert {(a.count, a.parts) for a in members} == {(members[0].count, size)}
        if size > 1:
            assert tuple(a.owner for a in members) in teams_of(nodes, size)
            assert size in {team.size for team in whole.teams}
        holders = {holding.rank for holding in whole.holdings}
        assert all(a.owner in holders for a in members)
        covered = [element for a in members for element in elements(a.box(whole))]
        assert sorted(covered) == elements(whole.box_of(first, members[0].count))


@given(models())
def test_all_slabs_of_a_matrix_are_in_one_bucket(drawn):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    for bucket in plan.buckets:
        for members in slabs(bucket.assignments).values():
            assert [a.part for a in members] == list(range(bucket.parts))


@given(models())
def test_never_worse_than_without_teams(drawn):
    ranks, specs, most_numel, nodes = drawn
    bare = [spec(s.name, s.shape, s.holdings, cost=s.cost, group=s.group, kind=s.kind) for s in specs]
    with_teams = loads(specs, assign(specs, most_numel=most_numel, nodes=nodes), ranks)
    without = loads(bare, assign(bare, most_numel=most_numel, nodes=nodes), ranks)
    assert max(with_teams.values()) <= max(without.values()) * 1.005


@given(st.data(), st.integers(1, 9), st.integers(1, 4))
def test_never_worse_than_longest_processing_time_first(data, world, node):
    ranks = tuple(range(world))
    shape = (2 * world, 12)
    held = holdings(shape, ranks, axis=0, replicas=1)
    costs = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=30))
    specs = [
        spec(f"w{i:03}", shape, held, cost=cost, teams=data.draw(team_costs(cost, max(shape))))
        for i, cost in enumerate(costs)
    ]
    found = loads(specs, assign(specs, most_numel=10**9, nodes=in_nodes(ranks, node)), ranks)
    assert max(found.values()) <= max(longest_first(specs, ranks).values())
    assert max(found.values()) >= lower_bound(specs, ranks).least


def test_a_matrix_that_dominates_is_owned_by_a_team():
    ranks = tuple(range(4))
    big, small = ((64, 64), (4, 4))
    specs = [
        spec(
            "big", big, holdings(big, ranks, axis=0, replicas=1), cost=1000, teams=(TeamCost(2, 600), TeamCost(4, 350))
        )
    ]
    specs += [spec(f"w{i:02}", small, holdings(small, ranks, axis=0, replicas=1), cost=10) for i in range(12)]
    found = assign(specs, most_numel=10**9, nodes=one_node(ranks))
    assert [(a.owner, a.part, a.parts) for a in found[:4]] == [(0, 0, 4), (1, 1, 4), (2, 2, 4), (3, 3, 4)]
    assert set(loads(specs, found, ranks).values()) == {380}


def test_teams_that_shorten_nothing_are_left_alone():
    ranks = tuple(range(4))
    held = holdings((8, 8), ranks, axis=0, replicas=1)
    specs = [spec(f"w{i}", (8, 8), held, cost=100, teams=(TeamCost(2, 51), TeamCost(4, 26))) for i in range(8)]
    assert {a.parts for a in assign(specs, most_numel=10**9, nodes=one_node(ranks))} == {1}


def test_matrices_of_one_shape_go_to_teams_of_several_sizes_where_that_is_shorter():
    ranks = tuple(range(4))
    held = holdings((8, 8), ranks, axis=0, replicas=1)
    specs = [spec(f"w{i}", (8, 8), held, cost=100, teams=(TeamCost(2, 60), TeamCost(4, 40))) for i in range(5)]
    found = assign(specs, most_numel=10**9, nodes=one_node(ranks))
    # four alone and one on all ranks: 140, where single owners take 200, pairs 180, and teams of all 200
    assert max(loads(specs, found, ranks).values()) == 140
    assert sorted(a.parts for a in found) == [1, 1, 1, 1, 4, 4, 4, 4]


def test_a_team_has_only_ranks_that_share_the_parameter():
    shape = (8, 8)
    specs = [
        spec("here", shape, holdings(shape, (1, 2), axis=0, replicas=1), cost=300, teams=(TeamCost(2, 160),)),
        spec("there", shape, holdings(shape, (2, 3), axis=0, replicas=1), cost=310, teams=(TeamCost(2, 160),)),
    ]
    found = assign(specs, most_numel=10**9, nodes=one_node((0, 1, 2, 3)))
    # ranks 1 and 2 are neighbours in no team; 2 and 3 are
    assert [(a.parameter, a.owner, a.parts) for a in found] == [(0, 1, 1), (1, 2, 2), (1, 3, 2)]


def test_a_stack_that_is_whole_on_one_rank_is_shared_where_that_is_shorter():
    ranks = tuple(range(4))
    whole, nothing = Box((0, 0, 0), (4, 8, 8)), Box((0, 0, 0), (0, 8, 8))
    held = tuple(Holding(rank, nothing if rank else whole) for rank in ranks)
    lonely = spec("experts", (4, 8, 8), held, cost=100)
    shared = spec("experts", (4, 8, 8), held, cost=100, teams=(TeamCost(4, 30),))
    nodes = one_node(ranks)
    assert [(a.owner, a.count) for a in assign([lonely], most_numel=10**9, nodes=nodes)] == [(0, 4)]
    found = assign([shared], most_numel=10**9, nodes=nodes)
    assert [(a.owner, a.part, a.parts, a.count) for a in found] == [(r, r, 4, 4) for r in ranks]


def test_matrices_go_to_the_node_that_stores_them():
    ranks = tuple(range(4))
    nodes = in_nodes(ranks, 2)
    # equal matrices, some stored by the ranks of one node, some by those of the other
    stored = {0: ((0, 4), (4, 4), (8, 0), (8, 0)), 1: ((0, 0), (0, 0), (0, 4), (4, 4))}
    specs = []
    for number in range(8):
        boxes = [Box((offset, 0), (size, 8)) for offset, size in stored[number // 2 % 2]]
        held = tuple(Holding(rank, box) for rank, box in zip(ranks, boxes, strict=True))
        specs.append(spec(f"w{number}", (8, 8), held))
    for a in assign(specs, most_numel=10**9, nodes=nodes):
        assert a.owner // 2 == a.parameter // 2 % 2
    assert set(loads(specs, assign(specs, most_numel=10**9, nodes=nodes), ranks).values()) == {2 * specs[0].cost}


@pytest.mark.parametrize(("deal", "most"), [(round_robin, 13), (largest_first, 10), (longest_first, 7)])
def test_other_ways_to_choose_owners(deal, most):
    ranks = (0, 1)
    # cost and elements apart: the costliest is the smallest
    specs = [
        spec(f"w{i}", shape, holdings(shape, ranks, axis=0, replicas=1), cost=cost)
        for i, (shape, cost) in enumerate([((2, 2), 6), ((4, 4), 3), ((2, 3), 2), ((2, 4), 2)])
    ]
    found = deal(specs, ranks)
    assert sum(found.values()) == 13
    assert max(found.values()) == most


def test_bounds():
    ranks = (0, 1, 2)
    held = holdings((6, 6), ranks, axis=0, replicas=1)
    specs = [
        spec("a", (6, 6), held, cost=60, teams=(TeamCost(2, 40), TeamCost(4, 20))),
        spec("b", (6, 6), held, cost=30),
    ]
    bound = lower_bound(specs, ranks)
    # four ranks are more than there are
    assert (bound.ideal, bound.longest, bound.least) == (30.0, 40, 40)
