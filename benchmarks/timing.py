"""Interleaved timing of functions on a machine that others may share."""

from __future__ import annotations

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# A sample is thrown away if other processes used more than this share of the cores while it ran
_DISTURBANCE = 0.06


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one function: median, fastest and slowest of the kept samples, and how many."""

    median: float
    fastest: float
    slowest: float
    samples: int


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, samples: int, limit_s: float, device: torch.device
) -> dict[str, Timing]:
    """Time functions in turn, A B C A B C, so that a drift of the machine hits all alike.

    Each runs once before it counts. Rounds in which other processes disturbed a sample are taken again, at
    most ``samples`` times; if the machine never was quiet the disturbed samples are kept.

    Args:
        functions: By name; each is called without arguments.
        samples: Rounds to keep.
        limit_s: Stop starting new rounds after this many seconds (one is always taken).
        device: Waited for after each call.
    """
    started = time.perf_counter()
    for function in functions.values():
        function()
    clean: dict[str, list[float]] = {name: [] for name in functions}
    disturbed: dict[str, list[float]] = {name: [] for name in functions}
    for attempt in range(2 * samples):
        if min(map(len, clean.values())) >= samples:
            break
        if attempt and time.perf_counter() - started > limit_s:
            break
        for name, function in functions.items():
            milliseconds, quiet = _sample(function, device)
            (clean if quiet else disturbed)[name].append(milliseconds)
    kept = {name: clean[name] or disturbed[name] for name in functions}
    return {name: Timing(statistics.median(ms), min(ms), max(ms), len(ms)) for name, ms in kept.items()}


def _sample(function: Callable[[], object], device: torch.device) -> tuple[float, bool]:
    _wait(device)
    busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    function()
    _wait(device)
    elapsed = time.perf_counter() - start
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    # The kernel counts in hundredths of a second, so short samples cannot be judged
    quiet = elapsed < 0.1 or others <= _DISTURBANCE * elapsed * (os.cpu_count() or 1)
    return elapsed * 1e3, quiet


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float:
    """Seconds that all cores together spent on work since boot; 0 where the system does not tell."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
