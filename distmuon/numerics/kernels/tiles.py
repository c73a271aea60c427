"""How a symmetric product is cut into tiles: the size of one, and how many there are."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The square part of a result that one program computes.

    Attributes:
        side: rows and columns of the tile, a power of two from 16 on.
        piece: length of the pieces that the sum over the shared dimension is taken in, a power of two
            from 16 on.
        warps: warps of a program.
        stages: pieces in flight from memory.
        panel: columns of tiles that are walked row by row before the next ones: programs that run
            together then share rows and columns in the cache.
    """

    side: int
    piece: int
    warps: int
    stages: int
    panel: int = 8


# float32 is multiplied without tensor cores: a small tile leaves registers for three programs on a processor
_FLOAT32 = Tile(side=64, piece=32, warps=4, stages=3)
# up to 256 rows, sides of 128 would spend half as much again as the triangle needs, and these a quarter
_SMALL = Tile(side=64, piece=64, warps=4, stages=4)
# twice the products for each element read; its 96 KiB and 126 registers let two programs share a processor
_LARGE = Tile(side=128, piece=64, warps=8, stages=3)


def choose(size: int, dtype: torch.dtype) -> Tile:
    """The tile for a symmetric result of ``size`` rows.

    It depends on nothing else, neither batch nor device, so that a matrix gets the same bits alone and in a
    batch. The tiles follow from counting shared memory (228 KiB a processor), registers and tiles for an H100,
    for which the compiler's own report was read (no registers spilled); none was timed on a GPU. All fit the
    99 KiB a program of the smallest cards of capability 8.0 or later.

    Args:
        size: rows of the result.
        dtype: dtype of the factors.

    Returns:
        A tile for the launchers of ``symmetric``.
    """
    if dtype is torch.float32:
        return _FLOAT32
    return _SMALL if size <= 256 else _LARGE


def upper_tiles(size: int, tile: Tile) -> int:
    """How many tiles of a ``size`` x ``size`` result lie on its diagonal or above it."""
    tiles_a_side = -(-size // tile.side)
    return tiles_a_side * (tiles_a_side + 1) // 2
