"""The folder of a run: a new one each time, or the one that is resumed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from distmuon.pretrain.changes import run_name
from distmuon.pretrain.checkpoint import find_problem, step_folders, step_of, unfinished
from distmuon.pretrain.checkpoint.names import FOLDER, run_folder, step_folder, temporary_step
from distmuon.pretrain.config import LogConfig
from distmuon.pretrain.errors import AgreedError, UserError
from distmuon.pretrain.processes import on_first, rank

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"


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
        return self.path / FOLDER

    @property
    def metrics(self) -> pathlib.Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> pathlib.Path:
        """The resolved config."""
        return self.path / CONFIG

    @property
    def summary(self) -> pathlib.Path:
        """The result."""
        return self.path / "summary.json"


@contextlib.contextmanager
def written(folder: pathlib.Path) -> Iterator[None]:
    """A block that writes into a run folder; what the disk refuses is one sentence.

    Raises:
        UserError: In the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        name = error.filename or folder
        raise UserError(
            f"{name} cannot be written ({error.strerror or error}): free space or point log.dir at another disk, and "
            "go on from the last checkpoint with --resume."
        ) from error


def open_run_folder(config: LogConfig, resume: str | None, *, verify: bool = True) -> RunFolder:
    """Choose the folder of a run and make it; all ranks have to call it, and get the same one.

    Args:
        config: The ``log`` section.
        resume: None for a new run, ``"auto"`` for the newest whole checkpoint of runs of this name (a new
            run when there is none), or a run folder or a ``step-N`` folder.
        verify: Whether checksums of the checkpoint's files are compared, and not only their sizes.

    Raises:
        UserError: If there is nothing whole to resume from at a given path, if ``auto`` finds broken checkpoints
            alone, or if the folder cannot be made.
    """
    base = pathlib.Path(config.dir) / (config.name or "run")
    if resume is None:
        return RunFolder(on_first(lambda: _make_new(base)))
    if resume != "auto":
        return _of_run(_find(pathlib.Path(resume), verify))
    broken: list[str] = []
    for folder in on_first(lambda: _same_name(base)):
        newest, problems = _newest_whole(folder / FOLDER, verify)
        if newest is not None:
            return RunFolder(folder, newest)
        broken += problems
    if broken:
        raise AgreedError(
            f"--resume auto found no whole checkpoint under {base} ({'; '.join(broken)}): bring one back, or start a "
            "new run without --resume."
        )
    logger.info("--resume auto found no checkpoint under %s: starting a new run", base)
    return RunFolder(on_first(lambda: _make_new(base)))


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
    """``base``, ``base-2``, ``base-3``, ... that exist and are not runs of a name like that, the last one first."""
    numbered = {1: base} if base.is_dir() else {}
    for path in base.parent.iterdir() if base.parent.is_dir() else ():
        match = re.fullmatch(re.escape(base.name) + r"-(\d+)", path.name)
        if match and path.is_dir() and run_name(path / CONFIG) in (base.name, None):
            numbered[int(match[1])] = path
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def _of_run(checkpoint: pathlib.Path) -> RunFolder:
    """The run folder of a checkpoint that was found by its path."""
    folder = on_first(lambda: run_folder(checkpoint))
    if folder is None:
        raise AgreedError(
            f"{checkpoint} is in no run folder, and a run goes on in the one that holds its checkpoint: put it in as "
            f"RUN/{FOLDER}/{checkpoint.name}, with the config.yaml of its run in RUN, and give --resume RUN."
        )
    return RunFolder(folder, folder / FOLDER / checkpoint.name)


def _find(path: pathlib.Path, verify: bool) -> pathlib.Path:
    """The checkpoint that a path given to ``--resume`` means."""
    asked = on_first(lambda: step_folder(path))
    if asked is not None:
        problem = find_problem(asked, hashes=verify)
        if problem is None:
            return asked
        raise AgreedError(f"--resume {path} is broken ({problem}): {_advice(asked.parent, verify, _others(asked))}.")
    for folder in (path / FOLDER, path):
        checkpoint, problems = _newest_whole(folder, verify)
        if checkpoint is not None:
            return checkpoint
        if problems:
            raise AgreedError(
                f"--resume {path} holds no whole checkpoint ({'; '.join(problems)}): bring one back, or start a new "
                "run without --resume."
            )
    near = on_first(lambda: next((f for f in (path.parent, path.parent / FOLDER) if step_folders(f)), None))
    advice = "give a run folder such as runs/debug, or auto"
    if near is not None:
        advice = _advice(near, verify, on_first(lambda: step_folders(near)))
    raise AgreedError(f"--resume {path} holds no whole checkpoint (a step-N folder with a manifest.json): {advice}.")


def _newest_whole(folder: pathlib.Path, verify: bool) -> tuple[pathlib.Path | None, list[str]]:
    """The newest whole checkpoint of a folder, and what is wrong with each newer one, which the log says, too."""
    problems: list[str] = []
    for path in reversed(on_first(lambda: step_folders(folder))):
        problem = find_problem(path, hashes=verify)
        if problem is None:
            _mention_unfinished(folder, newer_than=step_of(path))
            return path, problems
        logger.warning("skipping %s: %s", path, problem)
        problems.append(f"{path.name}: {problem}")
    _mention_unfinished(folder, newer_than=-1)
    return None, problems


def _mention_unfinished(folder: pathlib.Path, newer_than: int) -> None:
    if rank() > 0:
        return
    for path in unfinished(folder):
        step = temporary_step(path)
        if step is not None and step > newer_than:
            logger.warning("skipping %s: it was not written to its end", path)


def _advice(folder: pathlib.Path, verify: bool, candidates: list[pathlib.Path]) -> str:
    """What to resume from instead."""
    for path in reversed(candidates):
        if find_problem(path, hashes=verify) is None:
            return f"resume from {path}"
    return f"no other checkpoint in {folder} is whole, so start a new run without --resume"


def _others(path: pathlib.Path) -> list[pathlib.Path]:
    return on_first(lambda: [found for found in step_folders(path.parent) if found.name != path.name])
