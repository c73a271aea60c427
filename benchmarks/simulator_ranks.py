"""What one rank of simulator.py does: measure its links, step every model in turn, and predict the steps."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from simulator_models import CASES, Case
from step_time_probes import busy_seconds, own_seconds
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import distmuon
from distmuon.calibrating.fit import fit, fit_link, fit_pass
from distmuon.calibrating.links import LinkTiming, measure_links
from distmuon.calibrating.measure import Timing
from distmuon.calibrating.passes import PASSES, PassTiming, measure_passes
from distmuon.calibrating.ranks import Ranks
from distmuon.costing import link_of, nanoseconds, owner_cost
from distmuon.numerics.costs import CostTable
from distmuon.numerics.orthogonalize import orthogonalize_
from distmuon.numerics.recipe import Request as NumericsRequest
from distmuon.numerics.recipe import choose
from distmuon.numerics.teams import team_recipe
from distmuon.plan.parameters import ParameterSpec, TeamCost
from distmuon.plan.plan import Plan
from distmuon.plan.simulate import GLOO, Timeline, Transport, simulate
from distmuon.speeds import Link, Speeds

_CPU = torch.device("cpu")
# One engine is enough; shapes and sides between which those of the models lie
_ENGINE = "rational"
_SHAPES = (
    (128, 512),
    (256, 256),
    (320, 960),
    (448, 448),
    (512, 1536),
    (576, 2304),
    (640, 640),
    (1024, 1024),
    (1536, 1536),
)
_SIDES = (128, 256, 512)
_NUMEL = 1 << 23
_WARM_UP = 2
# Bytes that leave a rank in one collective, about those of a step; buffers of sockets flatter slow links below
_SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
_SLOW_SIZES = (1 << 21, 1 << 23)
# Most bytes whose handling is timed, and about the seconds that they may travel
_TRAVELS, _TRAVEL_S = 1 << 23, 0.08


@dataclass(frozen=True)
class Request:
    """What to measure; the same on every rank.

    Attributes:
        ranks: How many there are.
        link: Rate of the link between nodes; None: there is one node.
        threads: Of each rank.
        cases: Names of models.
        rounds: Steps of each.
        limit_s: Seconds after which no round begins.
        folder: Where ranks meet, and rank 0 leaves ``rows.json``.
    """

    ranks: int
    link: str | None
    threads: int
    cases: tuple[str, ...]
    rounds: int
    limit_s: float
    folder: str

    def text(self) -> str:
        """As an argument of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Request:
        """From :meth:`text`."""
        found = json.loads(text)
        return cls(**{**found, "cases": tuple(found["cases"])})


@dataclass(frozen=True)
class Row:
    """One model; seconds, of the slowest rank.

    Attributes:
        ranks: How many there were.
        link: Rate of the link between nodes; None: there was one node.
        links: What was measured of it.
        case: Name of the model.
        layout: ``"FSDP2"`` or ``"replicated"``.
        median: Of the measured steps.
        fastest: Of these.
        slowest: Of these.
        others: Median share of the cores that other processes used meanwhile.
        predicted: The simulated step.
        ns: Orthogonalization of the busiest rank in it.
        waiting: Of the rank that is idle longest in it.
        measured_ns: Orthogonalization of the busiest rank, the median step's.
        phases: ``last_step_stats()`` of rank 0 in the last step.
    """

    ranks: int
    link: str | None
    links: str
    case: str
    layout: str
    median: float
    fastest: float
    slowest: float
    others: float
    predicted: float
    ns: float
    waiting: float
    measured_ns: float
    phases: dict[str, float]

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.median


class Model:
    """Parameters with gradients that are there before the clock starts, and their optimizer."""

    def __init__(self, case: Case, mesh: DeviceMesh, table: CostTable) -> None:
        torch.manual_seed(0)
        module = nn.Module()
        module.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(cols, rows, bias=False) for rows, cols in block)) for block in case.blocks
        )
        if case.layout == "FSDP2":
            for block in module.blocks:
                fsdp.fully_shard(block, mesh=mesh)
            fsdp.fully_shard(module, mesh=mesh)
        self._module = module
        for param in module.parameters():
            grad = torch.randn(param.shape)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = grad
        where = {} if case.layout == "FSDP2" else {"mesh": mesh}
        groups = [{"params": list(module.parameters()), "use_muon": True}]
        settings = {"lr": 1e-4, "cost_table": table, "step_stats": True, **where, **case.settings}
        self.optimizer = distmuon.Muon(groups, **settings)
        for _ in range(_WARM_UP):
            self.optimizer.step()

    def predict(self, table: CostTable, ranks_per_core: float, startup: float, transport: Transport) -> Timeline:
        """The step of its plan, whose owners stand, at the prices of ``table``."""
        assert self.optimizer._binding is not None and table.speeds is not None
        (part,) = self.optimizer._binding.parts
        pipeline = part.pipeline
        request = self.optimizer._options.request(self.optimizer.param_groups[0])
        specs = tuple(priced(spec, request, table, pipeline.plan) for spec in pipeline.plan.parameters)
        return simulate(
            dataclasses.replace(pipeline.plan, parameters=specs),
            table.speeds,
            itemsize=pipeline.options.wire_dtype.itemsize,
            schedule=pipeline.schedule,
            ranks_per_core=ranks_per_core,
            startup=startup,
            transport=transport,
        )


def priced(spec: ParameterSpec, request: NumericsRequest, table: CostTable, plan: Plan) -> ParameterSpec:
    """A parameter whose matrices cost what ``table`` says."""
    rows, cols = spec.matrices.rows, spec.matrices.cols
    teams = []
    for size in (team.size for team in spec.teams):
        way = team_recipe(rows, cols, _CPU, request, size, table, link_of(table, plan.nodes, size))
        teams.append(TeamCost(size, nanoseconds(way.seconds)))
    return dataclasses.replace(spec, cost=owner_cost(rows, cols, _CPU, request, table), teams=tuple(teams))


class Probes:
    """What the machine takes for the parts of a step, a sample of each a round.

    Engines and passes run on as many ranks as there are cores, all at the same time; links on all ranks.

    Args:
        ranks: All of them.
        sizes: Bytes that leave a rank in one collective.
    """

    def __init__(self, ranks: Ranks, sizes: Sequence[int]) -> None:
        self._ranks, self._sizes = ranks, sizes
        self._busy = range(min(ranks.size, len(os.sched_getaffinity(0))))
        self._group = dist.new_group(list(self._busy))
        self._stacks = []
        for shape in _SHAPES:
            recipe = choose(*shape, _CPU, NumericsRequest(torch.bfloat16, _ENGINE))
            self._stacks.append((recipe, torch.randn(2 if min(shape) < 1024 else 1, *shape).bfloat16()))
        self._engines: list[list[float]] = [[] for _ in _SHAPES]
        self._links: dict[tuple[str, int], list[LinkTiming]] = {}
        self._passes: dict[tuple[str, int], list[PassTiming]] = {}
        self._alone: list[float] = []
        self._meanwhile: list[float] = []
        self._bytes = 0
        self._square = torch.randn(512, 512)

    def round(self, *, links: bool) -> None:
        """Take a sample of everything, but of links only if they are asked for: slow ones take seconds."""
        if links:
            for timing in measure_links(self._ranks, self._sizes, rounds=1):
                self._links.setdefault((timing.collective, timing.size), []).append(timing)
        if not self._bytes:
            self._bytes = int(min(_TRAVELS, _TRAVEL_S / self._link().exchange))
        self._compute(self._alone, 0)
        self._compute(self._meanwhile, self._bytes)
        if self._ranks.rank in self._busy:
            for seen in measure_passes(_CPU, _SIDES, _NUMEL, rounds=1, agree=self._agree):
                self._passes.setdefault((seen.name, seen.side), []).append(seen)
            for (recipe, source), samples in zip(self._stacks, self._engines, strict=True):
                matrices = source.clone()
                self._agree(0.0)
                start = time.perf_counter()
                orthogonalize_(matrices, recipe, eps=1e-7, dtype=torch.bfloat16)
                samples.append((time.perf_counter() - start) / len(source))
        dist.barrier()

    def found(self) -> tuple[CostTable, Transport]:
        """What was found so far, of all ranks: a fit to the median of each case; the same on every rank."""
        mine = (self._engines, self._passes) if self._ranks.rank in self._busy else None
        theirs = [each for each in self._ranks.gather(mine) if each is not None]
        engines = []
        for index, (shape, (recipe, _)) in enumerate(zip(_SHAPES, self._stacks, strict=True)):
            median = statistics.median(seconds for samples, _ in theirs for seconds in samples[index])
            engines.append(Timing(_ENGINE, *shape, recipe.big, recipe.small, recipe.batched, median, 0.0))
        passes = {
            name: fit_pass(
                [_middle([timing for _, found in theirs for timing in found[name, side]]) for side in _SIDES]
            )
            for name in PASSES
        }
        link = self._link()
        speeds = Speeds(link, link, **passes)
        longer = statistics.median(self._meanwhile) - statistics.median(self._alone)
        handling = longer / (2 * self._bytes)
        table = CostTable("cpu-float32", "measured", ((_ENGINE, fit(engines)),), speeds)
        return self._ranks.gather((table, replace(GLOO, handling=max(0.0, handling))))[0]

    def _link(self) -> Link:
        return fit_link([_middle(timings) for timings in self._links.values()])

    def _compute(self, samples: list[float], nbytes: int) -> None:
        """Time products while so many bytes leave this rank and reach it; they have moved before the products end."""
        count = self._ranks.size
        shares = [0 if rank == self._ranks.rank else nbytes // (count - 1) for rank in range(count)]
        send, receive = torch.ones(2, sum(shares), dtype=torch.uint8)
        dist.barrier()
        work = dist.all_to_all_single(receive, send, shares, shares, async_op=True) if nbytes else None
        start = time.perf_counter()
        for _ in range(50):
            torch.mm(self._square, self._square)
        elapsed = time.perf_counter() - start
        if work is not None:
            work.wait()
        samples.append(self._ranks.agree(elapsed))

    def _agree(self, number: float) -> float:
        box = torch.tensor([number], dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group)
        return float(box)


def _middle(timings: Sequence[Any]) -> Any:
    return replace(timings[0], seconds=statistics.median(timing.seconds for timing in timings))


def main(rank: int, request: Request) -> None:
    """Measure everything on one of several processes."""
    torch.set_num_threads(request.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{request.folder}/rendezvous",
        rank=rank,
        world_size=request.ranks,
        timeout=timedelta(seconds=120),
    )
    try:
        rows = _measure(rank, request)
        if rank == 0:
            pathlib.Path(request.folder, "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    finally:
        dist.destroy_process_group()


def _measure(rank: int, request: Request) -> list[Row]:
    count = request.ranks
    # one node or several, collectives are measured between all
    ranks = Ranks(rank, (tuple(range(count)),), _CPU)
    probes = Probes(ranks, _SIZES if request.link is None else _SLOW_SIZES)
    probes.round(links=True)
    table, _ = probes.found()
    mesh = init_device_mesh("cpu", (count,))
    models = {name: Model(CASES[name], mesh, table) for name in request.cases}
    tiny = Model(Case("FSDP2", (((16, 16),) * 8,)), mesh, table)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    phases: dict[str, list[float]] = {name: [] for name in models}
    startups = []
    gc.collect()
    began = time.perf_counter()
    for number in range(request.rounds):
        probes.round(links=request.link is None or number % 3 == 0)
        startups.append(_sample(tiny.optimizer.step)[0])
        for name, model in models.items():
            samples[name].append(_sample(model.optimizer.step))
            phases[name].append(ranks.agree(model.optimizer.last_step_stats()["optim/ns_ms"] / 1e3))
        if number > 1 and ranks.agree(time.perf_counter() - began) > request.limit_s:
            break
    table, transport = probes.found()
    assert table.speeds is not None
    cores = len(os.sched_getaffinity(0))
    found = []
    for name, model in models.items():
        seconds = [sample[0] for sample in samples[name]]
        line = model.predict(table, max(1.0, count / cores), 0.0, transport)
        found.append(
            Row(
                ranks=count,
                link=request.link,
                links=_words(table.speeds, transport, statistics.median(startups)),
                case=name,
                layout=CASES[name].layout,
                median=statistics.median(seconds),
                fastest=min(seconds),
                slowest=max(seconds),
                others=statistics.median(others / (elapsed * cores) for elapsed, others in samples[name]),
                predicted=line.seconds,
                ns=max(line.ns.values()),
                waiting=max(line.waiting.values()),
                measured_ns=statistics.median(phases[name]),
                phases=model.optimizer.last_step_stats(),
            )
        )
    return found


def _sample(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds until the last rank is through, and core seconds that other processes used meanwhile."""
    dist.barrier()
    busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
    function()
    elapsed = time.perf_counter() - start
    dist.barrier()
    found = torch.tensor([elapsed, busy_seconds() - busy, own_seconds() - own], dtype=torch.float64)
    everyone = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, found)
    figures: Tensor = torch.stack(everyone)
    return float(figures[:, 0].max()), max(0.0, float(figures[0, 1] - figures[:, 2].sum()))


def _words(speeds: Speeds, transport: Transport, tiny: float) -> str:
    link = speeds.local
    rates = ", ".join(f"{name} {1e-9 / getattr(link, name):.3f} GB/s" for name in ("exchange", "reduce", "gather"))
    more = f"latency {1e3 * link.latency:.2f} ms, handling {1e9 * transport.handling:.2f} ns a byte"
    return f"{rates}, {more}, a step of 8 tiny matrices {1e3 * tiny:.1f} ms"


if __name__ == "__main__":
    main(int(sys.argv[1]), Request.parse(sys.argv[2]))
