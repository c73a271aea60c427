"""Sources of text as sequences of documents: the standard library, files, and rows of tables."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from distmuon.pretrain.data.config import DataConfig
from distmuon.pretrain.data.files import find_files, walk_files
from distmuon.pretrain.errors import UserError

# Installed packages differ between machines; the other two are tables and generated text.
_STDLIB_SKIP = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data"})


class Documents(Protocol):
    """A source of texts in a fixed order.

    Attributes:
        description: A few words for the log.
        files: The files that are read, whose sizes and times tell whether a cache is still good.
    """

    description: str
    files: list[Path]

    def __len__(self) -> int:
        """How many documents there are at most."""

    def __iter__(self) -> Iterator[str]:
        """Their texts, always in the same order."""


class FileDocuments:
    """One document a file, in an order that is scattered but fixed by the relative paths.

    Files that are not UTF-8 or hold a NUL character are left out.

    Args:
        root: The folder that relative paths start from.
        files: The files, below ``root``.
        description: A few words for the log.
    """

    def __init__(self, root: Path, files: list[Path], description: str) -> None:
        # sorting by digest spreads folders evenly, so that any first part is a fair sample
        self.files = sorted(files, key=lambda file: _digest(file.relative_to(root).as_posix()))
        self.description = f"{description}, {len(files):,} files"

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            data = file.read_bytes()
            if b"\0" in data:
                continue
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError:
                continue


class RowDocuments:
    """One document a row of ``.jsonl`` or ``.parquet`` files, in the order of the files; empty rows are left out.

    Args:
        files: The files, all of one format.
        builder: ``json`` or ``parquet``, the reader of the datasets library.
        column: The column with the text.
    """

    def __init__(self, files: list[Path], builder: str, column: str) -> None:
        self.files = files
        self.description = f"{len(files):,} {builder} files, column {column!r}"
        self._builder = builder
        self._column = column
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._rows: Any = None

    def __len__(self) -> int:
        return len(self._load())

    def __iter__(self) -> Iterator[str]:
        for row in self._load():
            text = row[self._column]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"column {self._column!r} of {self.files[0]} holds a {type(text).__name__}, but text is "
                    "wanted; set data.text_column."
                )
            if text:
                yield text

    def _load(self) -> Any:
        if self._rows is not None:
            return self._rows
        import datasets

        # the converted copy serves one pass only; the result is cached as tokens
        self._scratch = tempfile.TemporaryDirectory(prefix="distmuon-rows-")
        hidden = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(
                self._builder,
                data_files=[str(file) for file in self.files],
                split="train",
                cache_dir=self._scratch.name,
            )
        except Exception as error:  # the library raises many kinds for a damaged file
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.source with {self.files[0]} cannot be read as {self._builder} ({reason}); repair the "
                "file or set data.format."
            ) from error
        finally:
            if not hidden:
                datasets.enable_progress_bars()
        if self._column not in rows.column_names:
            names = ", ".join(map(repr, rows.column_names))
            raise UserError(
                f"{self.files[0]} has no column {self._column!r}, only {names}; set data.text_column to one of them."
            )
        self._rows = rows.select_columns([self._column])
        return self._rows


def open_documents(config: DataConfig) -> Documents:
    """The texts that ``config.source`` names, which must not be ``.bin`` shards.

    Raises:
        UserError: Nothing is found, or it is no text.
    """
    if config.source == "builtin":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in walk_files(root, _STDLIB_SKIP) if file.suffix == ".py"]
        if not files:
            raise UserError(
                f"data.source 'builtin' found no .py file in {root}, but reads Python's standard library "
                "there; name a folder of text files instead."
            )
        return FileDocuments(root, files, f"Python {platform.python_version()} standard library")
    root, files, kind = find_files(config)
    if kind == "bin":
        raise UserError(
            f"data.source {config.source!r} holds token shards, but text is wanted here; name text, .jsonl "
            "or .parquet files."
        )
    if kind == "text":
        return FileDocuments(root, files, f"text of {config.source}")
    return RowDocuments(files, "json" if kind == "jsonl" else "parquet", config.text_column)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).digest()
