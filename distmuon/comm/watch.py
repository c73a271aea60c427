"""Exchanges that the host does not wait for, as with NCCL: a thread looks whether they end."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

from distmuon.comm.group import timeout_of
from distmuon.comm.waiting import Wait, drop, forget, is_up, remember, tell

logger = logging.getLogger("distmuon")

# Part of a group's time-out after which an exchange is told of: then the group's own watchdog ends the process
_TOLD_AFTER = 0.9
# Looks of the thread in that time
_LOOKS = 20


class Watch:
    """Tells, once, of exchanges that do not end: which, and which ranks wait for the same.

    Args:
        seconds: After which an exchange is told of.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pending: list[Wait] = []
        self._told = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        # without it nobody would find out whether they came
        weakref.finalize(self, drop, self._pending).atexit = False

    def add(self, wait: Wait) -> None:
        """Look after an exchange that has been started; costs a query of those before it, and waits for nothing.

        Args:
            wait: With its ``work``.
        """
        remember(wait)
        with self._lock:
            self._forget_ended()
            self._pending.append(wait)
        if self._thread is None:
            looking = (weakref.ref(self), self._seconds / _LOOKS)
            self._thread = threading.Thread(target=_look_again, args=looking, name="distmuon watch", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Forget what has ended, and tell of what takes too long."""
        with self._lock:
            self._forget_ended()
            late = self._pending[0] if self._pending else None
            if late is None or self._told or late.seconds <= self._seconds:
                return
            self._told = True
        if is_up(late.group):
            logger.error("%s", tell(late, patience=self._seconds / _LOOKS))

    def _forget_ended(self) -> None:
        while self._pending and self._pending[0].came:
            forget(self._pending.pop(0))
            self._told = False


def watch_of(group: dist.ProcessGroup, device: torch.device) -> Watch | None:
    """A watch over exchanges of a group; None for gloo, where the host waits itself and is told by an error."""
    if device.type == "cpu" or dist.get_backend(group) == "gloo":
        return None
    # the other value is torch's own for NCCL
    return Watch(_TOLD_AFTER * (timeout_of(group) or timedelta(minutes=10)).total_seconds())


def _look_again(watched: weakref.ref[Watch], pause: float) -> None:
    while True:
        time.sleep(pause)
        watch = watched()
        if watch is None:
            return
        watch.look()
        del watch
