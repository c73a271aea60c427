"""Signals that end the process at once: before the first step, and a second Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from distmuon.pretrain.interrupt import REPEAT_S, SIGNALS, InterruptGuard
from distmuon.pretrain.processes import rank, world_size


class EndsAtOnce:
    """Watches for signals inside a ``with`` block that leave nothing to wait for.

    Python calls handlers between two of its instructions, and a process that waits for other ranks inside of a
    collective gets to no next one. So a thread reads signals from the pipe that Python writes them to at once. What
    an `InterruptGuard` notes is left to it, but for a second Ctrl-C. Outside the main thread, where Python allows no
    handlers, this does nothing.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._first: float | None = None
        self._ending = False

    def __enter__(self) -> EndsAtOnce:
        if threading.current_thread() is not threading.main_thread():
            return self
        InterruptGuard.stage = "before"
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in SIGNALS:
            # only signals with a handler of Python are written to the pipe
            self._previous[signum] = signal.signal(signum, _nothing)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        _watching.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._previous:
            return
        _watching.remove(self)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def ignore(self) -> None:
        """From here on signals change nothing: the process says its last words and ends."""
        self._ending = True

    def _watch(self) -> None:
        while received := self._reader.recv(64):
            for signum in received:
                if signum in SIGNALS and not self._ending:
                    self._act(signum)

    def _act(self, signum: int) -> None:
        stage, now = InterruptGuard.stage, time.monotonic()
        if stage == "before":
            _end(signum, "before the first step; nothing new is saved")
        if signum == signal.SIGINT and stage == "after":
            _end(signum, "after the last step; go on with --resume auto to finish")
        if self._first is None:
            self._first = now
        elif signum == signal.SIGINT and now - self._first > REPEAT_S:
            _end(signum, "a second time, in the middle of a step; nothing new is saved")


_watching: list[EndsAtOnce] = []


def _end(signum: int, when: str) -> None:
    who = f"rank {rank()}: " if world_size() > 1 else ""
    # not by sys.stderr, whose lock the main thread may hold
    os.write(2, f"{who}stopped by {signal.Signals(signum).name} {when}\n".encode())
    os._exit(128 + signum)


def _nothing(signum: int, frame: FrameType | None) -> None:
    pass


def _leave_pipe() -> None:
    """A forked child has the pipe of its parent, which is not to hear of the child's signals."""
    if _watching:
        signal.set_wakeup_fd(-1)
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        _watching.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_pipe)
