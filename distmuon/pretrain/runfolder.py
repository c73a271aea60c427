"""The folder of a run: a new one each time, or the one that is resumed."""

from __future__ import annotations

import itertools
import logging
import pathlib
import re
from dataclasses import dataclass

from distmuon.pretrain.checkpoint import is_whole, list_checkpoints, newest_checkpoint
from distmuon.pretrain.config import LogConfig
from distmuon.pretrain.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    Attributes:
        path: The folder.
        resume_from: The ``step-N`` folder to go on from; None for a new run.
    """

    path: pathlib.Path
    resume_from: pathlib.Path | None = None

    @property
    def checkpoints(self) -> pathlib.Path:
        """Folder of the ``step-N`` folders."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> pathlib.Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def summary(self) -> pathlib.Path:
        """The result."""
        return self.path / "summary.json"


def open_run_folder(config: LogConfig, resume: str | None) -> RunFolder:
    """Choose the folder of a run and make it.

    Args:
        config: The ``log`` section.
        resume: None for a new run, ``"auto"`` for the newest whole checkpoint of runs of this name (a new
            run when there is none), or a run folder or a ``step-N`` folder.

    Raises:
        UserError: If there is nothing to resume from at a given path, or the folder cannot be made.
    """
    base = pathlib.Path(config.dir) / (config.name or "run")
    if resume is None:
        return RunFolder(_make_new(base))
    if resume != "auto":
        checkpoint = _find(pathlib.Path(resume))
        return RunFolder(checkpoint.parent.parent, checkpoint)
    for folder in _same_name(base):
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is not None:
            return RunFolder(folder, newest)
    logger.info("--resume auto found no checkpoint under %s: starting a new run", base)
    return RunFolder(_make_new(base))


def _make_new(base: pathlib.Path) -> pathlib.Path:
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.is_dir() or any(path.iterdir()):
                continue
        except OSError as error:
            raise UserError(
                f"the run folder {path} cannot be made ({error.strerror}): set log.dir to a folder you may write to."
            ) from error
        return path
    raise AssertionError("itertools.count has no end")


def _same_name(base: pathlib.Path) -> list[pathlib.Path]:
    """``base``, ``base-2``, ``base-3``, ... that exist, the last one first."""
    numbered = {}
    for path in base.parent.glob(f"{base.name}*"):
        match = re.fullmatch(r"(?:-(\d+))?", path.name[len(base.name) :])
        if match and path.is_dir():
            numbered[int(match[1] or 1)] = path
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.name.startswith("step-") and is_whole(path):
        return path.resolve()
    for folder in (path / "checkpoints", path):
        newest = newest_checkpoint(folder)
        if newest is not None:
            return newest.resolve()
    near = list_checkpoints(path.parent) or list_checkpoints(path.parent / "checkpoints")
    advice = f"resume from {near[-1]}" if near else "give a run folder such as runs/debug, or auto"
    raise UserError(f"--resume {path} holds no whole checkpoint (a step-N folder with a .metadata file): {advice}.")
