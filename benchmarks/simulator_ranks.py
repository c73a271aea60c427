"""What one rank of simulator.py does: measure its links, step every model in turn, and predict the steps."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from simulator_models import CASES, Case
from step_time_probes import busy_seconds, own_seconds
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import distmuon
from distmuon.calibrating.fit import fit_link
from distmuon.calibrating.links import measure_links
from distmuon.calibrating.ranks import Ranks
from distmuon.numerics.costs import CostTable
from distmuon.plan.simulate import GLOO, Timeline, Transport, simulate
from distmuon.speeds import Speeds

_CPU = torch.device("cpu")
_WARM_UP = 2
# Bytes that leave a rank in one collective, about those of a bucket
_SIZES = (1 << 16, 1 << 19, 1 << 21, 1 << 23)
_SLOW_SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)


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
        folder: Where ranks meet, with the cost table in ``table.json``; rank 0 leaves ``rows.json``.
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
        phases: ``last_step_stats()`` of rank 0.
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
    phases: dict[str, float]

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.median


class Model:
    """Parameters with gradients that are there before the clock starts."""

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

    def predict(self, speeds: Speeds, ranks_per_core: float, startup: float, transport: Transport) -> list[Timeline]:
        """The steps of its plans, which run one after another."""
        assert self.optimizer._binding is not None
        return [
            simulate(
                part.pipeline.plan,
                speeds,
                itemsize=2,
                schedule=part.pipeline.schedule,
                ranks_per_core=ranks_per_core,
                startup=startup,
                transport=transport,
            )
            for part in self.optimizer._binding.parts
        ]


def main(rank: int, request: Request) -> None:
    """Measure everything on one of several processes."""
    torch.set_num_threads(request.threads)
    store = dist.FileStore(str(pathlib.Path(request.folder, "store")), request.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=request.ranks, timeout=timedelta(seconds=120))
    try:
        rows = _measure(rank, request)
        if rank == 0:
            pathlib.Path(request.folder, "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    finally:
        dist.destroy_process_group()


def _measure(rank: int, request: Request) -> list[Row]:
    table = CostTable.load(pathlib.Path(request.folder, "table.json"))
    assert table.speeds is not None
    count = request.ranks
    nodes = (tuple(range(count)),) if request.link is None else ((0,), (1,))
    ranks = Ranks(rank, nodes, _CPU)
    timings = measure_links(ranks, _SIZES if request.link is None else _SLOW_SIZES, rounds=9, limit_s=10.0)
    link = fit_link(timings)
    speeds = replace(table.speeds, local=link, remote=link)
    table = replace(table, speeds=speeds)
    mesh = init_device_mesh("cpu", (count,))
    transport = replace(GLOO, handling=_handling())
    models = {name: Model(CASES[name], mesh, table) for name in request.cases}
    tiny = Model(Case("FSDP2", (((16, 16),) * 8,)), mesh, table)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    startups = []
    for model in [*models.values(), tiny]:
        for _ in range(_WARM_UP):
            model.optimizer.step()
    gc.collect()
    began = time.perf_counter()
    for number in range(request.rounds):
        startups.append(_sample(tiny.optimizer.step)[0])
        for name, model in models.items():
            samples[name].append(_sample(model.optimizer.step))
        if number > 1 and ranks.agree(time.perf_counter() - began) > request.limit_s:
            break
    cores = len(os.sched_getaffinity(0))
    found = []
    for name, model in models.items():
        seconds = [sample[0] for sample in samples[name]]
        lines = model.predict(speeds, max(1.0, count / cores), 0.0, transport)
        found.append(
            Row(
                ranks=count,
                link=request.link,
                links=_words(speeds, transport, statistics.median(startups)),
                case=name,
                layout=CASES[name].layout,
                median=statistics.median(seconds),
                fastest=min(seconds),
                slowest=max(seconds),
                others=statistics.median(others / (elapsed * cores) for elapsed, others in samples[name]),
                predicted=sum(line.seconds for line in lines),
                ns=sum(max(line.ns.values()) for line in lines),
                waiting=sum(max(line.waiting.values()) for line in lines),
                phases=model.optimizer.last_step_stats(),
            )
        )
    return found


def _handling() -> float:
    """Seconds that a byte which travels keeps a rank from computing, sent and received bytes counted alike."""
    square = torch.randn(384, 384)
    send, receive = torch.ones(2, 1 << 22, dtype=torch.bfloat16)
    shares = [len(part) for part in send.tensor_split(dist.get_world_size())]

    def compute() -> None:
        for _ in range(60):
            square @ square

    def both() -> None:
        work = dist.all_to_all_single(receive, send, shares, shares, async_op=True)
        compute()
        work.wait()

    own = shares[dist.get_rank()]
    nbytes = 2 * 2 * (len(send) - own)
    alone, busy = [], []
    for _ in range(7):
        alone.append(_sample(compute)[0])
        busy.append(_sample(both)[0])
    return max(0.0, statistics.median(busy) - statistics.median(alone)) / nbytes


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
    rates = ", ".join(f"{name} {1e-9 / getattr(link, name):.2f} GB/s" for name in ("exchange", "reduce", "gather"))
    more = f"latency {1e3 * link.latency:.2f} ms, handling {1e9 * transport.handling:.2f} ns a byte"
    return f"{rates}, {more}, a step of 8 tiny matrices {1e3 * tiny:.1f} ms"


if __name__ == "__main__":
    main(int(sys.argv[1]), Request.parse(sys.argv[2]))
