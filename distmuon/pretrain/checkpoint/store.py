"""The folder of a run's checkpoints: which there are, which may go, and what takes the place of what."""

from __future__ import annotations

import contextlib
import pathlib
import shutil

from distmuon.pretrain.checkpoint.manifest import sync
from distmuon.pretrain.checkpoint.names import LOCK, is_final, lock_of, step_of, temporary_step
from distmuon.pretrain.checkpoint.verify import quick_problem
from distmuon.pretrain.locks import lock


def step_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """All ``step-N`` folders, whole or not, oldest step first; none if the folder is missing."""
    return sorted((path for path in _entries(folder) if is_final(path)), key=step_of)


def list_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a folder whose manifest and sizes are right, oldest step first; checksums are not compared."""
    return [path for path in step_folders(folder) if quick_problem(path) is None]


def newest_checkpoint(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest of `list_checkpoints`."""
    return next((path for path in reversed(step_folders(folder)) if quick_problem(path) is None), None)


def unfinished(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders that are being written, or were when a run was killed."""
    return [path for path in _entries(folder) if temporary_step(path) is not None]


def set_aside_newer(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """Rename the checkpoints past the one that a run resumes from, whole or not, so that ``auto`` cannot find them."""
    moved = []
    for path in step_folders(checkpoint.parent):
        if step_of(path) > step_of(checkpoint):
            aside = path.with_name(f"{path.name}.superseded")
            _remove(aside)
            moved.append(path.rename(aside))
    return moved


class Writing:
    """A temporary folder that is being written, locked against runs that clear up.

    The lock is the operating system's, so that a killed process holds none.

    Args:
        path: The folder; it is made.

    Raises:
        OSError: If it cannot be made.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_of(path).open("w")
        try:
            # a file system without locks is no reason not to save
            with contextlib.suppress(OSError):
                lock(self._lock)
            path.mkdir()
        except OSError:
            self.discard()
            raise

    def commit(self, final: pathlib.Path) -> None:
        """Give the folder its name, down to the disk; what has it already gives way.

        Raises:
            OSError: If the disk refuses it.
        """
        sync(self.path)
        if final.exists():
            aside = final.with_name(f"{final.name}.superseded")
            _remove(aside)
            final.rename(aside)
        self.path.rename(final)
        sync(final.parent)

    def discard(self) -> None:
        """Remove the folder if it is still there, and the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Remove the lock."""
        # a disk that refuses this has refused what matters, or done it
        with contextlib.suppress(OSError):
            lock_of(self.path).unlink(missing_ok=True)
        self._lock.close()


def clear_up(folder: pathlib.Path) -> None:
    """Remove what killed runs left behind; what another run is writing is locked, and stays."""
    for path in unfinished(folder):
        _remove_unlocked(path)
    for path in _entries(folder):
        if path.name.endswith(LOCK) and not path.with_name(path.name.removesuffix(LOCK)).exists():
            _remove_unlocked(path.with_name(path.name.removesuffix(LOCK)))


def prune(folder: pathlib.Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints; folders that are not whole are left to be looked at."""
    for path in list_checkpoints(folder)[:-keep]:
        _remove(path)


def _remove_unlocked(path: pathlib.Path) -> None:
    if temporary_step(path) is None:
        return
    try:
        with lock_of(path).open("a") as stream:
            lock(stream)
            _remove(path)
            lock_of(path).unlink(missing_ok=True)
    except OSError:
        return  # locked, or a disk that will say so when the checkpoint is written


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
