"""What a person sees of a running run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
from typing import Protocol

import rich
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from distmuon.pretrain.metrics import Record
from distmuon.pretrain.report import BITS_PER_BYTE, TRAIN_LOSS, VALIDATION_LOSS

logger = logging.getLogger(__name__)


class Display(Protocol):
    """Shows the records of a run."""

    def advance(self, step: int) -> None:
        """A step is done."""

    def show(self, record: Record) -> None:
        """A record was written."""

    def close(self) -> None:
        """The run is over."""


def wants_bar(progress: str) -> bool:
    """Whether ``log.progress`` means a bar here; lines are for files, CI and batch systems."""
    if progress != "auto":
        return progress == "bar"
    unattended = "CI" in os.environ or "SLURM_JOB_ID" in os.environ
    return rich.get_console().is_terminal and not unattended


def open_display(progress: str, *, steps: int, done: int) -> Display:
    """The display that ``log.progress`` asks for.

    Args:
        progress: ``"auto"``, ``"bar"``, ``"lines"`` or ``"off"``.
        steps: Steps of the whole run.
        done: Steps that are done already.
    """
    if progress == "off":
        return Silent()
    return Bar(steps, done) if wants_bar(progress) else Lines(steps)


class Silent:
    """Shows nothing."""

    def advance(self, step: int) -> None:
        """A step is done."""

    def show(self, record: Record) -> None:
        """A record was written."""

    def close(self) -> None:
        """The run is over."""


class Lines(Silent):
    """A line of plain text for each record, through ``logging``."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def show(self, record: Record) -> None:
        """Log the record."""
        logger.info(line(record, self._steps))


class Bar:
    """A progress bar with loss, learning rate, speed and remaining time; validations stay as lines."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._progress = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=rich.get_console(),
            expand=True,
        )
        self._task = self._progress.add_task("", total=steps, completed=done, numbers="")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def show(self, record: Record) -> None:
        """Renew the numbers."""
        if TRAIN_LOSS in record:
            numbers = f"loss {record[TRAIN_LOSS]:.4f}  lr {_rate(record):.2e}  {record['throughput(tps)']:,.0f} tok/s"
            self._progress.update(self._task, numbers=numbers)
        if VALIDATION_LOSS in record:
            logger.info(line(record, self._steps))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def line(record: Record, steps: int) -> str:
    """A record as one line of text; what it does not have is left out."""
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    if TRAIN_LOSS in record:
        parts += [
            f"loss {record[TRAIN_LOSS]:.4f}",
            f"lr {_rate(record):.2e}",
            f"{record['time_metrics/end_to_end(s)'] * 1e3:.0f} ms",
            f"{record['throughput(tps)']:,.0f} tok/s",
        ]
        if "mfu(%)" in record:
            parts.append(f"mfu {record['mfu(%)']:.1f}%")
        if "memory/max_reserved(GiB)" in record:
            parts.append(f"{record['memory/max_reserved(GiB)']:.2f} GiB")
    if VALIDATION_LOSS in record:
        parts.append(f"validation loss {record[VALIDATION_LOSS]:.4f}")
        if BITS_PER_BYTE in record:
            parts.append(f"{record[BITS_PER_BYTE]:.3f} bits/byte")
    return "  ".join(parts)


def _rate(record: Record) -> float:
    return float(record["lr/muon"] if "lr/muon" in record else record["lr/adamw"])
