"""Do the ranks of a machine have as many threads as it has cores?"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

import torch

from distmuon.diagnosing.findings import WARNING, Facts, Finding, Problem, conclude
from distmuon.diagnosing.places import Here, Places

# cgroup version 2: microseconds of CPU time in a period, and the period
_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")


def look(here: Here) -> Facts:
    """Cores that this process may use, its threads, and what it was told."""
    return {
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "device": here.device,
    }


def cores() -> int:
    """How many this process may use, by its affinity and the quota of its container."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = _QUOTA.read_text().split()
        return min(own, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no quota
        return own


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A warning where threads are more than cores, or on CPUs less than half of them."""
    problems = []
    for rank, fact in facts.items():
        omp = fact["omp"]
        if omp is not None and not omp.split(",")[0].strip().isdigit():
            found = f"OMP_NUM_THREADS is {omp!r} on {places.text([rank])}, which is no number"
            problems.append(Problem(WARNING, found, "set it to cores of a machine / ranks of a machine"))
    told: dict[str, None] = {}
    for node in places.nodes:
        have = min(facts[rank]["cores"] for rank in node)
        threads = [facts[rank]["threads"] for rank in node]
        shape = f"{len(node)} rank{'s' * (len(node) > 1)} with {max(threads)} thread{'s' * (max(threads) > 1)}"
        shape += " each" * (len(node) > 1)
        told[f"{shape}, {have} cores"] = None
        where = f" on {places.hosts[node[0]]}" if places.several else ""
        todo = f"export OMP_NUM_THREADS={max(1, have // len(node))}"
        if len(node) > have:
            todo = f"start {have} ranks on a machine at most, or ask for more cores"
        if sum(threads) > have:
            unset = ", and OMP_NUM_THREADS is not set" if facts[node[0]]["omp"] is None else ""
            problems.append(Problem(WARNING, f"{shape} share {have} cores{where}{unset}", todo))
        elif facts[node[0]]["device"] == "cpu" and 2 * sum(threads) < have:
            problems.append(Problem(WARNING, f"{shape} leave more than half of {have} cores idle{where}", todo))
    return conclude("threads", "; ".join(told), problems)
