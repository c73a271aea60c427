"""Where the milliseconds of a step go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

if TYPE_CHECKING:
    from distmuon.pipeline import Pipeline

PHASES = ("agree", "pack", "wire", "ns", "unpack", "apply", "wait", "adamw")


class StepClock:
    """Times the phases of a step; switched off it costs nothing and waits for nothing.

    On an accelerator phases are marked by events in the current stream, and read when they are asked for. Each is a
    range ``distmuon/NAME`` of :mod:`torch.profiler` too.

    Args:
        enabled: Whether to time at all.

    Attributes:
        steps: Steps that were begun since the optimizer was made, with the present one.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.steps = 0
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.Event, torch.Event]] = []

    def start(self) -> None:
        """Begin a step."""
        self.steps += 1
        self._seconds.clear()
        self._events.clear()

    def phase(self, name: str, device: torch.device | None = None) -> AbstractContextManager[None]:
        """Time a block as one of :data:`PHASES`; blocks of one name add up.

        Args:
            name: Of the phase.
            device: Where its work is done; None: on the host.
        """
        return self._timed(name, device) if self.enabled else nullcontext()

    def milliseconds(self) -> dict[str, float]:
        """Time by phase since :meth:`start`; waits for the device."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return {name: self._seconds[name] * 1e3 for name in PHASES}

    @contextmanager
    def _timed(self, name: str, device: torch.device | None) -> Iterator[None]:
        with record_function(f"distmuon/{name}"), self._clocked(name, device):
            yield

    @contextmanager
    def _clocked(self, name: str, device: torch.device | None) -> Iterator[None]:
        if device is None or device.type == "cpu":
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began
            return
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))


def step_stats(clock: StepClock, pipelines: Sequence[Pipeline]) -> dict[str, float]:
    """The numbers of the last step under the names that logs use."""
    stats = {f"optim/{name}_ms": value for name, value in clock.milliseconds().items()}
    stats["optim/bytes_sent"] = float(sum(pipeline.bytes_sent for pipeline in pipelines))
    stats["optim/buckets"] = float(sum(len(pipeline.plan.buckets) for pipeline in pipelines))
    stats["optim/imbalance"] = max((pipeline.plan.imbalance for pipeline in pipelines), default=1.0)
    return stats
