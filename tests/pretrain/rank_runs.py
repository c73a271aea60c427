"""What tests run on every rank, and on one process to compare with; the results can be pickled."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

from distmuon.pretrain import Interrupted, UserError, load_config, train
from distmuon.pretrain.errors import AgreedError
from distmuon.pretrain.metrics import read_metrics
from distmuon.pretrain.processes import average_, check_same, largest, on_first, process_group, rank, total
from distmuon.pretrain.progress import Silent


class Run(NamedTuple):
    losses: list[float]
    norms: list[float]
    validation: float
    sample: str | None
    folder: str
    records: list[dict[str, Any]]


def run(path: Path, flags: Sequence[str] = (), resume: str | None = None) -> Run:
    summary = train(load_config(path, *flags), resume)
    records = read_metrics(Path(summary.run_dir) / "metrics.jsonl")
    return Run(
        [record["loss_metrics/global_avg_loss"] for record in records],
        [record["grad_norm"] for record in records],
        summary.validation_loss,
        summary.sample,
        summary.run_dir,
        records,
    )


def run_traced(path: Path, flags: Sequence[str] = ()) -> Run:
    """`run` with ``train.compile``, traced and differentiated as ever, but without the minutes of a C++ compiler."""
    original = nn.Module.compile

    def traced(module: nn.Module) -> None:
        original(module, backend="aot_eager")

    with mock.patch.object(nn.Module, "compile", traced):
        return run(path, [*flags, "--train.compile=true"])


class _StopAt(Silent):
    def __init__(self, step: int) -> None:
        self._step = step

    def advance(self, step: int) -> None:
        if step == self._step:
            signal.raise_signal(signal.SIGTERM)


def run_with_signal(path: Path, flags: Sequence[str], on: int, step: int) -> tuple[int, int, str]:
    """A run in which one rank gets SIGTERM after a step: signal, step and checkpoint that each rank reports."""
    display = _StopAt(step) if rank() == on else Silent()
    with mock.patch("distmuon.pretrain.run.open_display", lambda *a, **k: display):
        try:
            run(path, flags)
        except Interrupted as stop:
            assert stop.checkpoint is not None
            return stop.signum, stop.step, str(stop.checkpoint)
    raise AssertionError("the run went to its end")


def message_of(path: Path, flags: Sequence[str] = (), resume: str | None = None) -> tuple[bool, str]:
    """The sentence with which a run fails, and whether the rank knows that all have it."""
    try:
        run(path, flags, resume)
    except UserError as error:
        return isinstance(error, AgreedError), str(error)
    raise AssertionError("the run went to its end")


def message_without_data(path: Path, on: int) -> tuple[bool, str]:
    """`message_of` where one rank does not find its data."""
    flags = [f"--data.source=nowhere-{rank()}.txt"] if rank() == on else []
    return message_of(path, flags)


def message_of_other_steps(path: Path, flags: Sequence[str]) -> tuple[bool, str]:
    """`message_of` where each rank has another number of steps."""
    return message_of(path, [*flags, f"--train.steps={12 + rank()}"])


def message_of_full_disk(path: Path, on: int, what: str) -> tuple[bool, str]:
    """`message_of` where a function fails on one rank as it would on a full disk."""
    if rank() != on:
        return message_of(path)
    with mock.patch(what, side_effect=OSError(28, "No space left on device")):
        return message_of(path)


def agreements() -> list[Any]:
    """What the ranks make of values that differ."""
    import torch

    with process_group():
        found: list[Any] = [
            largest(rank() * 15),
            total([1.0, float(rank())]),
            average_(torch.tensor(float(rank()))).item(),
            on_first(lambda: f"of rank {rank()}"),
        ]
        for call in (lambda: check_same({"train.steps": 5, "train.seed": rank()}), lambda: on_first(_refuse)):
            try:
                call()
            except AgreedError as error:
                found.append(str(error))
        return found


def _refuse() -> None:
    raise UserError(f"rank {rank()} refuses.")


def random_state_after(path: Path, flags: Sequence[str], resume: str | None = None) -> list[int]:
    """The random numbers with which a rank ends a run."""
    train(load_config(path, *flags), resume)
    return torch.get_rng_state().tolist()
