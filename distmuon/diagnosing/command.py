"""The ``doctor`` command: one process, processes that it starts, or those that torchrun has started."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

# public names, which torch re-exports without saying so to type checkers
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from distmuon.calibrating.ranks import Ranks, RanksError, start
from distmuon.comm.group import default_group
from distmuon.diagnosing.arguments import Arguments, parse
from distmuon.diagnosing.findings import FAILURE, OK, Finding
from distmuon.diagnosing.meeting import UnmetError, meet
from distmuon.diagnosing.places import Here
from distmuon.diagnosing.post import Post, SilenceError
from distmuon.diagnosing.report import text, write
from distmuon.diagnosing.session import Report, alone, examine, look
from distmuon.usage import UsageError, in_launch

# Of processes that are started here: their start, and of times that ranks may wait for one another
_START_S, _WAITS = 120.0, 8.0
# In which others hear the verdict from a store that ends with rank 0
_FAREWELL_S = 5.0


def run_command(arguments: Sequence[str]) -> int:
    """Run ``doctor`` with a command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit code, the same on all ranks: 0 if there was no failure, 1 after one, 2 for bad usage.
    """
    try:
        given = parse(arguments)
        if in_launch():
            return _launched(given)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _tell(given, _start(given) if given.ranks > 1 else _one(given))


def leave(code: int) -> int:
    """The last thing that a process does: among others it ends here, as a thread of it may still wait for a rank."""
    if not in_launch():
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(given: Arguments, report: Report) -> int:
    """Print and write a report; returns the exit code."""
    code = report.code(strict=given.strict)
    print(text(report), flush=True)
    if given.json is None:
        return code
    try:
        write(report, given.json, code=code)
    except OSError as error:
        print(f"error: --json {given.json} cannot be written ({error.strerror}): name another file.", file=sys.stderr)
        return 1
    return code


def _one(given: Arguments) -> Report:
    here = Here(0, 1, 0, given.device, given.folder, given.timeout_s)
    report = examine(here, Post(HashStore(), 0, 1, given.timeout_s), _nothing)
    assert report is not None, "it is rank 0"
    return report


def _start(given: Arguments) -> Report:
    """Examine processes of this machine."""
    # as a launcher has it that is told nothing: torch's threads are shared
    told = "OMP_NUM_THREADS" in os.environ
    threads = torch.get_num_threads() if told else max(1, torch.get_num_threads() // given.ranks)
    limit = _START_S + _WAITS * given.timeout_s
    try:
        results: list[Report | None] = start(
            given.ranks, _serve, given, device=torch.device(given.device), threads=threads, timeout_s=limit
        )
    except RanksError as error:
        here = Here(0, given.ranks, 0, given.device, given.folder, given.timeout_s)
        report = alone(here, look(here))
        todo = "look at the interfaces above, and at what the process has said"
        report.findings.append(Finding("meeting", FAILURE, f"the processes cannot work together: {error}", todo))
        return report
    assert results[0] is not None, "rank 0 has it"
    return results[0]


def _serve(ranks: Ranks, given: Arguments) -> Report | None:
    here = Here(ranks.rank, ranks.size, ranks.rank, given.device, given.folder, given.timeout_s)
    store = PrefixStore("doctor", default_group().get_group_store())
    return examine(here, Post(store, here.rank, here.size, given.timeout_s), _nothing)


def _nothing(device: torch.device) -> None:
    """They are connected."""


def _launched(given: Arguments) -> int:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    here = Here(rank, size, local, given.device, given.folder, given.timeout_s, launched=True)
    try:
        store = meet(here)
    except UnmetError as unmet:
        return _tell_unmet(here, unmet.finding)
    post = Post(store, rank, size, given.timeout_s)

    def connect(device: torch.device) -> None:
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        # own time-outs come first
        timeout = timedelta(seconds=3 * given.timeout_s)
        # a connection of its own: one that waits for a rank that stalls must not hold up the messages
        own = PrefixStore("group", store.clone())  # type: ignore[attr-defined]  # torch's stubs leave it out
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)

    try:
        report = examine(here, post, connect)
        code = int(post.decide("verdict", lambda: 0 if report is None else _tell(given, report)))
        _farewell(here, post)
    except SilenceError as silence:
        print(f"error: {silence}", file=sys.stderr)
        return 1
    return code


def _farewell(here: Here, post: Post) -> None:
    """Rank 0 may hold the store, so it goes last."""
    with contextlib.suppress(RuntimeError):
        post.send("farewell", None)
        if here.rank == 0:
            post.collect("farewell", timeout_s=_FAREWELL_S)


def _tell_unmet(here: Here, finding: Finding) -> int:
    """This rank cannot get to the others, so it says itself what it sees."""
    report = alone(here, look(here))
    report.findings.append(finding)
    report.findings = [finding for finding in report.findings if finding.status != OK]
    print(f"rank {here.rank} could not get to the others\n{text(report)}", file=sys.stderr, flush=True)
    return 1
