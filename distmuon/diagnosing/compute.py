"""Does every rank compute as fast as the others?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from distmuon.calibrating.devices import wait
from distmuon.diagnosing.findings import WARNING, Facts, Finding, Problem, conclude
from distmuon.diagnosing.job import Job, slow
from distmuon.diagnosing.places import Places
from distmuon.numerics.hardware import compute_dtype

_SIDES = {"cpu": 768, "cuda": 4096}
# Of all products the fastest counts: others' work only ever adds time
_FEWEST, _SECONDS = 8, 0.4


def measure(job: Job) -> Facts:
    """``seconds`` of the fastest product of two square matrices, ``side`` and ``dtype``."""
    device = job.device
    dtype = compute_dtype(torch.bfloat16, device)
    side = _SIDES.get(device.type, _SIDES["cuda"])
    x = torch.ones(side, side, dtype=dtype, device=device)
    fastest, began, rounds = float("inf"), time.perf_counter(), 0
    _timed(x)  # libraries are set up in the first
    while rounds < _FEWEST or time.perf_counter() - began < _SECONDS:
        fastest, rounds = min(fastest, _timed(x)), rounds + 1
    return {"seconds": fastest, "side": side, "dtype": str(dtype).removeprefix("torch.")}


def _timed(x: torch.Tensor) -> float:
    """Seconds of one product."""
    wait(x.device)
    start = time.perf_counter()
    torch.mm(x, x)
    wait(x.device)
    return time.perf_counter() - start


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A warning where a rank takes more than twice the median."""
    seconds = {rank: fact["seconds"] for rank, fact in facts.items()}
    # of two the faster one
    median = statistics.median_low(seconds.values())
    problems = []
    for rank in slow(seconds, median):
        found = f"{places.text([rank])} takes {seconds[rank] / median:.1f} times the median"
        todo = "look for other processes, throttling (power, heat) and too many threads there"
        problems.append(Problem(WARNING, found, todo))
    first = next(iter(facts.values()))
    rate = 2e-12 * first["side"] ** 3
    rates = [rate / limit for limit in (max(seconds.values()), min(seconds.values()))]
    fine = " to ".join(f"{one:.3g}" for one in (rates if len(seconds) > 1 else rates[:1])) + " TFLOP/s a rank"
    measured = f"{fine} in {first['dtype']}, {first['side']} x {first['side']}"
    return conclude("compute", "", problems, measured=measured)
