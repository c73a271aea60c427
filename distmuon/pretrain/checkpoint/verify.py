"""Is a checkpoint whole? All ranks ask together and agree."""

from __future__ import annotations

import pathlib
import stat

from distmuon.pretrain.checkpoint.manifest import Manifest, read_manifest, record
from distmuon.pretrain.checkpoint.metadata import BrokenCheckpoint, read_metadata
from distmuon.pretrain.checkpoint.names import step_of
from distmuon.pretrain.processes import gather, on_first, rank, world_size


def find_problem(folder: pathlib.Path, *, hashes: bool) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks, which all have to call it.

    Args:
        folder: A ``step-N`` folder.
        hashes: Whether to compare checksums, too; the files are shared out over the ranks.

    Returns:
        Which file and what about it, such as ``"__1_0.distcp is truncated: 1024 of 40960 bytes"``; None for a
        checkpoint that is whole.
    """
    problem, manifest = on_first(lambda: _look(folder))
    if manifest is None or not hashes:
        return problem
    found = [_compare(folder, manifest, name) for name in _share(manifest)]
    problems = sorted(text for texts in gather(found) for text in texts if text is not None)
    return problems[0] if problems else None


def quick_problem(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's manifest or sizes, as one rank sees it; no file but the manifest is read."""
    try:
        _check_sizes(folder, read_manifest(folder))
    except BrokenCheckpoint as error:
        return str(error)
    return None


def _look(folder: pathlib.Path) -> tuple[str | None, Manifest | None]:
    try:
        manifest = read_manifest(folder)
        _check_sizes(folder, manifest)
        read_metadata(folder, manifest.files)
    except BrokenCheckpoint as error:
        return str(error), None
    return None, manifest


def _check_sizes(folder: pathlib.Path, manifest: Manifest) -> None:
    if manifest.step != step_of(folder):
        raise BrokenCheckpoint(f"its manifest is that of step {manifest.step}")
    for name, expected in sorted(manifest.files.items()):
        try:
            found = (folder / name).stat()
        except FileNotFoundError as error:
            raise BrokenCheckpoint(f"{name} is missing") from error
        except (OSError, ValueError) as error:
            raise BrokenCheckpoint(f"{name} cannot be looked at ({error})") from error
        if not stat.S_ISREG(found.st_mode):
            raise BrokenCheckpoint(f"{name} is not a file")
        if found.st_size < expected.size:
            raise BrokenCheckpoint(f"{name} is truncated: {found.st_size} of {expected.size} bytes")
        if found.st_size > expected.size:
            raise BrokenCheckpoint(f"{name} is too long: {found.st_size} bytes where {expected.size} were written")


def _share(manifest: Manifest) -> list[str]:
    """The files that this rank reads: the largest are dealt out first."""
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    return names[rank() :: world_size()]


def _compare(folder: pathlib.Path, manifest: Manifest, name: str) -> str | None:
    try:
        found = record(folder / name)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found != manifest.files[name]:
        return f"{name} has another checksum than it was written with"
    return None
