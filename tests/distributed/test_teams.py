"""Matrices that several ranks own together: steps on real ranks are those of one process but for rounding."""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from layouts import (
    LAYOUTS,
    Reference,
    Twins,
    distribute,
    give_gradients,
    mesh_of,
    relative_error,
    sharded_optimizer,
)
from torch.distributed.tensor import Replicate, Shard

from distmuon.numerics.costs import CostTable, Rates
from distmuon.speeds import Link, Speeds

SHAPES = {
    "tall": (40, 12),
    "wide": (12, 40),
    "square": (20, 20),
    "ragged": (13, 31),
    "ragged.tall": (31, 13),
    "experts": (3, 10, 26),
    "experts.tall": (2, 26, 10),
    "conv.kernel": (6, 11, 3, 1),
    "short": (4, 3),
}
FREE = Link(0.0, 0.0, 0.0, 0.0)


def table(link=FREE):
    """Products that take ages, so that every matrix is worth a team if it can have one."""
    slow = Rates(1e-9, 1.0, 1.0)
    engines = tuple((name, slow) for name in ("rational", "composed", "gram"))
    return CostTable("cpu-float32", "made up", engines, Speeds(link, link))


TABLES = {"split": table(), "repeated": table(dataclasses.replace(FREE, gather=1e9, reduce=1e-9))}
SETTINGS = dict(foreach=None, ns_dtype=torch.float32)


def laid_out(mesh_shape, placements, *names):
    twins = Twins({}, {})
    for name in names or SHAPES:
        distribute(twins, name, SHAPES[name], mesh_of(*mesh_shape), placements, torch.float32)
    return twins


def parts_of(optimizer):
    """By parameter the size of the team that owns it; 1: single owners."""
    found = {}
    for part in optimizer._binding.parts:
        plan = part.pipeline.plan
        for bucket in plan.buckets:
            for assignment in bucket.assignments:
                found[plan.parameters[assignment.parameter].name] = bucket.parts
    return found


def steps_of(twins, *, engine="auto", way="split", steps=3, **ours):
    settings = {**SETTINGS, "ns_engine": engine, "cost_table": TABLES[way]}
    optimizer = sharded_optimizer(twins, **settings, **ours)
    reference = Reference(twins, **settings)
    starts = {name: param.detach().clone() for name, param in twins.whole.items()}
    for step in range(steps):
        give_gradients(twins, step)
        optimizer.step()
        reference.step()
    return relative_error(twins, starts), parts_of(optimizer), optimizer


def by_layout(mesh_shape, placements, **settings):
    """Each matrix on its own, so that a team of all ranks ends soonest, and then all of them together."""
    errors, parts = {}, {}
    for name in SHAPES:
        errors[name], found, _ = steps_of(laid_out(mesh_shape, placements, name), steps=2, **settings)
        parts.update(found)
    errors["all"], _, _ = steps_of(laid_out(mesh_shape, placements), **settings)
    return max(errors.values()), parts


@pytest.mark.parametrize("way", TABLES)
@pytest.mark.parametrize("engine", ["rational", "composed", "gram"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_of_teams_is_that_of_one_process(pools, world_size, engine, way):
    for error, parts in pools(world_size, by_layout, (world_size,), [Shard(0)], engine=engine, way=way):
        assert error < 1e-4
        assert {parts[name] for name in ("tall", "wide", "square", "ragged", "conv.kernel")} == {world_size}


LAYOUTS_OF_FOUR = {
    "columns": ((4,), [Shard(1)]),
    "replicated": ((4,), [Replicate()]),
    "hsdp": ((2, 2), [Replicate(), Shard(0)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
}


@pytest.mark.parametrize("layout", LAYOUTS_OF_FOUR)
def test_whatever_the_layout(pools, layout):
    for error, parts in pools(4, by_layout, *LAYOUTS_OF_FOUR[layout]):
        assert error < 1e-4
        assert parts["square"] == 4


@pytest.mark.parametrize("layout", ["fsdp2 uneven", "hsdp uneven", "hsdp repeat", "ddp", "tp x fsdp2"])
def test_whole_models(pools, layout):
    for error in pools(4, whole_model, layout):
        assert error < 1e-4


def whole_model(layout):
    return steps_of(LAYOUTS[layout](torch.float32))[0]


def test_teams_can_be_switched_off(pools):
    for _, parts in pools(2, by_layout, (2,), [Shard(0)], teams=False):
        assert set(parts.values()) == {1}


def test_all_ranks_have_the_same_bits_where_they_store_the_same(pools):
    sums = pools(3, replicas_apart)
    assert sums[0] == sums[1] == sums[2]


def replicas_apart():
    sums = {}
    for name in ("square", "tall", "wide"):
        twins = laid_out((3,), [Replicate()], name)
        _, parts, _ = steps_of(twins)
        assert parts[name] == 3
        sums[name] = twins.ours[name].to_local().detach().numpy().tobytes()
    return sums


def test_nothing_but_gram_matrices_moves_where_shards_are_slabs(pools):
    """Rows of a tall matrix over the ranks of its team: its bytes stay at home."""
    for sent, parts in pools(4, tall_alone):
        assert parts == {"tall": 4}
        assert sent == 0


def tall_alone():
    twins = Twins({}, {})
    distribute(twins, "tall", (41, 6), mesh_of(4), [Shard(0)], torch.float32)
    error, parts, optimizer = steps_of(twins)
    assert error < 1e-4
    return optimizer._binding.parts[0].pipeline.bytes_sent, parts


def test_a_matrix_without_gradient_takes_no_part(pools):
    for error in pools(4, some_missing):
        assert error < 1e-4


def some_missing():
    """In turn a matrix has no gradient on one rank, or on none."""
    twins = laid_out((4,), [Shard(0)])
    settings = {**SETTINGS, "cost_table": TABLES["split"]}
    optimizer, reference = sharded_optimizer(twins, **settings), Reference(twins, **settings)
    starts = {name: param.detach().clone() for name, param in twins.whole.items()}
    names = list(twins.ours)

    def missing(name, step):
        if names.index(name) % 3 == step % 3:
            return "all" if step % 2 else dist.get_rank() == 1
        return False

    for step in range(4):
        give_gradients(twins, step, lambda name, step=step: missing(name, step))
        optimizer.step()
        reference.step()
    assert max(parts_of(optimizer).values()) > 1
    return relative_error(twins, starts)


def test_state_is_that_of_single_owners(pools):
    for error in pools(4, changing_minds):
        assert error < 1e-4


def changing_minds():
    """Momentum knows of no team: steps with and without go on from each other's state."""
    twins = laid_out((4,), [Shard(0)], "square", "tall")
    settings = {**SETTINGS, "cost_table": TABLES["split"]}
    reference = Reference(twins, **settings)
    starts = {name: param.detach().clone() for name, param in twins.whole.items()}
    state = None
    for step, teams in enumerate((True, False, True)):
        optimizer = sharded_optimizer(twins, **settings, teams=teams)
        if state is not None:
            optimizer.load_state_dict(state)
        give_gradients(twins, step)
        optimizer.step()
        reference.step()
        state = optimizer.state_dict()
        assert (max(parts_of(optimizer).values()) > 1) == teams
    return relative_error(twins, starts)


def test_ranks_of_nodes_that_are_dealt_out_in_turn(pools):
    """As mpirun and Slurm may place them: ranks 0 and 2 on one node, 1 and 3 on the other."""
    for way in TABLES:
        for error, parts in pools(4, interleaved, way):
            assert error < 1e-4
            assert parts["square"] == 4


def interleaved(way):
    before = os.environ.get("GROUP_RANK")
    os.environ["GROUP_RANK"] = str(dist.get_rank() % 2)
    try:
        return by_layout((4,), [Shard(0)], engine="composed", way=way)
    finally:
        os.environ.pop("GROUP_RANK")
        if before is not None:
            os.environ["GROUP_RANK"] = before
