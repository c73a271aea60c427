"""What one rank of overlap.py does: step each contender in turn, and tell times, bytes and spans."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from step_time_contenders import MODELS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

import distmuon
from distmuon.numerics.costs import CostTable
from distmuon.numerics.tables import builtin_speeds, table_for
from distmuon.speeds import Link

_WARM_UP = 2
INF, DEFAULT, TOLD = "bucket_bytes=inf", "default", "default, and cost_table with this link"
# FSDP2 cuts matrices over all ranks; HSDP over those of a host, with a replica on the other
LAYOUTS = ("FSDP2", "HSDP")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        model: One of ``step_time_contenders.MODELS``.
        blocks: Of the model; None: its own number.
        layout: One of :data:`LAYOUTS`.
        rounds: Steps of each contender that count.
        gigabytes: GB/s between the hosts of each rank, for the cost table of a contender of its own; None: no such.
        ranks: On each host.
    """

    model: str
    blocks: int | None
    layout: str
    rounds: int
    gigabytes: float | None
    ranks: int


def main() -> None:
    """Run as ``overlap_ranks.py FOLDER``, with the variables of torchrun."""
    folder = pathlib.Path(sys.argv[1])
    request = Request(**json.loads((folder / "request.json").read_text()))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    try:
        found = _measure(request)
        (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def told(gigabytes: float) -> CostTable:
    """The built-in table of this processor, with a link of so many GB/s between hosts."""
    table = table_for(torch.device("cpu"), torch.bfloat16)
    speeds = table.speeds or builtin_speeds(table.device)
    remote = Link.of(gigabytes=gigabytes, latency=speeds.remote.latency)
    return dataclasses.replace(table, speeds=dataclasses.replace(speeds, remote=remote))


def _measure(request: Request) -> dict[str, Any]:
    control = dist.new_group(backend="gloo")
    model = _model(request)
    settings: dict[str, dict[str, Any]] = {INF: {"bucket_bytes": float("inf")}, DEFAULT: {}}
    if request.gigabytes is not None:
        settings[TOLD] = {"cost_table": told(request.gigabytes)}
    optimizers = {
        name: distmuon.Muon(model, lr=1e-4, adamw_lr=1e-4, step_stats=True, **chosen)
        for name, chosen in settings.items()
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for number in range(_WARM_UP + request.rounds):
        for name, optimizer in optimizers.items():
            found = _step(optimizer, control)
            if number >= _WARM_UP:
                samples[name].append(found)
    spans = {name: list(_spans(optimizer, control)) for name, optimizer in optimizers.items()}
    buckets = {name: _buckets(optimizer) for name, optimizer in optimizers.items()}
    return {"samples": samples, "spans": spans, "buckets": buckets}


def _model(request: Request) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    blocks, shapes = MODELS[request.model]
    model = nn.Module()
    layers = [nn.ParameterDict() for _ in range(request.blocks or blocks)]
    for layer in layers:
        for place, shape in enumerate(shapes):
            layer[f"w{place}"] = nn.Parameter(torch.randn(shape, generator=generator) * shape[1] ** -0.5)
    model.layers = nn.ModuleList(layers)
    world = dist.get_world_size()
    sizes = (world,) if request.layout == "FSDP2" else (world // request.ranks, request.ranks)
    fsdp.fully_shard(model, mesh=init_device_mesh("cpu", sizes))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


def _step(optimizer: distmuon.Muon, control: dist.ProcessGroup) -> dict[str, float]:
    dist.barrier(control)
    start = time.perf_counter()
    optimizer.step()
    own = time.perf_counter() - start
    dist.barrier(control)
    stats = optimizer.last_step_stats()
    return {"step": 1e3 * (time.perf_counter() - start), "own": 1e3 * own} | {
        key.removeprefix("optim/").removesuffix("_ms"): value for key, value in stats.items()
    }


def _spans(optimizer: distmuon.Muon, control: dist.ProcessGroup) -> Iterator[tuple[str, float, float]]:
    """What a step did when, in ms since it began: phases of the optimizer, and exchanges of gloo."""
    dist.barrier(control)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step()
        dist.barrier(control)
    events = profiler.events() or ()
    began = min(event.time_range.start for event in events if event.name.startswith("distmuon/"))
    for event in events:
        if event.name.startswith(("distmuon/", "gloo:all_to_all")):
            yield event.name, (event.time_range.start - began) / 1e3, (event.time_range.end - began) / 1e3


def _buckets(optimizer: distmuon.Muon) -> int:
    return int(optimizer.last_step_stats()["optim/buckets"])


if __name__ == "__main__":
    main()
