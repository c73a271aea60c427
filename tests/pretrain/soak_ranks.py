"""Ranks of a training run from a fork server: a start takes well under a second, as all is imported already."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from fault_runs import Fault

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]


class Ended(NamedTuple):
    """How a rank ended.

    Attributes:
        code: Its exit code, negative for a signal.
        out: What it wrote to standard output.
        err: What it wrote to standard error.
    """

    code: int
    out: str
    err: str


def attempt(
    arguments: Sequence[str],
    world: int,
    folder: Path,
    faults: Sequence[Fault] = (),
    *,
    timeout: float = 90.0,
    wakes: int | None = None,
    gone: int | None = None,
) -> list[Ended]:
    """Run the pretrain command on ranks of their own, as a launcher would, and wait until all have ended.

    Args:
        arguments: Of the command.
        world: Number of ranks.
        folder: Where they write what they print.
        faults: What happens to them.
        timeout: Seconds after which all are killed.
        wakes: A rank that the faults stop, which goes on when the others have ended.
        gone: A rank that the faults stop, which is killed when the others have ended.

    Raises:
        AssertionError: If they did not end in time, with what they printed and their stacks.
    """
    # the launcher keeps the store, as torchrun's does
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    folder.mkdir(parents=True, exist_ok=True)
    context = _context()
    processes = [
        context.Process(target=_rank, args=(rank, world, store.port, list(arguments), folder, list(faults)))
        for rank in range(world)
    ]
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        others = [process for rank, process in enumerate(processes) if rank not in (wakes, gone)]
        _await(others, deadline)
        if wakes is not None and processes[wakes].exitcode is None:
            os.kill(processes[wakes].pid or 0, signal.SIGCONT)
        if gone is not None:
            _kill(processes[gone])
        _await(processes, deadline)
        late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        for rank in late:
            os.kill(processes[rank].pid or 0, signal.SIGUSR2)
        time.sleep(1.0 if late else 0.0)
    finally:
        for process in processes:
            _kill(process)
    ended = [
        Ended(process.exitcode or 0, _text(folder / f"out-{rank}"), _text(folder / f"err-{rank}"))
        for rank, process in enumerate(processes)
    ]
    if late:
        raise AssertionError(f"ranks {late} had not ended after {timeout:g} s\n" + told(ended))
    return ended


def told(ended: Sequence[Ended]) -> str:
    """All that ranks printed, for an error."""
    return "\n".join(f"--- rank {r}: {e.code} ---\n{e.out[-3000:]}\n{e.err[-6000:]}" for r, e in enumerate(ended))


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_runs", "transformers.models.llama.modeling_llama"])
    # the server finds modules by its environment alone
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    paths = [str(_HERE), str(_ROOT), *(before["PYTHONPATH"] or "").split(os.pathsep)]
    os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, paths)), OMP_NUM_THREADS="1")
    try:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return context


def _rank(rank: int, world: int, port: int, arguments: list[str], folder: Path, faults: list[Fault]) -> None:
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in names.items()})
    from fault_runs import playing

    from distmuon.pretrain.command import run_command

    with playing(faults):
        code = run_command(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # as the command's own last line does, which keeps one process alive
    os._exit(code)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _await(processes: Sequence[Any], deadline: float) -> None:
    running = [process for process in processes if process.exitcode is None]
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running], max(0.0, min(1.0, deadline - time.monotonic())))
        running = [process for process in running if process.exitcode is None]


def _kill(process: Any) -> None:
    """A rank and what it started."""
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # empty, or the rank has not made it yet
    process.kill()
    process.join()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
