"""Companions: second moments that travel with a matrix to its owner and back, and who stores what of them."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.plan.blocks import Block, Cut
from distmuon.plan.boxes import Box
from distmuon.plan.layouts import Holding, Layout, layout_of
from distmuon.plan.reading import Reading


@dataclass(frozen=True)
class Moments:
    """The second moments of a parameter: of each element, or one for each row of each matrix.

    Attributes:
        shape: Their global shape. Of rows: that of the parameter with 1 on axes of input features, or as many as
            matrices lie along such an axis.
        reduced: These axes; none where each element has its own.
        starts: Along a reduced axis that is cut: the first input feature of each matrix.
    """

    shape: tuple[int, ...]
    reduced: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: Sequence[int], reading: Reading, *, rows: bool) -> Moments:
        """Those of a parameter.

        Args:
            shape: Its global shape.
            reading: What its axes mean; it fits the shape.
            rows: One for each row of output features, instead of each element.
        """
        dims = tuple(shape)
        if not rows:
            return cls(dims)
        if reading.flatten:
            return cls((dims[0], *(1 for _ in dims[1:])), tuple(range(1, len(dims))))
        axis = len(dims) - 1 - int(reading.transposed)
        starts = _starts(dims[axis], reading) if reading.split_axis == "cols" else ()
        return cls((*dims[:axis], len(starts) or 1, *dims[axis + 1 :]), (axis,), starts)

    def stored(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """What a rank stores of them that stores ``sizes`` of the parameter: all of a reduced axis."""
        return tuple(self.shape[axis] if axis in self.reduced else size for axis, size in enumerate(sizes))

    def cut(self, cut: Cut | None) -> Cut | None:
        """What belongs to a block of the parameter."""
        if cut is None or cut.axis not in self.reduced:
            return cut
        if cut.step > 1:  # blocks that take turns are numbered by their first feature
            return Cut(cut.axis, cut.start, 1)
        first, end = (bisect_left(self.starts, place) for place in (cut.start, cut.start + cut.size))
        return Cut(cut.axis, first, end - first, head=int(cut.head > 0))


def _starts(length: int, reading: Reading) -> tuple[int, ...]:
    """Where matrices begin that an axis of input features is cut into; turn by turn they are numbered."""
    if reading.split_sizes is None and reading.num_heads is None:
        return ()
    sizes = reading.split_sizes or (length,)
    if reading.interleaved:
        return tuple(range(len(sizes)))
    found: list[int] = []
    start = 0
    for number, size in enumerate(sizes):
        step = size // (reading.heads_of(number) or 1)
        found += range(start, start + size, step)
        start += size
    return tuple(found)


@dataclass(frozen=True)
class Companion:
    """The second moments of a block of a parameter, counted in words of what travels.

    Attributes:
        shape: Of the block; the last axis in words.
        holdings: Who stores what, by ascending rank. Rows that are cut along the columns are stored by several.
        cut: What the block is of the moments of the parameter, in numbers rather than words; None: all.
        words: How many a number takes.
        stacked: Whether the first axis counts matrices.
    """

    shape: tuple[int, ...]
    holdings: tuple[Holding, ...]
    cut: Cut | None
    words: int
    stacked: bool

    @classmethod
    def of(cls, moments: Moments, block: Block, holdings: Sequence[Holding], *, words: int) -> Companion:
        """Those of a block.

        Args:
            moments: Of the parameter.
            block: Of the parameter.
            holdings: Who stores what of the moments of the parameter.
            words: How many words of what travels a number takes.
        """
        cut = moments.cut(block.cut)
        whole = Box.whole(moments.shape)
        shape = _in_words(whole if cut is None else cut.box(whole), words).sizes
        held = tuple(Holding(h.rank, cls.box_in(h.box, cut, words), h.replica) for h in holdings)
        return cls(shape, held, cut, words, block.stacked)

    @staticmethod
    def box_in(stored: Box, cut: Cut | None, words: int) -> Box:
        """What a rank has of the block that stores ``stored`` of the moments of the parameter."""
        return _in_words(stored if cut is None else cut.box(stored), words)

    @functools.cached_property
    def layout(self) -> Layout:
        """Its holdings, indexed."""
        return layout_of(self.holdings)

    @property
    def matrix_numel(self) -> int:
        """Words of one matrix."""
        return math.prod(self.shape) // (self.shape[0] if self.stacked else 1)

    def box_of(self, first: int, count: int) -> Box:
        """Those of ``count`` consecutive matrices."""
        if not self.stacked:
            return Box.whole(self.shape)
        rest = self.shape[1:]
        return Box((first, *(0 for _ in rest)), (count, *rest))

    def digest(self) -> str:
        """Everything in it, the same in every process."""
        return repr((self.shape, self.cut, self.words, self.layout.digest))


def _in_words(box: Box, words: int) -> Box:
    return Box((*box.offsets[:-1], box.offsets[-1] * words), (*box.sizes[:-1], box.sizes[-1] * words))


class Companions:
    """Makes companions, one for the many blocks that are cut and stored alike."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._made: dict[tuple[Moments, Cut | None, Layout, bool], Companion] = {}

    def of(self, moments: Moments, block: Block, holdings: Sequence[Holding]) -> Companion:
        """See :meth:`Companion.of`."""
        key = moments, block.cut, layout_of(tuple(holdings)), block.stacked
        if key not in self._made:
            self._made[key] = Companion.of(moments, block, holdings, words=self._words)
        return self._made[key]
