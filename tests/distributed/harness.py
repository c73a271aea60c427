"""Ranks for tests: processes with a gloo group, where a failure or a hang on any rank becomes a readable test error.

`run_ranks` starts fresh processes for one call, `rank_errors` does so for a call that must fail on every rank, and
`Pool` keeps the processes and their group between calls (milliseconds per call, for property tests). What runs must be
a module-level function; it, its arguments and its results are pickled.
"""

# torch is imported in the ranks, after their environment is set and the watch over their parent has begun
from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

START_TIMEOUT = 120.0
"""Seconds in which processes import torch and form their group; not part of the time-out of a call."""

GRACE = 3.0
"""Seconds in which the other ranks may finish or fail once one rank has failed."""

# Longer than any call, so that a hang ends here with stacks and not on some ranks with an error of gloo
_GROUP_TIMEOUT = timedelta(minutes=10)


class RankError(AssertionError):
    """A call that failed.

    Attributes:
        errors: `Type: message` of each rank that raised, `exit code N` of each rank that died.
        tracebacks: the traceback of each rank that raised, `exit code N` of each rank that died.
        stacks: the Python stacks of each rank that had not finished, as they were just before it was killed.
        timed_out: whether ranks had not finished within the time-out.
    """

    def __init__(
        self, headline: str, errors: dict[int, str], tracebacks: dict[int, str], stacks: dict[int, str], timed_out: bool
    ) -> None:
        self.errors, self.tracebacks, self.stacks, self.timed_out = errors, tracebacks, stacks, timed_out
        parts = [headline]
        parts += [f"--- rank {rank} failed ---\n{text.rstrip()}" for rank, text in sorted(tracebacks.items())]
        parts += [f"--- rank {rank} was still running ---\n{text.rstrip()}" for rank, text in sorted(stacks.items())]
        super().__init__("\n".join(parts))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Runs `function(*args)` on `world_size` fresh ranks.

    Args:
        function: a module-level function.
        world_size: the number of processes.
        *args: picklable arguments, the same for every rank.
        timeout: seconds from the moment when the group stands; `START_TIMEOUT` comes before.

    Returns:
        The results in rank order.

    Raises:
        RankError: a rank raised, died, or did not finish in time.
    """
    __tracebackhide__ = True
    with Pool(world_size) as pool:
        return pool.run(function, *args, timeout=timeout)


def rank_errors(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> dict[int, str]:
    """Runs a function that must fail on every rank.

    Args:
        function: a module-level function.
        world_size: the number of processes.
        *args: picklable arguments, the same for every rank.
        timeout: seconds in which every rank must have failed.

    Returns:
        For each rank `Type: message` of what it raised, or `exit code N` if it died.

    Raises:
        RankError: a rank did not finish in time.
        AssertionError: a rank returned.
    """
    __tracebackhide__ = True
    with Pool(world_size) as pool:
        replies = pool._call(function, args, timeout, grace=None)
    returned = {rank: reply.value for rank, reply in enumerate(replies) if reply.error is None}
    errors = {rank: reply.error for rank, reply in enumerate(replies) if reply.error is not None}
    if returned:
        raise AssertionError(f"{_name(function)} must fail on every rank: returned {returned}, failed {errors}")
    return errors


class Pool:
    """Ranks that stay alive between calls, as a context manager.

    The processes start at the first call. A call that fails ends them, since a gloo group is of no use after a failed
    collective; the next call starts new ones. Every call begins with `torch.manual_seed(0)`. Other global state of a
    rank lives on: groups and meshes that functions make should be kept by the function's module, not made per call.

        @pytest.fixture(scope="module")
        def pool():
            with Pool(2) as pool:
                yield pool

    Args:
        world_size: the number of processes.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder = Path()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Runs `function(*args)` on every rank.

        Args:
            function: a module-level function.
            *args: picklable arguments, the same for every rank.
            timeout: seconds in which every rank must return.

        Returns:
            The results in rank order.

        Raises:
            RankError: a rank raised, died, or did not finish in time.
        """
        __tracebackhide__ = True
        replies = self._call(function, args, timeout, GRACE)
        if any(reply.error is not None for reply in replies):
            raise _error(f"{_name(function)} failed on {self.world_size} ranks", dict(enumerate(replies)))
        return [reply.value for reply in replies]

    def close(self) -> None:
        """Lets idle ranks leave their group and exit, then kills what is left, the children of ranks too."""
        try:
            for connection in self._connections:
                try:
                    connection.send_bytes(b"")
                except OSError:
                    pass
            deadline = time.monotonic() + GRACE
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            self._kill()

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float, grace: float | None
    ) -> list[_Reply]:
        __tracebackhide__ = True
        request = pickle.dumps((function, args))
        try:
            if not self._processes:
                self._start()
            for connection in self._connections:
                try:
                    connection.send_bytes(request)
                except OSError:
                    pass  # a rank that died in between: _collect finds its exit code
            replies = self._collect(_name(function), timeout, grace)
        except BaseException:
            # An interrupt too: nothing may be left running
            self._kill()
            raise
        if any(reply.error is not None for reply in replies):
            self._kill()
        return replies

    def _start(self) -> None:
        __tracebackhide__ = True
        atexit.register(self._kill)
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            self._connections.append(ours)
            arguments = (rank, self.world_size, port, self._folder, theirs)
            self._processes.append(context.Process(target=_serve, args=arguments, name=f"rank {rank}"))
            self._processes[-1].start()
            theirs.close()
        replies = self._collect("the start of the group", START_TIMEOUT, GRACE)
        if any(reply.error is not None for reply in replies):
            raise _error(f"the group of {self.world_size} ranks did not start", dict(enumerate(replies)))

    def _collect(self, what: str, timeout: float, grace: float | None) -> list[_Reply]:
        """One reply of each rank; at the time-out, or `grace` seconds after a failure, an error that has the stacks."""
        __tracebackhide__ = True
        deadline, limit, timed_out = time.monotonic() + timeout, f"within {timeout:g} s", True
        replies: dict[int, _Reply] = {}
        while len(replies) < self.world_size and (remaining := deadline - time.monotonic()) > 0:
            waiting = {rank: c for rank, c in enumerate(self._connections) if rank not in replies}
            ready = wait(list(waiting.values()), min(remaining, 0.2))
            for rank, connection in waiting.items():
                if connection in ready:
                    replies[rank] = self._receive(rank)
                elif self._processes[rank].exitcode is not None and not connection.poll():
                    # A forked child of the rank holds the other end open
                    replies[rank] = self._exited(rank)
            if grace is not None and timed_out and any(reply.error is not None for reply in replies.values()):
                deadline, limit, timed_out = time.monotonic() + grace, f"{grace:g} s after another rank failed", False
        if len(replies) == self.world_size:
            return [replies[rank] for rank in range(self.world_size)]
        stacks = self._stacks([rank for rank in range(self.world_size) if rank not in replies])
        running = ", ".join(str(rank) for rank in stacks)
        headline = f"{what}: of {self.world_size} ranks, {running} had not finished {limit}"
        raise _error(headline, replies, stacks, timed_out)

    def _receive(self, rank: int) -> _Reply:
        try:
            return _Reply(*pickle.loads(self._connections[rank].recv_bytes()))
        except (EOFError, ConnectionError):
            return self._exited(rank)

    def _exited(self, rank: int) -> _Reply:
        self._processes[rank].join(GRACE)
        text = f"exit code {self._processes[rank].exitcode}"
        return _Reply(None, text, text)

    def _stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """What faulthandler writes in each rank on SIGUSR1."""
        for rank in ranks:
            if self._processes[rank].exitcode is None:
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        texts = dict.fromkeys(ranks, "")
        for _ in range(50):
            time.sleep(0.1)
            before = texts
            texts = {rank: _read_stacks(_stack_file(self._folder, rank)) for rank in ranks}
            if texts == before and all(texts.values()):
                break
        return {rank: text or "(no stack: the process did not answer the signal)" for rank, text in texts.items()}

    def _kill(self) -> None:
        """Kills every rank and its process group, and forgets them."""
        atexit.unregister(self._kill)
        processes, self._processes = self._processes, []
        connections, self._connections = self._connections, []
        for process in processes:
            if process.pid is not None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass  # no group: empty, or the rank has not made it yet
                process.kill()
        for process in processes:
            if process.pid is not None:
                process.join()
        for connection in connections:
            connection.close()
        if processes:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Reply(NamedTuple):
    """What one rank answered: a value, or the summary and the traceback of its failure."""

    value: Any
    error: str | None
    traceback: str


def _error(
    headline: str, replies: dict[int, _Reply], stacks: dict[int, str] | None = None, timed_out: bool = False
) -> RankError:
    errors = {rank: reply.error for rank, reply in replies.items() if reply.error is not None}
    tracebacks = {rank: replies[rank].traceback for rank in errors}
    return RankError(headline, errors, tracebacks, stacks or {}, timed_out)


class Pools:
    """Pools of several sizes, each made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[int, Pool] = {}

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """The result of `function` on each of `world_size` ranks."""
        __tracebackhide__ = True
        if world_size not in self._made:
            self._made[world_size] = Pool(world_size)
        return self._made[world_size].run(_with_keywords, function, args, kwargs)

    def close(self) -> None:
        """Ends all ranks."""
        for pool in self._made.values():
            pool.close()


def _with_keywords(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _serve(rank: int, world_size: int, port: int, folder: Path, connection: Connection) -> None:
    """The life of one rank: form the group, then answer calls until an empty request."""
    os.setsid()
    threading.Thread(target=_die_with_parent, args=(folder,), daemon=True).start()
    stack_file = _stack_file(folder, rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    connection.send_bytes(_answer(_form_group, (rank, world_size, folder)))
    while request := connection.recv_bytes():
        connection.send_bytes(_answer(_seeded_call, (request,)))
    import torch.distributed as dist

    dist.destroy_process_group()


def _form_group(rank: int, world_size: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # A file of this pool's own: a port could be taken by another pool between its choice and its use
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_GROUP_TIMEOUT)


def _seeded_call(request: bytes) -> Any:
    import torch

    function, args = pickle.loads(request)
    torch.manual_seed(0)
    return function(*args)


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The pickled fields of a `_Reply`; plain pickle copies tensors, so that they outlive the rank."""
    try:
        return pickle.dumps((function(*args), None, ""))
    except BaseException as error:
        # The first frame is this one
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, frames))
        return pickle.dumps((None, f"{type(error).__name__}: {error}", text))


def _die_with_parent(folder: Path) -> None:
    """A parent that was killed cannot clean up, so the ranks watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}.txt"


def _read_stacks(path: Path) -> str:
    """What faulthandler wrote, without the frames of this file and what called them."""
    text = path.read_text() if path.exists() else ""
    threads = [thread.splitlines() for thread in text.split("\n\n") if _die_with_parent.__name__ not in thread]
    own = f'"{__file__}"'
    return "\n".join(line for lines in threads for line in takewhile(lambda line: own not in line, lines))


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", function))
