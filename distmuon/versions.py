"""Which code a rank runs."""

from __future__ import annotations

import functools
import hashlib
import pathlib

import torch

from distmuon._version import __version__

# What a step is made of; ranks may differ in the rest
_ROOMS = ("*.py", "numerics/**/*.py", "plan/**/*.py", "comm/**/*.py")


@functools.cache
def code_version() -> str:
    """The versions of this package and of torch, with a digest of the code that a step is made of."""
    root, digest = pathlib.Path(__file__).parent, hashlib.sha256()
    for path in sorted({path for pattern in _ROOMS for path in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"distmuon {__version__} (code {digest.hexdigest()[:8]}), torch {torch.__version__}"
