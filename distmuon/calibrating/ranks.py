"""The processes that measure together: those that torchrun started, or some that are started here for the purpose."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# A rank that is gone is noticed after this
_COLLECTIVE_S = 90.0
# Between the death of one process and the verdict that the others have nothing to add
_GRACE_S = 2.0


class RanksError(RuntimeError):
    """Processes that could not meet or finish, told in half a sentence."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that measure together.

    Attributes:
        rank: Which it is.
        nodes: The ranks of each machine, ascending.
        device: What it measures.
    """

    rank: int
    nodes: tuple[tuple[int, ...], ...]
    device: torch.device

    @property
    def size(self) -> int:
        """How many there are."""
        return sum(map(len, self.nodes))

    def agree(self, number: float) -> float:
        """The largest of all ranks' numbers, as soon as every rank is here."""
        if self.size == 1:
            return number
        box = torch.tensor([number], dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return float(box.item())

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def alone(device: torch.device) -> Ranks:
    """This process without a group."""
    return Ranks(0, ((0,),), device)


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, for the while of a ``with`` block.

    Args:
        device: What each measures; of accelerators those of one machine take one each.

    Raises:
        RanksError: if they cannot meet.
    """
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    try:
        _join(device)
    except (ValueError, RuntimeError) as error:
        raise RanksError(f"the processes cannot meet ({_one_line(error)})") from error
    try:
        # torchrun numbers the machines; others at least name them
        here = os.environ.get("GROUP_RANK") or socket.gethostname()
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, here)
        yield Ranks(dist.get_rank(), nodes_of(places), device)
    finally:
        dist.destroy_process_group()


def nodes_of(places: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The ranks of each machine, from the machine of each rank."""
    found: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        found.setdefault(place, []).append(rank)
    return tuple(map(tuple, found.values()))


def start(
    count: int, function: Callable[..., Any], *args: Any, device: torch.device, threads: int, timeout_s: float
) -> list[Any]:
    """Call ``function(ranks, *args)`` on new processes of this machine that share a group.

    None of them outlives this call, or this process.

    Args:
        count: Processes.
        function: Of a module; it, its arguments and its result are pickled.
        *args: The same for all.
        device: What each measures; of accelerators each process takes the one of its number.
        threads: Of each process.
        timeout_s: Seconds until all must have finished, with their start.

    Returns:
        The results by rank.

    Raises:
        RanksError: if a process fails, dies, or takes too long.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="distmuon-", ignore_cleanup_errors=True) as folder:
        processes, connections = [], []
        try:
            for rank in range(count):
                ours, theirs = context.Pipe(duplex=False)
                connections.append(ours)
                job = (rank, count, folder, device, threads, theirs, function, args)
                processes.append(context.Process(target=_serve, args=job, daemon=True))
                processes[-1].start()
                theirs.close()
            return _collect(connections, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for connection in connections:
                connection.close()


def _collect(connections: Sequence[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(connections):
        waiting = {c: rank for rank, c in enumerate(connections) if rank not in results and rank not in failures}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            if failures:
                break
            late = ", ".join(str(rank) for rank in sorted(waiting.values()))
            raise RanksError(f"of {len(connections)} processes, {late} had not finished after {timeout_s:g} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                result, failure = connection.recv()
            except EOFError:
                result, failure = None, "it ended without a word"
            if failure is None:
                results[rank] = result
            else:
                failures[rank] = failure
                # the others miss it and fail too, later and less to the point
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        rank, failure = next(iter(failures.items()))
        raise RanksError(f"process {rank} of {len(connections)}: {failure}")
    return [results[rank] for rank in range(len(connections))]


def _serve(
    rank: int,
    count: int,
    folder: str,
    device: torch.device,
    threads: int,
    connection: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of a started process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(threads)
        if device.type != "cpu":
            device = torch.device(device.type, rank)
        # a file of their own: a port could be taken by others between its choice and its use
        meeting = (pathlib.Path(folder) / "store").as_uri()
        _join(device, init_method=meeting, rank=rank, world_size=count)
        connection.send((function(Ranks(rank, (tuple(range(count)),), device), *args), None))
        dist.destroy_process_group()
    except Exception as error:
        connection.send((None, f"{type(error).__name__}: {_one_line(error)}"))


def _join(device: torch.device, **meeting: Any) -> None:
    """Make the default group, whose numbers on the host go through gloo."""
    backend = "gloo"
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backend, timeout=timedelta(seconds=_COLLECTIVE_S), **meeting)


def _end_with_parent() -> None:
    """A parent that was killed ends nobody, so its children watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
