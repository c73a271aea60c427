"""Names of checkpoint folders: ``step-N``, and those of folders that are being written or were set aside."""

from __future__ import annotations

import pathlib
import re
import secrets

_NUMBER = "(0|[1-9][0-9]{0,17})"
_FINAL = re.compile(f"step-{_NUMBER}")
_WRITING = re.compile(rf"\.writing-step-{_NUMBER}-[0-9a-f]{{8}}")
LOCK = ".lock"
FOLDER = "checkpoints"


def is_final(path: pathlib.Path) -> bool:
    """Whether a folder is named as a checkpoint that was written to its end."""
    return _FINAL.fullmatch(path.name) is not None


def step_of(path: pathlib.Path) -> int:
    """The step of a ``step-N`` folder."""
    match = _FINAL.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named step-N")
    return int(match[1])


def step_folder(path: pathlib.Path) -> pathlib.Path | None:
    """The ``step-N`` folder that a path is, or leads to by a link of another name; None if there is none."""
    return next((found for found in (path, path.resolve()) if is_final(found) and found.is_dir()), None)


def run_folder(checkpoint: pathlib.Path) -> pathlib.Path | None:
    """The run folder in whose ``checkpoints`` a ``step-N`` folder is, by its path or by where links lead; else None."""
    for path in (checkpoint.absolute(), checkpoint.resolve()):
        if path.parent.name == FOLDER:
            return path.parent.parent
    return None


def temporary(folder: pathlib.Path, step: int) -> pathlib.Path:
    """A new name, beside ``step-N``, for what is not written to its end."""
    return folder / f".writing-step-{step}-{secrets.token_hex(4)}"


def temporary_step(path: pathlib.Path) -> int | None:
    """The step of a folder with such a name; None for other names."""
    match = _WRITING.fullmatch(path.name)
    return None if match is None else int(match[1])


def lock_of(path: pathlib.Path) -> pathlib.Path:
    """The file whose lock says that a temporary folder is being written."""
    return path.with_name(path.name + LOCK)
