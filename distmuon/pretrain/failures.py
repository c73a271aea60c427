"""What ended a run, in one place whatever started its processes: ``failed.json`` tells the first cause."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from distmuon.comm.waiting import Wait, tell
from distmuon.pretrain.errors import AgreedError, RankLost, UserError
from distmuon.pretrain.files import replace_text
from distmuon.pretrain.interrupt import Interrupted
from distmuon.pretrain.phase import failed_in, lost_others
from distmuon.pretrain.processes import rank, world_size

FILE = "failed.json"
HISTORY = "failures.jsonl"

# What takes the place of what: a mistake may be told by a rank that did not make it, and a loss has a cause elsewhere
_LOST, _AGREED, _OWN = "lost another rank", "agreed", "failed"
_WEIGHT = {_LOST: 0, _AGREED: 1, _OWN: 2}
# What every note has; a file without them is none of ours
_SAID = {"rank", "host", "time", "where", "step", "exception", "message"}
# Seconds in which other ranks may say that they are there. torchrun looks for ranks that ended ten times a second and
# takes the first second for the cause, so one that lost another has to fail a second later.
_PATIENCE = 1.0
# Seconds that a disk may take: one that does not answer must not hold up the end
_DISK_SECONDS = 10.0


class Failures:
    """Writes down what ends a ``with`` block, once: the context may be entered again inside of itself.

    An exception goes to ``failed.json``, and to the error file of torchrun where it has started this process; one
    that was asked for, by a signal, to the latter alone. A disk that refuses it is told on standard error.

    Args:
        place: Where to write until `settle` is called; None: nowhere.
        first: Called before anything else.
    """

    _folder: ClassVar[pathlib.Path | None] = None
    _progress: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, place: pathlib.Path | None, first: Callable[[], None]) -> None:
        self._place, self._first = place, first
        self._entered = self._noted = False

    @classmethod
    def settle(cls, folder: pathlib.Path, progress: Mapping[str, Any]) -> None:
        """From here on this process has a run folder.

        Args:
            folder: The run folder.
            progress: Its ``step`` is the number of steps done.
        """
        cls._folder, cls._progress = folder, progress

    @property
    def path(self) -> pathlib.Path | None:
        """The file; None while there is no place for it."""
        return self._place if self._folder is None else self._folder / FILE

    def __enter__(self) -> Failures:
        if not self._entered:
            self._entered = True
            Failures._folder, Failures._progress = None, {}
            if os.environ.get("TORCHELASTIC_ERROR_FILE"):
                get_error_handler().initialize()  # stacks of a crash
            if self._place is not None and rank() == 0:
                with contextlib.suppress(OSError):
                    self._place.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or self._noted:
            return
        self._noted = True
        self._first()
        what = _kind(error)
        report = _report(error) if what == _LOST else None
        _tell_torchrun(error)
        path = self.path
        if path is None or isinstance(error, Interrupted):
            return
        if isinstance(error, UserError) and self._folder is None:
            return  # a mistake in the settings, which a sentence tells
        if what == _AGREED and rank() > 0:
            return
        note = _note(error, what, report, self._progress.get("step"))
        # the disk of a lost machine may never answer
        writer = threading.Thread(target=_write, args=(path, note), daemon=True)
        writer.start()
        writer.join(_DISK_SECONDS)

    def elsewhere(self) -> str | None:
        """What ended another rank and so this one, as a sentence; None if no other has left word."""
        found = None if self.path is None else read(self.path)
        return None if found is None or found["kind"] == _LOST or found["rank"] == rank() else sentence(found)


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """A ``failed.json``; None if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["kind"] in _WEIGHT and found.keys() >= _SAID else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sentence(note: Mapping[str, Any]) -> str:
    """A ``failed.json`` in a line."""
    step = f" of step {note['step']}" if note["step"] else ""
    step = f" in the {note['where']}{step}" if note["where"] else ""
    message = " ".join(note["report"].split()) if note.get("report") else note["message"]
    return f"rank {note['rank']} on {note['host']}{step} at {note['time']}: {note['exception']}: {message}"


def put_aside(folder: pathlib.Path) -> str | None:
    """Move the ``failed.json`` of a run that goes on into the history; returns it in a line.

    Raises:
        OSError: If the disk refuses it.
    """
    note = read(folder / FILE)
    if note is not None:
        with (folder / HISTORY).open("a", encoding="utf-8") as history:
            history.write(json.dumps(note) + "\n")
    (folder / FILE).unlink(missing_ok=True)
    return None if note is None else sentence(note)


def _kind(error: Exception) -> str:
    if isinstance(error, RankLost) or (world_size() > 1 and lost_others(error)):
        return _LOST
    if isinstance(error, AgreedError) and error.__cause__ is None:
        return _AGREED
    return _OWN


def _note(error: Exception, kind: str, report: str | None, done: int | None) -> dict[str, Any]:
    where, step = failed_in(error)
    return {
        "kind": kind,
        "rank": rank(),
        "ranks": world_size(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "steps_done": done,
        "where": where,
        "step": step,
        "exception": type(error).__name__,
        "message": str(error),
        "report": report,
        "traceback": "".join(traceback.format_exception(error)),
    }


def _report(error: BaseException) -> str | None:
    """What this rank waited for and who is silent: as the error says, or asked of the others."""
    chain: BaseException | None = error
    report = None
    while chain is not None:
        if " in vain for " in str(chain):
            report = str(chain)
        chain = chain.__cause__ or chain.__context__
    if report is not None:
        return report
    world = dist.group.WORLD if dist.is_initialized() else None
    if world is None:
        return None
    where, step = failed_in(error)
    return tell(Wait(world, f"the {where}" + (f" of step {step}" if step else "")), _PATIENCE)


def _tell_torchrun(error: Exception) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    try:
        get_error_handler().record_exception(error)
    except OSError as refused:
        print(f"the error file {file} could not be written ({refused.strerror or refused})", file=sys.stderr)
        # half of a file would end torchrun itself
        with contextlib.suppress(OSError):
            if os.path.isfile(file):
                os.unlink(file)


def _write(path: pathlib.Path, note: dict[str, Any]) -> None:
    """Write a note, whole or not at all, unless there is one that weighs as much: the first stays."""
    whole = path.with_name(f".{path.name}.{note['rank']}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(whole, json.dumps(note, indent=2) + "\n")
        try:
            os.link(whole, path)
        except OSError:  # there is one, or the file system has no links
            there = read(path)
            if there is None or _WEIGHT[note["kind"]] > _WEIGHT[there["kind"]]:
                os.replace(whole, path)
    except OSError as refused:
        print(f"{path} could not be written ({refused.strerror or refused})", file=sys.stderr)
    with contextlib.suppress(OSError):
        whole.unlink(missing_ok=True)
        whole.with_name(f".{whole.name}.new").unlink(missing_ok=True)
