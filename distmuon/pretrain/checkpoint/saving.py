"""Saving while training goes on: one checkpoint at a time, on a process group of its own."""

from __future__ import annotations

import concurrent.futures
import logging
import pathlib
import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from distmuon._version import __version__
from distmuon.pretrain.checkpoint.failures import reason
from distmuon.pretrain.checkpoint.manifest import Manifest
from distmuon.pretrain.checkpoint.names import temporary
from distmuon.pretrain.checkpoint.state import AppState
from distmuon.pretrain.checkpoint.store import Writing, clear_up
from distmuon.pretrain.checkpoint.writer import Writer
from distmuon.pretrain.errors import RankLost, UserError
from distmuon.pretrain.phase import lost_others
from distmuon.pretrain.processes import agreed, largest, on_first, rank, world_size

logger = logging.getLogger(__name__)


class SaveSettings(Protocol):
    """What is used of the ``checkpoint`` section."""

    async_save: bool
    keep: int


@dataclass
class _Pending:
    """A save that was begun on all ranks and not yet seen to end on all."""

    final: pathlib.Path
    future: concurrent.futures.Future[Any]


class Saver:
    """Saves checkpoints of a run; a context manager.

    All ranks have to call the methods, each at the same steps. What goes wrong on one rank is raised on all.

    Args:
        folder: Of the ``step-N`` folders; it is made.
        state: The run.
        settings: The ``checkpoint`` section.
        layout: Arrangement of the ranks, in words.
    """

    def __init__(self, folder: pathlib.Path, state: AppState, settings: SaveSettings, layout: str) -> None:
        self._folder, self._state, self._settings, self._layout = folder, state, settings, layout
        self._pending: _Pending | None = None
        self._writing: Writing | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> Saver:
        # the thread that saves and the one that trains must not mix their collectives
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        # there is one process on purpose; set here as the warning comes from a thread
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt | RankLost) or (error is not None and lost_others(error)):
            # the thread may wait for a rank that does not come; the next run clears up
            return
        try:
            self.wait() if error is None else self._wait_alone()
        finally:
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def save(self, step: int) -> pathlib.Path:
        """Save ``step-N``, after the save before it has ended.

        With ``async_save`` this comes back when the state is copied to host memory, and `poll` and `wait` tell how it
        ended; without, when it is committed.

        Args:
            step: The step that was done.

        Returns:
            The folder.

        Raises:
            UserError: If the disk refuses it or the save before it failed; older checkpoints are still there.
        """
        self.wait()
        final = self._folder / f"step-{step}"
        path = on_first(lambda: self._begin(final, step))
        try:
            self._start(path, final, step)
        except Exception:
            self._end()
            raise
        if not self._settings.async_save:
            self.wait()
        return final

    def _start(self, path: pathlib.Path, final: pathlib.Path, step: int) -> None:
        manifest = Manifest(
            step=step,
            world_size=world_size(),
            layout=self._layout,
            torch=torch.__version__,
            distmuon=__version__,
            routing=self._state.routing(),
        )
        writer = Writer(path, final, manifest, self._writing, self._settings.keep)
        state = self._state.state_dict()
        later = self._settings.async_save
        self._pending = _Pending(
            final, self._save_later(final, state, writer) if later else self._save_now(state, writer)
        )

    def poll(self) -> None:
        """Look whether the save under way has ended on all ranks, without waiting; for every step.

        Raises:
            UserError: If it failed.
        """
        if self._pending is not None and largest(0 if self._pending.future.done() else 1) == 0:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            UserError: If it failed.
        """
        if self._pending is None:
            return
        final, future = self._pending.final, self._pending.future
        try:
            with agreed():
                try:
                    future.result()
                except (Exception, CheckpointException) as error:  # the latter, in which DCP wraps all, is none
                    if lost_others(error):
                        raise
                    raise _unwritten(final, error) from error
        finally:
            self._end()

    def _begin(self, final: pathlib.Path, step: int) -> pathlib.Path:
        """On rank 0: the temporary folder."""
        try:
            clear_up(self._folder)
            self._writing = Writing(temporary(self._folder, step))
        except OSError as error:
            raise _unwritten(final, error) from error
        return self._writing.path

    def _save_now(self, state: dict[str, Any], writer: Writer) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            found = save(
                {"app": state},
                storage_writer=writer,
                process_group=self._group,
                no_dist=not dist.is_initialized(),
            )
        except (Exception, CheckpointException) as error:
            future.set_exception(error)
        else:
            future.set_result(found)
        return future

    def _save_later(self, final: pathlib.Path, state: dict[str, Any], writer: Writer) -> concurrent.futures.Future[Any]:
        # a rank without memory for its copy has to say so before the others wait for it
        with agreed():
            try:
                copy = BlockingAsyncStager().stage(state)
            except (MemoryError, RuntimeError) as error:
                raise UserError(
                    f"the checkpoint {final} could not be written, as its copy in host memory failed "
                    f"({reason(error)}): set checkpoint.async_save to false."
                ) from error
        future = async_save(
            {"app": copy},
            storage_writer=writer,
            async_stager=_Staged(),
            process_group=self._group,
            no_dist=not dist.is_initialized(),
        )
        if not isinstance(future, concurrent.futures.Future):
            raise AssertionError("DCP stages synchronously with a stager that does")
        return future

    def _wait_alone(self) -> None:
        """Let the save under way end while the run ends with an error that other ranks may not have."""
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending.future])
        error = self._pending.future.exception()
        if error is not None and rank() == 0:
            logger.warning("%s", _unwritten(self._pending.final, error))
        self._end()

    def _end(self) -> None:
        """After a save: remove what is left of its temporary folder."""
        self._pending = None
        if self._writing is not None:
            self._writing.discard()
            self._writing = None


class _Staged(BlockingAsyncStager):
    """The stager of a state that was copied before."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict


def _unwritten(final: pathlib.Path, error: BaseException) -> UserError:
    return UserError(
        f"the checkpoint {final} could not be written ({reason(error)}): free space or point log.dir at another disk, "
        "and go on from the one before with --resume."
    )
