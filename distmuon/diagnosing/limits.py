"""May a process open a connection to every rank, and lock memory for RDMA?"""

from __future__ import annotations

import pathlib
import resource
from collections.abc import Mapping

from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, by_value, conclude
from distmuon.diagnosing.places import Here, Places

_ADAPTERS = pathlib.Path("/sys/class/infiniband")
# Files of a process by itself, and groups that connect it to each other rank
_FILES, _GROUPS = 256, 8


def look(here: Here) -> Facts:
    """Limits of this process (-1: none), and its machine's adapters for RDMA."""
    files, locked = (resource.getrlimit(what)[0] for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    adapters = sorted(path.name for path in _ADAPTERS.iterdir()) if _ADAPTERS.is_dir() else []
    none = resource.RLIM_INFINITY
    return {
        "files": -1 if files == none else files,
        "locked": -1 if locked == none else locked,
        "adapters": adapters,
        "needed": _FILES + _GROUPS * here.size,
    }


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A failure where files are too few for connections; a warning where RDMA may lock too little."""
    problems = []
    for (files, needed), ranks in by_value({rank: (f["files"], f["needed"]) for rank, f in facts.items()}).items():
        if 0 <= files < needed:
            found = f"{places.text(ranks)} may open {files} files, and about {needed} are needed with so many ranks"
            problems.append(Problem(FAILURE, found, "ulimit -n 65536 before the start, or LimitNOFILE of its service"))
    for locked, ranks in by_value({r: f["locked"] for r, f in facts.items() if f["adapters"]}).items():
        if locked >= 0:
            found = f"{places.text(ranks)} may lock {locked >> 10} KiB of memory, and RDMA locks its buffers"
            problems.append(Problem(WARNING, found, "ulimit -l unlimited, or memlock in /etc/security/limits.conf"))
    files = min((fact["files"] for fact in facts.values() if fact["files"] >= 0), default=None)
    adapters = sorted({name for fact in facts.values() for name in fact["adapters"]})
    fine = "no limit of open files" if files is None else f"{files} open files"
    return conclude("limits", f"{fine}; RDMA: {', '.join(adapters) if adapters else 'no adapter'}", problems)
