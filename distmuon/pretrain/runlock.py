"""One run at a time in a folder: two would write over each other's checkpoints and metrics."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import socket
import time
from typing import IO

from distmuon.pretrain.errors import UserError
from distmuon.pretrain.locks import lock

logger = logging.getLogger(__name__)

FILE = ".lock"
# a process that is being killed may need a moment
_PATIENCE_SECONDS = 5.0


class RunLock:
    """The operating system's lock on a run folder, a context manager; a process that ended holds none.

    Where a folder cannot be locked, it is not.
    """

    def __init__(self) -> None:
        self._stream: IO[str] | None = None

    def take(self, folder: pathlib.Path) -> None:
        """Lock a run folder until the end of the context.

        A lock from another machine is a warning: after the machine was lost a file system may keep it for a while.

        Raises:
            UserError: If another process of this machine has it.
        """
        try:
            stream = (folder / FILE).open("a+", encoding="utf-8")
        except OSError:
            return  # what is written here next will say so
        if not _lock(stream):
            stream.seek(0)
            host, _, process = stream.read().strip().partition(" ")
            stream.close()
            if host == socket.gethostname():
                raise UserError(
                    f"process {process} of this machine is training in {folder}: stop it first, or give this run "
                    "another log.name."
                )
            logger.warning(
                "%s is locked by process %s of %s: if that one still runs, stop one of the two, as they write over "
                "each other",
                folder,
                process,
                host,
            )
            return
        # a disk that refuses this will say so when more is written
        with contextlib.suppress(OSError):
            stream.truncate(0)
            stream.write(f"{socket.gethostname()} {os.getpid()}\n")
            stream.flush()
        self._stream = stream

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _lock(stream: IO[str]) -> bool:
    """Whether no other process has the lock, which this one has then; true where there are no locks."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            lock(stream)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        except OSError:
            break  # a file system without locks
        else:
            break
    return True
