"""Slabs of a matrix through the engines: the team's result is that of one owner."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from distmuon.numerics.orthogonalize import orthogonalize_
from distmuon.numerics.recipe import Request, choose
from distmuon.numerics.slabs import orthogonalize_slabs_
from distmuon.numerics.tables import builtin_speeds, builtin_table
from distmuon.numerics.teams import TeamRecipe, gathers, team_recipe
from distmuon.plan.boxes import chunk
from distmuon.speeds import Link

CPU = torch.device("cpu")
SHAPES = {
    "wide": (48, 160),
    "tall": (160, 48),
    "square": (96, 96),
    "ragged": (37, 101),
    "ragged tall": (101, 37),
    "slabs narrower than high": (64, 70),
    "fewer rows than ranks": (3, 40),
    "an empty slab": (2, 5),
}


class Meeting:
    """Where threads that play the ranks of a team put what they have."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.told = [None] * size

    def exchange(self, index, value):
        self.told[index] = value
        self.barrier.wait()
        everything = list(self.told)
        self.barrier.wait()
        return everything


class ThreadTeam:
    def __init__(self, meeting, index):
        self.meeting, self.index, self.size = meeting, index, meeting.size

    def add_up(self, tensor):
        assert tensor.is_contiguous()
        parts = self.meeting.exchange(self.index, tensor.clone())
        tensor.copy_(torch.stack(parts).sum(0))

    def put_together(self, rows, count):
        step = -(-count // self.size)
        assert len(rows) == max(0, min(count, (self.index + 1) * step) - min(count, self.index * step))
        return torch.cat(self.meeting.exchange(self.index, rows.clone()))


def by_team(matrices, way, size, *, eps=0.0, dtype=torch.float32):
    """What a team makes of ``(b, m, n)``."""
    tall = matrices.size(1) > matrices.size(2)
    axis = 1 if tall else 2
    meeting = Meeting(size)

    def rank(index):
        start, length = chunk(matrices.size(axis), index, size)
        slab = matrices.narrow(axis, start, length).contiguous()
        return orthogonalize_slabs_(slab, way, ThreadTeam(meeting, index), tall=tall, eps=eps, dtype=dtype)

    with ThreadPoolExecutor(size) as pool:
        return torch.cat(list(pool.map(rank, range(size))), axis)


def recipe_of(engine, shape, dtype=torch.float32):
    return choose(*shape, CPU, Request(dtype, engine))


def draw(shape, count=2):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("split", [False, True], ids=["repeated", "split"])
@pytest.mark.parametrize("engine", ["composed", "gram", "rational"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_team_makes_what_one_owner_makes(shape, size, engine, split):
    matrices, recipe = draw(shape), recipe_of(engine, shape)
    alone = orthogonalize_(matrices.clone(), recipe, eps=0.0, dtype=torch.float32)
    together = by_team(matrices, TeamRecipe(recipe, split, 0.0), size)
    # rounding of float32 grows by the gain of small singular values, 726 at most
    assert (together - alone).abs().max() <= 2e-4 * alone.abs().max()


@pytest.mark.parametrize("engine", ["composed", "rational"])
def test_float64_agrees_to_its_own_rounding(engine):
    matrices, recipe = draw((40, 90)).double(), recipe_of(engine, (40, 90), torch.float64)
    alone = orthogonalize_(matrices.clone(), recipe, eps=0.0, dtype=torch.float64)
    together = by_team(matrices, TeamRecipe(recipe, True, 0.0), 3, dtype=torch.float64)
    assert (together - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("engine", ["composed", "rational"])
def test_a_bfloat16_matrix_is_as_near_to_its_polar_factor_as_by_one_owner(engine):
    matrices = draw((48, 160)).bfloat16()
    recipe = recipe_of(engine, (48, 160), torch.bfloat16)
    alone = orthogonalize_(matrices.clone(), recipe, eps=0.0, dtype=torch.bfloat16)
    together = by_team(matrices, TeamRecipe(recipe, True, 0.0), 4, dtype=torch.bfloat16)
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    for found in (alone, together):
        assert (found.double() - u @ v).square().mean() < 0.02 * (u @ v).square().mean()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("engine", ["composed", "rational"])
def test_the_scale_of_a_matrix_is_that_of_all_its_slabs(engine, scale):
    matrices = draw((24, 60))
    # one slab is far smaller than the others, one is zero
    matrices[:, :, :15] *= 1e-3
    matrices[:, :, 15:30] = 0.0
    recipe = recipe_of(engine, (24, 60))
    alone = orthogonalize_((matrices.double() * scale).float(), recipe, eps=0.0, dtype=torch.float32)
    together = by_team((matrices.double() * scale).float(), TeamRecipe(recipe, True, 0.0), 4)
    assert torch.isfinite(together).all()
    assert (together - alone).abs().max() <= 1e-3


def test_eps_is_that_of_the_whole_matrix():
    matrices = draw((24, 60)) * 1e-11
    recipe = recipe_of("composed", (24, 60))
    alone = orthogonalize_(matrices.clone(), recipe, eps=1e-7, dtype=torch.float32)
    together = by_team(matrices, TeamRecipe(recipe, False, 0.0), 2, eps=1e-7)
    assert (together - alone).abs().max() <= 1e-5
    assert alone.norm() < 0.9 * orthogonalize_(matrices.clone(), recipe, eps=0.0, dtype=torch.float32).norm()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("engine", ["composed", "gram", "rational"])
def test_zero_stays_zero_and_nan_fills_its_matrix_alone(engine, split):
    matrices = draw((24, 60), count=3)
    matrices[0] = 0.0
    matrices[1, 3, 59] = torch.nan  # in the last slab
    together = by_team(matrices, TeamRecipe(recipe_of(engine, (24, 60)), split, 0.0), 3)
    assert (together[0] == 0.0).all()
    assert together[1].isnan().all()
    assert torch.isfinite(together[2]).all()


def test_work_is_split_where_links_are_fast():
    table, shape, cuda = builtin_table("cuda-sm90"), (4096, 14336), torch.device("cuda")
    request = Request(torch.bfloat16)
    fast = team_recipe(*shape, cuda, request, 8, table, builtin_speeds("cuda-sm90").local)
    slow = team_recipe(*shape, cuda, request, 8, table, Link.of(gigabytes=1.0, latency=1e-4))
    assert fast.split and not slow.split
    assert fast.seconds < choose(*shape, cuda, request, table).seconds(*shape, table) < slow.seconds


def test_a_team_may_take_the_gram_form_of_the_same_polynomials():
    table, shape, cuda = builtin_table("cuda-sm90"), (4096, 4096), torch.device("cuda")
    link = builtin_speeds("cuda-sm90").local
    alone = choose(*shape, cuda, Request(torch.bfloat16), table)
    free = team_recipe(*shape, cuda, Request(torch.bfloat16), 8, table, link)
    told = team_recipe(*shape, cuda, Request(torch.bfloat16, "composed"), 8, table, link)
    assert (alone.engine, free.recipe.engine, told.recipe.engine) == ("composed", "gram", "composed")
    assert free.recipe.formula == alone.formula
    assert free.seconds < told.seconds


@pytest.mark.parametrize("engine", ["composed", "gram"])
@pytest.mark.parametrize("coefficients", ["nested14", "quintic", "cubic"])
def test_rows_travel_as_often_as_predicted(engine, coefficients):
    """And never more often than once a product, or the prediction would be of another algorithm."""
    recipe = choose(24, 60, CPU, Request(torch.float32, engine, coefficients))
    counts = []

    class Counting(ThreadTeam):
        def put_together(self, rows, count):
            counts.append(count)
            return super().put_together(rows, count)

    team, slab = Counting(Meeting(1), 0), draw((24, 60))[:1]
    orthogonalize_slabs_(slab, TeamRecipe(recipe, True, 0.0), team, tall=False, eps=0.0, dtype=slab.dtype)
    assert len(counts) == gathers(recipe) <= recipe.small
