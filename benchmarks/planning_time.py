"""How long planning takes on one thread, and how near the plans come to the ideal.

    OMP_NUM_THREADS=1 python benchmarks/planning_time.py [--models 8b 70b v3 v3-stacked] [--ranks 8 64]

Shapes are those of Llama-3-8B, Llama-3-70B and DeepSeek-V3, costs the built-in estimates for an H100, nodes of 8 ranks.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from distmuon.costing import owner_cost, team_costs
from distmuon.numerics.recipe import Request
from distmuon.numerics.tables import builtin_table
from distmuon.plan.baselines import lower_bound
from distmuon.plan.boxes import Box, chunk
from distmuon.plan.layouts import Holding
from distmuon.plan.matrices import matrix_spec
from distmuon.plan.nodes import Nodes
from distmuon.plan.parameters import ParameterSpec
from distmuon.plan.plan import Plan, build_plan
from distmuon.plan.schedule import schedule

_NODE = 8
_TABLE = builtin_table("cuda-sm90")
_DEVICE = torch.device("cuda")
_REQUEST = Request(torch.bfloat16)
_BUCKET_NUMEL = 32 << 20


def llama(layers: int, width: int, hidden: int, kv: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the matrices of a Llama model."""
    attention = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
    mlp = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    for layer in range(layers):
        for name, shape in {**attention, **mlp}.items():
            yield f"layers.{layer}.{name}", shape


def deepseek_v3(*, stacked: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the matrices of DeepSeek-V3, experts apart or as stacks."""
    width, hidden, experts = 7168, 2048, 256
    attention = {
        "q_a": (1536, width),
        "q_b": (24576, 1536),
        "kv_a": (576, width),
        "kv_b": (32768, 512),
        "o": (width, 16384),
    }
    for layer in range(61):
        inner = 18432 if layer < 3 else hidden
        mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        for name, shape in {**attention, **mlp}.items():
            yield f"layers.{layer}.{name}", shape
        if layer >= 3:
            for name, shape in mlp.items():
                if stacked:
                    yield f"layers.{layer}.experts.{name}", (experts, *shape)
                else:
                    for expert in range(experts):
                        yield f"layers.{layer}.experts.{expert}.{name}", shape


MODELS: dict[str, Callable[[], Iterator[tuple[str, tuple[int, ...]]]]] = {
    "8b": functools.partial(llama, 32, 4096, 14336, 1024),
    "70b": functools.partial(llama, 80, 8192, 28672, 1024),
    "v3": functools.partial(deepseek_v3, stacked=False),
    "v3-stacked": functools.partial(deepseek_v3, stacked=True),
}


def nodes_of(world: int) -> Nodes:
    """Nodes of 8 ranks."""
    return tuple(tuple(range(start, min(world, start + _NODE))) for start in range(0, world, _NODE))


def parameters(model: str, world: int) -> list[ParameterSpec]:
    """The parameters of a model, rows of their matrices sharded over all ranks."""
    nodes = nodes_of(world)

    @functools.cache
    def holdings(shape: tuple[int, ...]) -> tuple[Holding, ...]:
        axis = len(shape) - 2
        found = []
        for rank in range(world):
            offsets, sizes = [0] * len(shape), list(shape)
            offsets[axis], sizes[axis] = chunk(shape[axis], rank, world)
            found.append(Holding(rank, Box(tuple(offsets), tuple(sizes))))
        return tuple(found)

    specs = []
    for name, shape in MODELS[model]():
        matrices = matrix_spec(name, shape, flatten=False)
        rows, cols = matrices.rows, matrices.cols
        cost = owner_cost(rows, cols, _DEVICE, _REQUEST, _TABLE)
        teams = team_costs(rows, cols, max(rows, cols), _DEVICE, _REQUEST, _TABLE, nodes)
        specs.append(ParameterSpec(matrices, shape, holdings(shape), cost=cost, teams=teams))
    return specs


@dataclass(frozen=True)
class Timed:
    """A plan and how long it took.

    Attributes:
        plan: The plan.
        seconds: Of building it.
        digest: Seconds of its digest.
        schedule: Seconds of its schedule.
    """

    plan: Plan
    seconds: float
    digest: float
    schedule: float


def timed(specs: list[ParameterSpec], world: int) -> Timed:
    """Build a plan."""
    clock = [time.perf_counter()]
    plan = build_plan(specs, ranks=range(world), bucket_numel=_BUCKET_NUMEL, nodes=nodes_of(world))
    for work in (plan.digest, functools.partial(schedule, plan)):
        clock.append(time.perf_counter())
        work()
    clock.append(time.perf_counter())
    seconds, digest, ahead = (b - a for a, b in itertools.pairwise(clock))
    return Timed(plan, seconds, digest, ahead)


def main() -> None:
    """Print a line for each model, number of ranks, and with and without teams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 256, 1024, 4096])
    options = parser.parse_args()
    print(
        "model      ranks  teams  plan s  digest s  schedule s  buckets  ideal ms  makespan/ideal  work/ideal  teams of"
    )
    for model in options.models:
        for world in options.ranks:
            specs = parameters(model, world)
            for with_teams in (False, True):
                chosen = specs if with_teams else [replace(spec, teams=()) for spec in specs]
                found = timed(chosen, world)
                ideal = lower_bound(chosen, range(world)).ideal
                loads = found.plan.loads().values()
                sizes: dict[int, int] = {}
                for bucket in found.plan.buckets:
                    for assignment in bucket.assignments:
                        if bucket.parts > 1 and assignment.part == 0:
                            sizes[bucket.parts] = sizes.get(bucket.parts, 0) + assignment.count
                print(
                    f"{model:10s} {world:5d}  {'yes' if with_teams else 'no':5s}  {found.seconds:6.2f}  "
                    f"{found.digest:8.2f}  {found.schedule:10.2f}  {len(found.plan.buckets):7d}  {ideal / 1e6:8.2f}  "
                    f"{max(loads) / ideal:14.3f}  {sum(loads) / world / ideal:10.3f}  "
                    + ", ".join(f"{number} on {size}" for size, number in sorted(sizes.items())),
                    flush=True,
                )


if __name__ == "__main__":
    main()
