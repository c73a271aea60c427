"""What the measurements of a rank have in common."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distmuon.calibrating.devices import wait
from distmuon.diagnosing.findings import FAILURE, Facts, Problem
from distmuon.diagnosing.places import Here, Places

# Own time-outs come first: the watchdog of NCCL ends the process
_GROUP_TIMES = 3.0


@dataclass
class Job:
    """One rank among those that measure.

    Attributes:
        here: Which.
        places: All of them.
        device: What it computes on.
        given: What rank 0 has prepared for the measurement at hand.
        entered: Collectives that this rank has entered in it; of ranks that wait in vain, those with the fewest are
            late.
    """

    here: Here
    places: Places
    device: torch.device
    given: Any = None
    entered: int = 0

    def group_timeout(self) -> timedelta:
        """Of process groups."""
        return timedelta(seconds=_GROUP_TIMES * self.here.timeout_s)

    def together(self, group: dist.ProcessGroup | None = None) -> None:
        """Return when every rank of a group is here, and the device idle."""
        wait(self.device)
        self.entered += 1
        dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        wait(self.device)


def stalled(facts: dict[int, Facts], places: Places) -> list[Problem]:
    """What went wrong in a measurement, and on whom it depends.

    Args:
        facts: Of each rank that has told; ``error`` and ``entered`` where it could not finish.
        places: Of all ranks that took part.
    """
    problems = []
    silent = [rank for node in places.nodes for rank in node if rank not in facts]
    failed = {rank: fact for rank, fact in facts.items() if "error" in fact}
    if silent:
        todo = "look at that machine, and at what the rank itself has said"
        problems.append(Problem(FAILURE, f"nothing was heard of {places.text(silent)} in time", todo))
    late = {rank: fact for rank, fact in failed.items() if fact.get("late")}
    for rank, fact in failed.items():
        if rank not in late:
            todo = "look at the interfaces above and at the network between the machines"
            problems.append(Problem(FAILURE, f"{places.text([rank])}: {fact['error']}", todo))
            break  # others fail for the lack of this one
    if late and not silent and len(late) == len(failed):
        fewest = min(fact["entered"] for fact in late.values())
        behind = [rank for rank, fact in late.items() if fact["entered"] == fewest]
        seconds = next(iter(late.values()))["error"]
        if len(behind) < len(late) or len(late) < len(facts):
            found = f"{places.text(behind)} stalled ({seconds})"
            problems.append(Problem(FAILURE, found, "look at that machine: load, memory, disks and its network"))
        else:
            found = f"all ranks waited for one another ({seconds})"
            todo = "look at the network between them, and raise --timeout if it is slow"
            problems.append(Problem(FAILURE, found, todo))
    return problems


def slow(seconds: dict[int, float], median: float) -> list[int]:
    """The ranks that took more than twice the median."""
    return [rank for rank, own in seconds.items() if own > 2.0 * median]
