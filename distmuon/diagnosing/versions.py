"""Do all ranks run the same Python, torch, NCCL and distmuon?"""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch
import torch.distributed as dist

from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, by_value, conclude
from distmuon.diagnosing.places import Here, Places
from distmuon.versions import code_version

_NAMES = {"python": "Python", "torch": "torch", "nccl": "NCCL", "distmuon": "distmuon"}


def look(here: Here) -> Facts:
    """The versions of this rank, by the names of :data:`_NAMES`."""
    nccl = "none"
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    own = code_version().rsplit(", torch", 1)[0].removeprefix("distmuon ")
    return {"python": platform.python_version(), "torch": torch.__version__, "nccl": nccl, "distmuon": own}


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A failure where they differ; a warning if it is Python's third number alone."""
    problems = []
    for key, name in _NAMES.items():
        groups = by_value({rank: str(fact.get(key)) for rank, fact in facts.items()})
        if len(groups) == 1:
            continue
        found = ", ".join(f"{value} on {places.text(ranks)}" for value, ranks in groups.items())
        minor = key == "python" and len({value.rsplit(".", 1)[0] for value in groups}) == 1
        todo = "install the same environment on all machines, or start from one that they share"
        problems.append(Problem(WARNING if minor else FAILURE, f"{name} differs: {found}", todo))
    first = next(iter(facts.values()))
    fine = ", ".join(f"{name} {first[key]}" for key, name in _NAMES.items() if first[key] != "none")
    return conclude("versions", fine, problems)
