"""Sums along axes of a parameter that ranks have cut: who adds what, and where it lies in the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.plan.boxes import Box
from distmuon.plan.parameters import Holding


@dataclass(frozen=True)
class CutSum:
    """Sums of one parameter that no rank can make alone.

    Attributes:
        whole: All sums: the parameter's shape with a length of 1 on the axes that are summed over.
        places: Which of them each rank needs, by global rank; ranks that store nothing are missing.
        adds: The ranks that add theirs: of those that store the same elements the lowest.
    """

    whole: Box
    places: dict[int, Box]
    adds: frozenset[int]


def cut_sum(shape: Sequence[int], axes: Sequence[int], holdings: Sequence[Holding]) -> CutSum | None:
    """The sums along axes of a parameter; None where each rank stores these axes whole.

    Args:
        shape: Of the parameter.
        axes: Which ones are summed over.
        holdings: What each rank stores of it.
    """
    stored = sorted((holding for holding in holdings if holding.box.numel), key=lambda holding: holding.rank)
    if all(holding.box.sizes[axis] == shape[axis] for holding in stored for axis in axes):
        return None
    lowest: dict[Box, int] = {}
    for holding in stored:
        lowest.setdefault(holding.box, holding.rank)
    places = {holding.rank: _along(holding.box, axes) for holding in stored}
    return CutSum(_along(Box.whole(shape), axes), places, frozenset(lowest.values()))


def _along(box: Box, axes: Sequence[int]) -> Box:
    offsets, sizes = list(box.offsets), list(box.sizes)
    for axis in axes:
        offsets[axis], sizes[axis] = 0, 1
    return Box(tuple(offsets), tuple(sizes))
