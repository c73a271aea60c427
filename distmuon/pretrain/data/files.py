"""Find the files that ``data.source`` names and tell what they hold."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from distmuon.pretrain.data.config import DataConfig, Format
from distmuon.pretrain.errors import UserError

_SUFFIXES: dict[str, Format] = {".bin": "bin", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def walk_files(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """All files below ``root``, sorted; hidden names, ``__pycache__`` and the names in ``skip`` are left out."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [n for n in folders if not n.startswith(".") and n != "__pycache__" and n not in skip]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def find_files(config: DataConfig) -> tuple[Path, list[Path], Format]:
    """The files of a source that is not built in.

    Returns:
        The folder that relative names start from, the sorted files of the format (for ``text``, all files),
        and the format itself, never ``auto``.

    Raises:
        UserError: Nothing is there, nothing has the format, or ``auto`` finds several formats.
    """
    source = os.path.expanduser(config.source)
    if os.path.isdir(source):
        root = Path(source)
        files = walk_files(root)
    elif os.path.isfile(source):
        root, files = Path(source).parent, [Path(source)]
    else:
        files = sorted(Path(name) for name in glob.glob(source, recursive=True) if os.path.isfile(name))
        root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    if not files:
        raise UserError(
            f"data.source {config.source!r} names no file, but a file, a folder with files or a glob pattern "
            "is wanted; correct the path, or use 'builtin'."
        )
    kind = _detect(config, files) if config.format == "auto" else config.format
    if kind != "text":
        chosen = [file for file in files if _suffix_format(file) == kind]
        # a single file of any name is taken at the user's word
        files = chosen or (files if len(files) == 1 else [])
    if not files:
        raise UserError(
            f"data.source {config.source!r} has no {kind} file, but data.format asks for {kind}; "
            "correct one of the two."
        )
    return root, files, kind


def _suffix_format(path: Path) -> Format:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst", ".xz"):
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def _detect(config: DataConfig, files: list[Path]) -> Format:
    """A folder of data files may hold a README next to them, so text counts only where it is alone."""
    kinds = {_suffix_format(file) for file in files} - {"text"}
    if len(kinds) > 1:
        raise UserError(
            f"data.source {config.source!r} holds files of several formats ({', '.join(sorted(kinds))}), but "
            "only one can be read; set data.format."
        )
    return kinds.pop() if kinds else "text"
