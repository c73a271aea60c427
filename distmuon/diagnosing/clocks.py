"""Do the clocks of all machines agree?"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, conclude
from distmuon.diagnosing.job import Job
from distmuon.diagnosing.places import Places

# torchrun's rendezvous takes a machine for lost whose last word is 15 s old by its own clock
_LOST_S, _NOTED_S = 15.0, 1.0
_ROUND_TRIPS = 10


def measure(job: Job) -> Facts:
    """How far this machine's clock is ahead of that of rank 0, asked by the first rank of each machine.

    Of several round trips the shortest counts; the other clock was read somewhere in it, so half of it is how far the
    answer may be off.

    Returns:
        ``ahead`` and ``off``, seconds; nothing on other ranks, and on rank 0.
    """
    first = [node[0] for node in job.places.nodes]
    if job.here.rank == 0:
        for rank in first[1:]:
            _answer(job, rank)
    return _ask(job) if job.here.rank in first[1:] else {}


def now() -> float:
    """Seconds by the clock of this machine."""
    return time.time()


def _answer(job: Job, rank: int) -> None:
    box = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUND_TRIPS):
        job.entered += 1
        dist.recv(box, rank)
        box[0] = now()
        dist.send(box, rank)


def _ask(job: Job) -> Facts:
    box, found = torch.zeros(1, dtype=torch.float64), []
    for _ in range(_ROUND_TRIPS):
        job.entered += 1
        before, start = now(), time.perf_counter()
        dist.send(box, 0)
        dist.recv(box, 0)
        took = time.perf_counter() - start
        found.append((took / 2, before + took / 2 - box.item()))
    off, ahead = min(found)
    return {"ahead": ahead, "off": off}


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A warning where clocks are surely more than 1 s apart, a failure at 15 s."""
    own = {rank: fact for rank, fact in facts.items() if "ahead" in fact}
    if not own:
        return conclude("clocks", "one machine, one clock", [])
    problems = []
    for rank, fact in own.items():
        apart = abs(fact["ahead"]) - fact["off"]
        if apart > _NOTED_S:
            way = "ahead of" if fact["ahead"] > 0 else "behind"
            told = f"{abs(fact['ahead']):.2f} s (to within {fact['off']:.2g} s)"
            found = f"the clock of {places.text([rank])} is {told} {way} that of rank 0"
            todo = "let chrony or ntpd set the clocks (chronyc tracking)"
            problems.append(Problem(FAILURE if apart > _LOST_S else WARNING, found, todo))
    worst = max(own.values(), key=lambda fact: abs(fact["ahead"]))
    off = max(fact["off"] for fact in own.values())
    return conclude(
        "clocks", f"at most {abs(worst['ahead']) * 1e3:.2f} ms apart, to within {off * 1e3:.2g} ms", problems
    )
