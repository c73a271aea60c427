"""What one rank of step_time.py does: build the model, step every contender, measure time, bytes and memory.

Gradients are drawn once, the same on all ranks, and copied back before each step, since some optimizers write
into them. Time is that of the slowest rank, from a barrier to the end of the next, so that data still on the
wire counts. A sample is thrown away if other processes used the cores while it ran, as in timing.py; samples
too short to be judged alone are judged by their round.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from step_time_contenders import MODELS, Contender, contenders, world_mesh
from step_time_probes import busy_seconds, counts_bytes, judge, least_bytes, own_seconds, peak_bytes, sent_bytes
from timing import Timing
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

_WARM_UP = 2


@dataclass(frozen=True)
class Request:
    """What to measure; the same on every rank."""

    model: str
    blocks: int | None
    device: str
    threads: int
    rounds: int
    limit_s: float
    ours_settings: tuple[str, ...] = ()
    peer_paths: tuple[str, ...] = ()
    compile_peers: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def wants(self, label: str) -> bool:
        """Whether a contender, by its name and layout, takes part."""
        return any(word in label for word in self.only or ("",)) and not any(word in label for word in self.skip)

    def block_shapes(self) -> list[list[tuple[int, int]]]:
        """Shapes of the matrices, block by block."""
        blocks, shapes = MODELS[self.model]
        return [list(shapes) for _ in range(self.blocks or blocks)]


@dataclass
class Row:
    """The figures of one contender.

    Attributes:
        name: Of the optimizer.
        layout: Of the parameters.
        note: What the reader must know.
        least_bytes: What a step must send (:func:`least_bytes`).
        timing: Of the slowest rank; None if the contender failed.
        quiet: False if every sample was disturbed, and those were kept.
        disturbance: Median share of the cores that other processes used in the kept samples.
        sent_bytes: On loopback in a step, all ranks together; None where it cannot be known.
        peak_bytes: Allocated by the fullest rank in its first step, above what it held before and its state.
        error: Why it failed.
        stats: ``last_step_stats()`` of rank 0 where the optimizer has any.
    """

    name: str
    layout: str
    note: str
    least_bytes: int
    timing: Timing | None = None
    quiet: bool = True
    disturbance: float = 0.0
    sent_bytes: int | None = None
    peak_bytes: int | None = None
    error: str | None = None
    stats: dict[str, float] | None = None


class Model:
    """The parameters of a layout with their gradients."""

    def __init__(self, request: Request, mesh: DeviceMesh, layout: str) -> None:
        generator = torch.Generator(request.device).manual_seed(0)
        device = torch.device(request.device)
        self.module = nn.Module()
        self.module.blocks = nn.ModuleList(_block(shapes, device) for shapes in request.block_shapes())
        params = list(self.module.parameters())
        for param in params:
            nn.init.normal_(param, std=param.shape[1] ** -0.5, generator=generator)
        if layout == "FSDP2":
            for block in self.module.blocks:
                fsdp.fully_shard(block, mesh=mesh)
            fsdp.fully_shard(self.module, mesh=mesh)
        self.params = list(self.module.parameters())
        self._grads: list[Tensor] = []
        for param in self.params:
            grad = torch.randn(param.shape, device=device, generator=generator)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            self._grads.append(grad)
        self._kept = [_local(grad).clone() for grad in self._grads]

    def set_gradients(self) -> None:
        """Give every parameter its gradient as it was drawn."""
        for param, grad, kept in zip(self.params, self._grads, self._kept, strict=True):
            _local(grad).copy_(kept)
            param.grad = grad


def run_rank(rank: int, ranks: int, request: Request, folder: str) -> None:
    """Measure everything on ``ranks`` processes; rank 0 writes ``rows.json`` into ``folder``."""
    if request.device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(request.threads)
    dist.init_process_group(
        "nccl" if request.device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    try:
        rows = _measure(request)
        if rank == 0:
            pathlib.Path(folder, "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    finally:
        dist.destroy_process_group()


def _measure(request: Request) -> list[Row]:
    # Barriers and figures travel apart, so that a contender's collectives stay its own
    control = dist.new_group(backend="gloo")
    mesh = world_mesh(request.device)
    models = {layout: Model(request, mesh, layout) for layout in ("replicated", "FSDP2")}
    numels = [rows * cols for block in request.block_shapes() for rows, cols in block]
    rows, steps = [], []
    for contender in contenders(
        request.device,
        ours_settings=request.ours_settings,
        peer_paths=request.peer_paths,
        compile_peers=request.compile_peers,
    ):
        if not request.wants(f"{contender.name} {contender.layout}"):
            continue
        least = least_bytes(numels, mesh.size(), contender.layout) if contender.divides else 0
        row = Row(contender.name, contender.layout, contender.note, least)
        rows.append(row)
        _progress(f"{row.name}, {row.layout}: warm-up")
        optimizer = _try(contender, models[contender.layout], mesh, row, control)
        if optimizer is not None:
            steps.append((row, models[contender.layout], optimizer))
    _time(steps, request, control)
    for row, _, optimizer in steps:
        row.stats = getattr(optimizer, "last_step_stats", dict)() or None
    return rows


def _try(
    contender: Contender, model: Model, mesh: DeviceMesh, row: Row, control: dist.ProcessGroup
) -> torch.optim.Optimizer | None:
    """Build, warm up and take the untimed figures; None, and the reason in ``row``, where any rank fails."""
    optimizer, error, peak = None, None, 0
    try:
        optimizer = contender.build(model.params, mesh)
        model.set_gradients()
        # of the first step, as some keep their buffers from then on; their state is no temporary memory
        peak = peak_bytes(optimizer.step, mesh.device_type) - state_bytes(optimizer)
        for _ in range(_WARM_UP):
            model.set_gradients()
            optimizer.step()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}".split("\n")[0]
    errors: list[Any] = [None] * mesh.size()
    dist.all_gather_object(errors, error, group=control)
    row.error = next((found for found in errors if found), None)
    if row.error or optimizer is None:
        return None
    model.set_gradients()
    largest = torch.tensor(peak)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=control)
    row.peak_bytes = int(largest)
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this rank's shards of the optimizer state; some keep lists of tensors."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    flat = itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
    tensors = [value for value in flat if isinstance(value, Tensor)]
    return sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in tensors)


def _time(
    steps: Sequence[tuple[Row, Model, torch.optim.Optimizer]], request: Request, control: dist.ProcessGroup
) -> None:
    """Rounds A B C A B C; every rank knows the same figures, so all stop together."""
    if not steps:
        return
    began = time.perf_counter()
    clean: list[list[_Sample]] = [[] for _ in steps]
    disturbed: list[list[_Sample]] = [[] for _ in steps]
    cores = os.cpu_count() or 1
    gc.collect()
    for number in range(2 * request.rounds):
        taken = []
        for _, model, optimizer in steps:
            model.set_gradients()
            taken.append(_sample(optimizer.step, began, request.device, control))
        quiet = judge([sample.seconds for sample in taken], [sample.others for sample in taken], cores)
        for index, sample in enumerate(taken):
            (clean if quiet[index] else disturbed)[index].append(sample)
        _progress(f"round {number + 1}: {sum(quiet)} of {len(quiet)} samples were quiet")
        if all(len(kept) >= request.rounds for kept in clean) or taken[-1].since > request.limit_s:
            break
    for (row, _, _), good, bad in zip(steps, clean, disturbed, strict=True):
        kept = good or bad
        row.quiet = bool(good)
        row.disturbance = statistics.median(sample.others / (sample.seconds * cores) for sample in kept)
        times = [sample.seconds * 1e3 for sample in kept]
        row.timing = Timing(statistics.median(times), min(times), max(times), len(times))
        if request.device == "cpu" and counts_bytes():
            # Other processes can only add to the counter
            row.sent_bytes = min(sample.sent for sample in good + bad)


@dataclass(frozen=True)
class _Sample:
    """Seconds of the slowest rank, core seconds of other processes, bytes on loopback, seconds since the first."""

    seconds: float
    others: float
    sent: int
    since: float


def _sample(step: Callable[[], object], began: float, device: str, control: dist.ProcessGroup) -> _Sample:
    _wait(device)
    sent = sent_bytes()
    dist.barrier(group=control)
    busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
    step()
    _wait(device)
    dist.barrier(group=control)
    now = time.perf_counter()
    found = [now - start, busy_seconds() - busy, own_seconds() - own, sent_bytes() - sent, now - began]
    mine = torch.tensor(found, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine, group=control)
    figures = torch.stack(everyone)
    # What the machine counts is taken from rank 0
    others = float(figures[0, 1] - figures[:, 2].sum())
    return _Sample(float(figures[:, 0].max()), others, int(figures[0, 3]), float(figures[0, 4]))


def _progress(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"  {text}", file=sys.stderr, flush=True)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _block(shapes: Sequence[tuple[int, int]], device: torch.device) -> nn.Module:
    return nn.Sequential(*(nn.Linear(cols, rows, bias=False, device=device) for rows, cols in shapes))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
