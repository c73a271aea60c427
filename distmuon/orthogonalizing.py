"""The second step of a wave: owners orthogonalize its matrices, alone or in teams, and let variants act on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distmuon.costing import link_of
from distmuon.flight import Flight
from distmuon.groups import Group
from distmuon.moments import moments_dtype
from distmuon.numerics.costs import CostTable
from distmuon.numerics.orthogonalize import orthogonalize_
from distmuon.numerics.recipe import choose
from distmuon.numerics.rows import Team
from distmuon.numerics.slabs import orthogonalize_slabs_
from distmuon.numerics.teams import team_recipe
from distmuon.numerics.variants import by_rows, divide_by_moments_
from distmuon.options import Options
from distmuon.plan.buckets import Bucket
from distmuon.plan.plan import Plan
from distmuon.stats import StepClock


def orthogonalize_wave(
    flight: Flight,
    groups: Sequence[Group],
    *,
    rank: int,
    device: torch.device,
    options: Options,
    table: CostTable,
    teams: Mapping[int, Team],
    clock: StepClock,
) -> None:
    """Turn the matrices that this rank owns of a wave into directions, in place.

    Args:
        flight: The wave.
        groups: All parameter groups of the optimizer.
        rank: This process, a global rank.
        device: Where the matrices lie.
        options: The settings of the optimizer.
        table: Speed of the engines, the same on all ranks.
        teams: Those that this rank is in, by size.
        clock: Times it.

    Raises:
        RuntimeError: if a team fails, as when another rank died; names a parameter.
    """
    assert flight.matrices is not None
    for bucket, stack in zip(flight.wave.buckets, flight.routes.stacks, strict=True):
        if not stack.count:  # a rank that owns none of it need not even have the group
            continue
        # matrices of one bucket share their iteration, whatever groups they are in
        mine = next(a for a in bucket.assignments if a.owner == rank)
        spec = flight.plan.parameters[mine.parameter]
        group = groups[spec.group]
        matrices = flight.matrices[stack.start : stack.start + stack.numel].view(stack.count, stack.rows, stack.cols)
        with clock.phase("ns", device):
            if bucket.parts == 1:
                recipe = choose(bucket.rows, bucket.cols, device, options.request(group), table)
                orthogonalize_(matrices, recipe, eps=group["eps"], dtype=options.ns_dtype, compile=options.compile)
            else:
                _as_team(matrices, bucket, flight.plan, group, spec.name, device, options, table, teams)
            if stack.moments:
                _divide_by_moments(matrices, flight.matrices[stack.end - stack.moments : stack.end], group)


def _as_team(
    slabs: Tensor,
    bucket: Bucket,
    plan: Plan,
    group: Group,
    name: str,
    device: torch.device,
    options: Options,
    table: CostTable,
    teams: Mapping[int, Team],
) -> None:
    rows, cols, size = bucket.rows, bucket.cols, bucket.parts
    link = link_of(table, plan.nodes, size)
    way = team_recipe(rows, cols, device, options.request(group), size, table, link)
    try:
        orthogonalize_slabs_(slabs, way, teams[size], tall=rows > cols, eps=group["eps"], dtype=options.ns_dtype)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"the team that owns {name!r} failed: {error}") from error


def _divide_by_moments(matrices: Tensor, words: Tensor, group: Group) -> None:
    """Let the variant act on orthogonalized matrices and on the words of their second moments."""
    # a copy of their own is aligned, as a number takes two words
    moments = words.clone().view(moments_dtype(words.dtype)).view(matrices.size(0), -1)
    rows, cols = matrices.shape[1:]
    if by_rows(group["variant"]):
        rows, cols = (1, cols) if group["transposed"] else (rows, 1)
    divide_by_moments_(matrices, moments.view(-1, rows, cols), beta2=group["muon_beta2"])
    words.copy_(moments.view(words.dtype).flatten())
