"""Is there room for temporary files, and in the caches that the environment names?"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping

from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, by_value, conclude, size_text
from distmuon.diagnosing.places import Here, Places

_CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
# Compilers write some hundred MiB; a tokenizer and a data set of text some GiB
_FEWEST, _ENOUGH = 64 << 20, {"temporary files": 1 << 30}
_ENOUGH_CACHE = 10 << 30


def look(here: Here) -> Facts:
    """``disks``: of each purpose, ``path``, ``free`` bytes, and ``error`` where nothing can be written."""
    disks = {"temporary files": _disk(pathlib.Path(tempfile.gettempdir()))}
    disks |= {name: _disk(pathlib.Path(os.environ[name])) for name in _CACHES if os.environ.get(name)}
    return {"disks": disks}


def _disk(path: pathlib.Path) -> Facts:
    there = path
    # what is not there yet is made when it is needed
    while not there.exists() and there != there.parent:
        there = there.parent
    facts: Facts = {"path": str(path), "free": shutil.disk_usage(there).free}
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        facts["error"] = error.strerror
    return facts


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A failure where nothing can be written or almost nothing is free; a warning where little is."""
    problems, told = [], []
    for purpose in dict.fromkeys(name for fact in facts.values() for name in fact["disks"]):
        own = {rank: fact["disks"][purpose] for rank, fact in facts.items() if purpose in fact["disks"]}
        variable = "TMPDIR" if purpose not in _CACHES else purpose
        todo = f"free some space, or name another disk with {variable}"
        for (error, path), ranks in by_value({r: (d.get("error"), d["path"]) for r, d in own.items()}).items():
            if error is not None:
                found = f"{purpose}: {path} cannot be written on {places.text(ranks)} ({error})"
                problems.append(Problem(FAILURE, found, f"name another folder with {variable}"))
        enough = _ENOUGH.get(purpose, _ENOUGH_CACHE)
        few = {rank: disk["free"] for rank, disk in own.items() if disk["free"] < enough}
        if few:
            found = f"{purpose}: {size_text(min(few.values()))} are free on {places.text(few)}"
            problems.append(Problem(FAILURE if min(few.values()) <= _FEWEST else WARNING, found, todo))
        paths = ", ".join(by_value({rank: disk["path"] for rank, disk in own.items()}))
        told.append(f"{purpose} ({paths}): {size_text(min(disk['free'] for disk in own.values()))} free")
    return conclude("disks", "; ".join(told), problems)
