"""The operating system's locks on files: a process that ended holds none."""

from __future__ import annotations

import os
from typing import IO

if os.name == "posix":
    import fcntl


def lock(stream: IO[str]) -> None:
    """Take the lock on an open file without waiting; where the system has no such locks, do nothing.

    Raises:
        BlockingIOError: If another process has it.
        OSError: If the file system has no locks.
    """
    if os.name == "posix":
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
