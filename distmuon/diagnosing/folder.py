"""Is the checkpoint folder one that all ranks share, can write to, and can lock?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import IO

from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, by_value, conclude, size_text
from distmuon.diagnosing.job import Job
from distmuon.diagnosing.names import reason
from distmuon.diagnosing.places import Here, Places
from distmuon.diagnosing.within import within

_PREFIX = ".distmuon-doctor-"
# What the first rank of a machine writes, and what others do
_WRITTEN, _WRITTEN_BESIDE = 32 << 20, 1 << 20
# A file system may show a new file to other machines some seconds later
_SEEN_S = 5.0
_FEWEST, _ENOUGH = 1 << 30, 10 << 30
# A checkpoint of 1 billion parameters, about 8 GB, takes over two minutes at less
_SLOW = 50e6


@contextlib.contextmanager
def token(here: Here) -> Iterator[str | None]:
    """On rank 0 a locked file in the folder, whose name all ranks are given; None where it cannot be written."""
    if here.rank != 0 or here.folder is None:
        yield None
        return
    path = here.folder / f"{_PREFIX}{uuid.uuid4().hex}"
    stream = None
    # where it does not work, or not in time, the measurement will say why
    with contextlib.suppress(OSError):
        stream = within(here.timeout_s, lambda: _locked(path))
    try:
        yield None if stream is None else path.name
    finally:
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
            within(here.timeout_s, lambda: path.unlink(missing_ok=True))


def _locked(path: pathlib.Path) -> IO[str]:
    """A new file that holds its name, with this process's lock on it as far as there are locks."""
    stream = path.open("w")
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream.write(path.name)
        stream.flush()
        os.fsync(stream.fileno())
    except OSError:
        stream.close()
        raise
    return stream


def measure(job: Job) -> Facts:
    """What this rank can do in the folder.

    Returns:
        ``path``; ``error`` of a write, with ``missing`` if it is not there; else ``free`` bytes, ``rate`` (bytes a
        second, with fsync), ``shared`` (whether rank 0's file is seen, None if it wrote none), ``locks`` (whether its
        lock holds here, None if it is not seen) and ``lock_error``.
    """
    folder = job.here.folder
    assert folder is not None, "the check is left out without"
    facts: Facts = {"path": str(folder), "missing": not folder.is_dir()}
    leads = any(node[0] == job.here.rank for node in job.places.nodes)
    try:
        facts["rate"] = _write(folder, job.here.rank, _WRITTEN if leads else _WRITTEN_BESIDE)
        facts["free"] = shutil.disk_usage(folder).free
    except OSError as error:
        facts["failed"] = reason(error)
    if job.given is None or facts["missing"]:
        return {**facts, "shared": None, "locks": None}
    return {**facts, **_seen(folder / job.given)}


def _write(folder: pathlib.Path, rank: int, nbytes: int) -> float:
    """Write a file with fsync, rename it as checkpoints are, and remove it; returns bytes a second."""
    path = folder / f"{_PREFIX}{uuid.uuid4().hex}-{rank}"
    final = path.with_suffix(".moved")
    block = os.urandom(1 << 20)
    try:
        start = time.perf_counter()
        with path.open("wb") as stream:
            for _ in range(nbytes // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        seconds = time.perf_counter() - start
        path.rename(final)
        _sync_folder(folder)
    finally:
        path.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
    return nbytes / seconds


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seen(path: pathlib.Path) -> Facts:
    deadline = time.monotonic() + _SEEN_S
    while True:
        try:
            stream = path.open("r+")
            break
        except OSError:
            if time.monotonic() > deadline:
                return {"shared": False, "locks": None}
            time.sleep(0.1)
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return {"shared": True, "locks": True}
        except OSError as error:
            return {"shared": True, "locks": False, "lock_error": reason(error)}
        return {"shared": True, "locks": False}


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A failure where the folder is missing, not writable, not shared or full; a warning without locks, or if slow."""
    problems = [*_unusable(facts, places), *_unshared(facts, places), *_small(facts, places)]
    told = ", ".join(by_value({rank: fact["path"] for rank, fact in facts.items()}))
    shared = ", shared by all ranks" * (len(facts) > 1)
    rates = [fact["rate"] for rank, fact in facts.items() if "rate" in fact and _leads(rank, places)]
    free = [fact["free"] for fact in facts.values() if "free" in fact]
    speed = f"{min(rates) / 1e6:.0f} MB/s" if rates else "no speed"
    fine = f"{told}: {speed} with fsync{shared}, locks hold, {size_text(min(free, default=0))} free"
    return conclude("folder", fine, problems)


def _leads(rank: int, places: Places) -> bool:
    return any(node[0] == rank for node in places.nodes)


def _unusable(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    failed = {rank: (f["path"], f["failed"], f["missing"]) for rank, f in facts.items() if "failed" in f}
    for (path, error, missing), ranks in by_value(failed).items():
        if missing:
            todo = f"mkdir -p {path}, or mount it there"
            yield Problem(FAILURE, f"{path} is no folder on {places.text(ranks)}", todo)
        else:
            todo = "look at its owner, mode and mount (ls -ld, findmnt -T), or name another folder"
            yield Problem(FAILURE, f"{path} cannot be written on {places.text(ranks)} ({error})", todo)


def _unshared(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    apart = {r: f["path"] for r, f in facts.items() if f["shared"] is False}
    for path, ranks in by_value(apart).items():
        found = f"{path} on {places.text(ranks)} is not the folder of rank 0: its file there was not seen"
        yield Problem(FAILURE, found, "name a folder of a file system that all machines mount")
    loose = {r: f.get("lock_error", "two have it at once") for r, f in facts.items() if f["locks"] is False}
    for error, ranks in by_value(loose).items():
        found = f"file locks do not hold on {places.text(ranks)} ({error})"
        todo = "take care that no two runs write into one folder, or mount it with locks (NFS: local_lock=none)"
        yield Problem(WARNING, found, todo)


def _small(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    free = {rank: fact["free"] for rank, fact in facts.items() if fact.get("free", _ENOUGH) < _ENOUGH}
    if free:
        least = min(free.values())
        found = f"{size_text(least)} are free on {places.text(free)}"
        yield Problem(FAILURE if least < _FEWEST else WARNING, found, "free some space, or name another folder")
    rates = {r: f["rate"] for r, f in facts.items() if f.get("rate", _SLOW) < _SLOW and _leads(r, places)}
    if rates:
        found = f"{places.text(rates)} write {min(rates.values()) / 1e6:.1f} MB/s at least"
        yield Problem(WARNING, found, "take a faster file system, or save less often and asynchronously")
