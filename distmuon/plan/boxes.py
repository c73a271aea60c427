"""Boxes of a parameter: which elements a rank stores, in global coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned part of a parameter.

    Attributes:
        offsets: Where it begins on each axis of the global parameter.
        sizes: Its length on each axis; a zero makes it empty.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of all elements of a parameter of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The elements that both have; None where there are none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        sizes = tuple(min(a + m, b + n) - start for start, (a, m, b, n) in zip(offsets, ends, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    def covers(self, other: Box) -> bool:
        """Whether every element of ``other`` is in this box."""
        return other.numel == 0 or self.intersect(other) == other

    def cut(self, part: int, parts: int) -> Box:
        """One of ``parts`` along its longest axis, all of one length but for 1; empty only if that is too short."""
        axis = max(range(len(self.sizes)), key=self.sizes.__getitem__)
        start, end = (self.sizes[axis] * number // parts for number in (part, part + 1))
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[axis], sizes[axis] = offsets[axis] + start, end - start
        return Box(tuple(offsets), tuple(sizes))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box in a tensor that holds ``outer``, which covers it."""
        starts = [mine - base for mine, base in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def chunk(size: int, part: int, parts: int) -> tuple[int, int]:
    """Offset and length of one part of an axis, as :func:`torch.chunk` and FSDP2 cut it; the last may be empty."""
    step = -(-size // parts)
    start = min(size, part * step)
    return start, min(size, start + step) - start
