"""What a matrix costs, on one rank and on teams: predictions of the numerics as whole numbers for the plan."""

from __future__ import annotations

import dataclasses
import functools

import torch

from distmuon.numerics.costs import CostTable
from distmuon.numerics.recipe import Request, choose
from distmuon.numerics.tables import builtin_speeds
from distmuon.numerics.teams import team_recipe
from distmuon.plan.blocks import Block
from distmuon.plan.companions import Companion
from distmuon.plan.nodes import Nodes, largest
from distmuon.plan.pace import Pace
from distmuon.plan.parameters import Holding, ParameterSpec, TeamCost
from distmuon.plan.simulate import Transport
from distmuon.speeds import Link, Speeds

# Teams across nodes grow no further than this
_MOST = 64
# Assumed: of a stack of matrices that keeps an accelerator busy, such as eight of 1024 x 1024
_LEAST_NUMEL = 8 << 20


def speeds_of(table: CostTable) -> Speeds:
    """Links and memory as measured with the table, or the built-in estimates of its device."""
    return table.speeds or builtin_speeds(table.device)


def link_of(table: CostTable, nodes: Nodes, size: int) -> Link:
    """What ranks of a team of ``size`` talk over."""
    speeds = speeds_of(table)
    return speeds.local if size <= largest(nodes) else speeds.remote


def team_sizes(nodes: Nodes) -> tuple[int, ...]:
    """Sizes that teams may have: what divides the largest node, and several whole nodes."""
    most, world = largest(nodes), sum(map(len, nodes))
    sizes = [size for size in range(2, most + 1) if most % size == 0]
    size = 2 * most
    while size <= min(world, _MOST):
        sizes.append(size)
        size *= 2
    return tuple(sizes)


@functools.lru_cache(maxsize=4096)
def owner_cost(rows: int, cols: int, device: torch.device, request: Request, table: CostTable) -> int:
    """Nanoseconds of one owner for a matrix, a whole number so that sums do not depend on their order."""
    return nanoseconds(choose(rows, cols, device, request, table).seconds(rows, cols, table))


@functools.lru_cache(maxsize=4096)
def team_costs(
    rows: int, cols: int, extent: int, device: torch.device, request: Request, table: CostTable, nodes: Nodes
) -> tuple[TeamCost, ...]:
    """What a matrix costs on teams, as far as larger ones are faster than smaller ones.

    Args:
        rows: Of a matrix.
        cols: Of a matrix.
        extent: Length of the axis of the parameter that is cut; every rank gets some of it.
        device: Where it is multiplied.
        request: What was asked for.
        table: Speed of the engines and links.
        nodes: Which ranks share a node.
    """
    if not teams_run(choose(rows, cols, device, request, table).engine) or min(rows, cols) < 2:
        return ()
    best = owner_cost(rows, cols, device, request, table)
    found = []
    for size in team_sizes(nodes):
        if (size - 1) * -(-extent // size) >= extent:  # a slab would be empty
            continue
        way = team_recipe(rows, cols, device, request, size, table, link_of(table, nodes, size))
        cost = nanoseconds(way.seconds)
        if cost < best:
            best = cost
            found.append(TeamCost(size, cost))
    return tuple(found)


def block_spec(
    block: Block,
    holdings: tuple[Holding, ...],
    *,
    group: int,
    kind: str,
    device: torch.device,
    request: Request,
    table: CostTable,
    nodes: Nodes | None,
    cost: int | None = None,
    companion: Companion | None = None,
) -> ParameterSpec:
    """A block of a parameter as a plan sees it, with what its matrices cost.

    Args:
        block: Of the parameter.
        holdings: Who stores what of it.
        group: Index of the parameter group.
        kind: What must be equal inside a bucket beside the shape.
        device: Where it is multiplied.
        request: How it is orthogonalized.
        table: Speed of the engines and links.
        nodes: Which ranks share a node, where teams may own a matrix; None: single ranks do.
        cost: Nanoseconds of one owner for a matrix; None: as the table says.
        companion: Second moments that travel with its matrices, which then have single owners.
    """
    rows, cols = block.matrices.rows, block.matrices.cols
    spec = ParameterSpec(
        matrices=block.matrices,
        shape=block.shape,
        holdings=holdings,
        group=group,
        kind=kind,
        cost=owner_cost(rows, cols, device, request, table) if cost is None else cost,
        whole=block.cut is None,
        companion=companion,
    )
    if nodes is None or companion is not None:
        return spec
    extent = block.shape[spec.slab_axis]
    return dataclasses.replace(spec, teams=team_costs(rows, cols, extent, device, request, table, nodes))


def pace_of(table: CostTable, device: torch.device, itemsize: int, transport: Transport) -> Pace:
    """What decides how finely buckets are cut.

    Args:
        table: Speed of links and memory.
        device: Where matrices are multiplied.
        itemsize: Bytes of an element on the wire.
        transport: How collectives are run.
    """
    # a few small matrices leave most of an accelerator idle, of which the table knows nothing
    least = 1 if device.type == "cpu" else _LEAST_NUMEL
    return Pace(speeds_of(table), itemsize, transport, least)


def teams_run(engine: str) -> bool:
    """Whether slabs of a matrix can go through an engine: not through torch's own order of operations."""
    return engine in ("composed", "gram", "rational")


def nanoseconds(seconds: float) -> int:
    """Rounded, and 1 at least."""
    return max(1, round(1e9 * seconds))
