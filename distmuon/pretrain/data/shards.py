"""Read and write the ``.bin`` token shards of llm.c and modded-nanogpt.

A shard is a header of 256 little-endian int32 (magic number, version, number of tokens, zeros) and then
the tokens: uint16 under magic 20240520 version 1, uint32 under magic 20240801 version 7.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distmuon.pretrain.data.tokenizer import Tokens
from distmuon.pretrain.errors import UserError

HEADER_BYTES = 256 * 4
MAX_TOKENS = (1 << 31) - 1  # the header's count is a signed 32-bit number
MAGIC_UINT16 = 20240520
MAGIC_UINT32 = 20240801
_VERSION = {MAGIC_UINT16: 1, MAGIC_UINT32: 7}
_DTYPE: dict[int, npt.DTypeLike] = {MAGIC_UINT16: "<u2", MAGIC_UINT32: "<u4"}


def write_shard(path: str | os.PathLike[str], tokens: npt.NDArray[np.integer[Any]]) -> Path:
    """Write one shard under a temporary name and rename it, so that no half-written file is seen.

    Args:
        path: The file to write; it is replaced if it exists.
        tokens: 1-D integers; uint32 is written as such, other types as uint16 where every id fits and as
            uint32 otherwise.

    Returns:
        The path.

    Raises:
        ValueError: ``tokens`` is not 1-D, has an id outside of uint32, or more than 2^31 - 1 of them.
    """
    target = Path(path)
    if tokens.ndim != 1 or len(tokens) > MAX_TOKENS:
        raise ValueError(
            f"a shard holds a 1-D array of at most {MAX_TOKENS} tokens, got shape {tokens.shape}; write several shards."
        )
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= 1 << 32:
        raise ValueError(f"token ids must lie in 0..{(1 << 32) - 1}, found {low} to {high}.")
    magic = MAGIC_UINT32 if tokens.dtype == np.uint32 or high >= 1 << 16 else MAGIC_UINT16
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, _VERSION[magic], len(tokens)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(tokens, dtype=_DTYPE[magic]).data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read_shard(path: str | os.PathLike[str]) -> Tokens:
    """Map one shard into memory.

    Returns:
        A read-only 1-D memory map of uint16 or uint32 (an ordinary array if the shard is empty).

    Raises:
        UserError: The file is missing, is no shard, or is not as long as its header says.
    """
    target = Path(path)
    try:
        size = target.stat().st_size
        header = np.fromfile(target, dtype="<i4", count=3)
    except OSError as error:
        raise UserError(f"shard {target} cannot be read ({error.strerror}); check data.source.") from error
    if size < HEADER_BYTES:
        raise UserError(
            f"shard {target} has {size} bytes, but its header alone takes {HEADER_BYTES}; download or write it again."
        )
    magic, version, count = (int(value) for value in header)
    if magic not in _VERSION:
        raise UserError(
            f"shard {target} starts with {magic}, but a token shard starts with {MAGIC_UINT16} (uint16) or "
            f"{MAGIC_UINT32} (uint32); write it with 'distmuon tokenize' or take it out of data.source."
        )
    if version != _VERSION[magic]:
        raise UserError(
            f"shard {target} has version {version}, but version {_VERSION[magic]} goes with magic {magic}; "
            "write it again with 'distmuon tokenize'."
        )
    dtype = np.dtype(_DTYPE[magic])
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        raise UserError(
            f"shard {target} has {size} bytes, but its header counts {count} tokens of {dtype.itemsize} "
            f"bytes, which make {expected}; it is cut short or damaged, download or write it again."
        )
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(target, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
