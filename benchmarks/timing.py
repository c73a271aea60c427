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
# Shorter ones cannot be judged: the kernel counts in hundredths of a second
SHORTEST_JUDGED_S = 0.1


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one function: median, fastest and slowest of the kept samples, and how many."""

    median: float
    fastest: float
    slowest: float
    samples: int


@dataclass(frozen=True)
class Judged(Timing):
    """A timing whose samples were judged: ``rejected`` of them were disturbed; not ``quiet``: so are those kept."""

    rejected: int
    quiet: bool


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, samples: int, limit_s: float, device: torch.device
) -> dict[str, Judged]:
    """Time functions in turn, A B C A B C, so that a drift of the machine hits all alike.

    Each runs once before it counts. A sample is disturbed if other processes used more than 6 % of the cores while it
    ran. Rounds with disturbed samples are taken again, at most ``samples`` times; of a function that never had a quiet
    one the disturbed samples are kept.

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
    return {name: _judged(clean[name], disturbed[name]) for name in functions}


def _judged(clean: list[float], disturbed: list[float]) -> Judged:
    kept, rejected = (clean, len(disturbed)) if clean else (disturbed, 0)
    return Judged(statistics.median(kept), min(kept), max(kept), len(kept), rejected, quiet=bool(clean))


def _sample(function: Callable[[], object], device: torch.device) -> tuple[float, bool]:
    _wait(device)
    busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    function()
    _wait(device)
    elapsed = time.perf_counter() - start
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    quiet = elapsed < SHORTEST_JUDGED_S or others <= _DISTURBANCE * elapsed * (os.cpu_count() or 1)
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
