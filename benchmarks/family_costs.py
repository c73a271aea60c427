"""What a member of the Muon family costs beside the others: CPU time of a step, bytes between ranks, state.

CPU time, of all ranks together, is what can be told apart on a machine that others share: it does not count their
turns, nor waiting. Members step the same parameters in turns, with gradients that are there before the clock starts. A
sample of a member whose steps differ is the mean over their period.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from family_members import MEMBERS, REFERENCE
from qk_clip import loss_of, make_model
from rich import box
from rich.table import Table
from step_time_contenders import world_mesh
from step_time_ranks import Model, Request, state_bytes
from torch.multiprocessing.spawn import spawn
from torch.optim import Optimizer

import distmuon

# Small enough that the last step computes with the same kind of numbers as the first
RATE = 1e-4
VOCABULARY, WIDTH, LAYERS, TOKENS, BATCH = 257, 448, 4, 128, 16


@dataclass
class Cost:
    """What all ranks together do in a step.

    Attributes:
        ms: CPU time, median over rounds.
        sent_bytes: By ``last_step_stats``; 0 of what is not of distmuon.
        state_bytes: Of the optimizer's state.
        numel: Elements of the parameters.
        error: Why there are no figures.
    """

    ms: float = 0.0
    sent_bytes: float = 0.0
    state_bytes: int = 0
    numel: int = 0
    error: str | None = None


@dataclass
class Share:
    """CPU time of a training step in one process.

    Attributes:
        forward_backward_ms: Of the model.
        step_ms: Of each member's step.
        parameters: Of the model.
    """

    forward_backward_ms: float
    step_ms: dict[str, float]
    parameters: int

    def of(self, name: str) -> float:
        """The optimizer's part of the whole, from 0 to 1."""
        return self.step_ms[name] / (self.step_ms[name] + self.forward_backward_ms)


def costs(ranks: int, names: Sequence[str], *, model: str, blocks: int, rounds: int) -> dict[str, Cost]:
    """Step the matrices of a model of step_time.py, whole in one process, or by FSDP2 on several."""
    os.environ["OMP_NUM_THREADS"] = "1"
    request = Request(model=model, blocks=blocks, device="cpu", threads=1, rounds=rounds, limit_s=600.0)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (ranks, request, tuple(names), folder), nprocs=ranks)
        found = json.loads(Path(folder, "costs.json").read_text())
    return {name: Cost(**cost) for name, cost in found.items()}


def _run_rank(rank: int, ranks: int, request: Request, names: Sequence[str], folder: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    try:
        found = _measure(request, names)
        if rank == 0:
            costs = {name: dataclasses.asdict(cost) for name, cost in found.items()}
            Path(folder, "costs.json").write_text(json.dumps(costs))
    finally:
        dist.destroy_process_group()


def _measure(request: Request, names: Sequence[str]) -> dict[str, Cost]:
    control = dist.new_group(backend="gloo")
    ranks = dist.get_world_size()
    model = Model(request, world_mesh("cpu"), "replicated" if ranks == 1 else "FSDP2")
    model.set_gradients()
    found = {name: Cost(numel=sum(param.numel() for param in model.params)) for name in names}
    optimizers: dict[str, Optimizer] = {}
    for name in names:
        try:
            optimizer = MEMBERS[name].build(model.module, RATE)
            for _ in range(MEMBERS[name].period):
                optimizer.step()
        except Exception as error:  # a library that knows no DTensor raises on all ranks alike
            found[name].error = f"{type(error).__name__}: {error}".split("\n")[0]
        else:
            optimizers[name] = optimizer

    def stepper(name: str) -> Callable[[], float]:
        def sample() -> float:
            model.set_gradients()
            dist.barrier(group=control)
            began = time.process_time()
            optimizers[name].step()
            spent = time.process_time() - began
            return _of_all_ranks(spent, control)

        return sample

    times = medians({name: stepper(name) for name in optimizers}, request.rounds)
    for name, optimizer in optimizers.items():
        found[name].ms = 1e3 * times[name]
        found[name].state_bytes = int(_of_all_ranks(state_bytes(optimizer), control))
        if MEMBERS[name].ours:
            found[name].sent_bytes = _of_all_ranks(_sent_bytes(name, model), control)
    return found


def _of_all_ranks(value: float, control: dist.ProcessGroup) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, group=control)
    return float(total)


def _sent_bytes(name: str, model: Model) -> float:
    """Mean over a period, by an optimizer that counts: counting would cost the others time."""
    optimizer = MEMBERS[name].build(model.module, RATE, step_stats=True)
    assert isinstance(optimizer, distmuon.Muon)
    sent = []
    for _ in range(MEMBERS[name].period):
        optimizer.step()
        sent.append(optimizer.last_step_stats()["optim/bytes_sent"])
    return statistics.fmean(sent)


def medians(samples: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of what the samples of members return, taken in turns; of means over a member's period."""
    taken: dict[str, list[float]] = {name: [] for name in samples}
    for _ in range(rounds):
        for name, sample in samples.items():
            period = MEMBERS[name].period if name in MEMBERS else 1
            taken[name].append(statistics.fmean(sample() for _ in range(period)))
    return {name: statistics.median(values) for name, values in taken.items()}


def share_of_training(names: Sequence[str], rounds: int, width: int = WIDTH) -> Share:
    """Forward, backward and every member's step of a Llama of four layers over 2048 random tokens."""
    torch.set_num_threads(1)
    model = make_model(VOCABULARY, width, LAYERS, TOKENS)
    windows = torch.randint(0, VOCABULARY, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    optimizers = {name: MEMBERS[name].build(model, RATE) for name in names}

    def forward_backward() -> None:
        model.zero_grad()
        loss_of(model, windows).backward()

    def clocked(function: Callable[[], object]) -> Callable[[], float]:
        def sample() -> float:
            began = time.process_time()
            function()
            return time.process_time() - began

        return sample

    forward_backward()
    for name, optimizer in optimizers.items():
        for _ in range(MEMBERS[name].period):
            optimizer.step()
    samples = {"": clocked(forward_backward)}
    samples |= {name: clocked(optimizer.step) for name, optimizer in optimizers.items()}
    times = {name: 1e3 * seconds for name, seconds in medians(samples, rounds).items()}
    return Share(times.pop(""), times, sum(param.numel() for param in model.parameters()))


def costs_table(by_ranks: Mapping[int, Mapping[str, Cost]], share: Share) -> Table:
    """A row a member; times beside Moonlight's."""
    several = [ranks for ranks in by_ranks if ranks > 1]
    table = Table(title=f"CPU time of a step beside {REFERENCE}'s", box=box.SIMPLE, padding=(0, 1))
    table.add_column("member")
    for ranks in by_ranks:
        layout = "1 process" if ranks == 1 else f"{ranks} ranks,\nFSDP2"
        table.add_column(layout, justify="right")
    for ranks in several:
        table.add_column(f"sent a step,\n{ranks} ranks", justify="right")
    table.add_column("state, bytes\na parameter", justify="right")
    table.add_column("of a\ntraining step", justify="right")
    for name in share.step_ms:
        cells = []
        for found in by_ranks.values():
            cost, base = found[name], found[REFERENCE].ms
            cells.append("failed" if cost.error else f"{cost.ms / base:.2f}")
        for ranks in several:
            cost = by_ranks[ranks][name]
            cells.append("" if cost.error else f"{cost.sent_bytes / 1e6:.1f} MB")
        state = next(found[name] for found in by_ranks.values())
        cells.append("" if state.error else f"{state.state_bytes / state.numel:.1f}")
        table.add_row(name, *cells, f"{share.of(name):.1%}")
    return table


def measure_costs(
    names: Sequence[str], rounds: int, *, model: str = "blocks_512", blocks: int = 2, width: int = WIDTH
) -> tuple[Table, list[str], dict[str, object]]:
    """Measure everything; returns the table, what must be read beside it, and the figures."""
    by_ranks = {ranks: costs(ranks, names, model=model, blocks=blocks, rounds=rounds) for ranks in (1, 2)}
    share = share_of_training(names, rounds, width)
    base = {ranks: found[REFERENCE] for ranks, found in by_ranks.items()}
    lines = [
        f"Steps: {blocks} blocks of {model}, {base[1].numel / 1e6:.1f} M parameters, {REFERENCE}: "
        + ", ".join(f"{cost.ms:.0f} ms on {ranks} rank{'s' * (ranks > 1)}" for ranks, cost in base.items()),
        f"Training step: {share.parameters / 1e6:.1f} M parameters, {BATCH * TOKENS} tokens, forward and backward "
        f"{share.forward_backward_ms:.0f} ms",
    ]
    lines += [
        f"{name} failed on {ranks} ranks: {cost.error}"
        for ranks, found in by_ranks.items()
        for name, cost in found.items()
        if cost.error
    ]
    figures: dict[str, object] = {
        "ranks": {
            ranks: {name: dataclasses.asdict(cost) for name, cost in found.items()} for ranks, found in by_ranks.items()
        },
        "share": dataclasses.asdict(share),
    }
    return costs_table(by_ranks, share), lines, figures
