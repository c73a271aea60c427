"""``metrics.jsonl``: one JSON object a line, each with ``step``, ``tokens`` and ``seconds``."""

from __future__ import annotations

import json
import os
import pathlib
from types import TracebackType
from typing import Any

Record = dict[str, Any]


class MetricsFile:
    """Appends records to a JSONL file, each one on the disk as soon as it is written.

    Args:
        path: The file; an existing one is continued.
        after_step: Records past this step are dropped first, as their steps are run again.
    """

    def __init__(self, path: pathlib.Path, after_step: int) -> None:
        if path.exists():
            _keep_until(path, after_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read_metrics(path: pathlib.Path) -> list[Record]:
    """All whole records of a file, in order; a line cut off by a crash is left out."""
    records: list[Record] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def curve(records: list[Record], name: str, against: str = "tokens") -> list[tuple[float, float]]:
    """The points ``(against, name)`` of all records that have ``name``."""
    return [(record[against], record[name]) for record in records if name in record]


def _keep_until(path: pathlib.Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    new = path.with_suffix(".jsonl.new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
