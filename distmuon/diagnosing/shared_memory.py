"""Is there enough shared memory? Data loaders and NCCL pass data between processes through it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, by_value, conclude, size_text
from distmuon.diagnosing.places import Here, Places

_FOLDER = "/dev/shm"
# Docker's default, and what a few data loaders and NCCL take together
_FEWEST, _ENOUGH = 64 << 20, 1 << 30


def look(here: Here) -> Facts:
    """``size`` and ``free`` bytes of /dev/shm."""
    found = os.statvfs(_FOLDER)
    return {"size": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A failure at 64 MiB, which containers have by default; a warning below 1 GiB."""
    problems = []
    for node in places.nodes:
        fact = facts[node[0]]
        if fact["free"] < _ENOUGH:
            where = f" on {places.hosts[node[0]]}" if places.several else ""
            found = f"{size_text(fact['free'])} of {size_text(fact['size'])} of {_FOLDER} are free{where}"
            # what is left in a full one has to go; a small one has to grow
            full = fact["size"] > 2 * _ENOUGH
            todo = f"remove what other jobs left in {_FOLDER}" if full else "start the container with --shm-size=16g"
            problems.append(Problem(FAILURE if fact["free"] <= _FEWEST else WARNING, found, todo))
    free = min(fact["free"] for fact in facts.values())
    size = ", ".join(by_value({rank: size_text(fact["size"]) for rank, fact in facts.items()}))
    return conclude("shared memory", f"{size_text(free)} of {size} of {_FOLDER} are free", problems)
