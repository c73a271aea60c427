"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
import pathlib


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a text in UTF-8 under another name, then give it its own: a process that is killed leaves the old file.

    Raises:
        OSError: If the disk refuses it.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
