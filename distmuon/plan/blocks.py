"""Blocks: the parts of a parameter that are matrices, or stacks of them, of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distmuon.plan.boxes import Box, chunk
from distmuon.plan.layouts import Holding, Layout, layout_of
from distmuon.plan.matrices import MatrixSpec, matrix_spec
from distmuon.plan.reading import Reading


@dataclass(frozen=True, slots=True)
class Cut:
    """Some rows or columns of a parameter.

    Attributes:
        axis: Of the parameter.
        start: The first of them.
        size: How many.
        step: From each to the next; more than 1 where blocks take turns.
        head: Length of each of the equal matrices that they are cut into, which then are a stack; 0: they are not cut.
    """

    axis: int
    start: int
    size: int
    step: int = 1
    head: int = 0

    def range(self, stored: Box) -> tuple[int, int]:
        """Which of its rows or columns a rank has that stores ``stored``: the first and the number."""
        at, size = stored.offsets[self.axis], stored.sizes[self.axis]
        first, end = (min(self.size, max(0, -(-(place - self.start) // self.step))) for place in (at, at + size))
        return first, (end - first if stored.numel else 0)

    def splits(self, stored: Box) -> bool:
        """Whether a rank that stores ``stored`` has some but not all of the length of a head."""
        first, size = self.range(stored)
        return bool(self.head) and bool(first % self.head or size % self.head) and size > 0

    def box(self, stored: Box) -> Box:
        """What a rank that stores ``stored`` has of the block, in coordinates of the block."""
        first, size = self.range(stored)
        offsets, sizes = list(stored.offsets), list(stored.sizes)
        offsets[self.axis], sizes[self.axis] = (first if size else 0), size
        if not self.head:
            return Box(tuple(offsets), tuple(sizes))
        count, other = size // self.head, 1 - self.axis
        # heads are counted by a new first axis, and within each of them the order of axes stays
        inner = {self.axis: (0, self.head if size else 0), other: (offsets[other], sizes[other])}
        places, lengths = zip(inner[0], inner[1], strict=True)
        return Box((offsets[self.axis] // self.head, *places), (count, *lengths))

    def index(self, stored: Box) -> tuple[slice, ...]:
        """Where that is in a tensor that holds ``stored``."""
        first, size = self.range(stored)
        start = self.start + self.step * first - stored.offsets[self.axis] if size else 0
        along = slice(start, start + self.step * (size - 1) + 1 if size else 0, self.step)
        return (*(slice(None),) * self.axis, along)


@dataclass(frozen=True)
class Block:
    """A part of a parameter that is read as a stack of equal matrices.

    Attributes:
        matrices: Under a name that tells it from the other blocks, such as ``"attn.weight[0:768]"``.
        shape: Of the block.
        cut: What it is of the parameter; None: all.
    """

    matrices: MatrixSpec
    shape: tuple[int, ...]
    cut: Cut | None = None

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts matrices."""
        return self.matrices.stacked_in(self.shape)


def blocks_of(name: str, shape: Sequence[int], reading: Reading) -> tuple[Block, ...]:
    """Take a parameter apart.

    Args:
        name: Of the parameter.
        shape: Its global shape.
        reading: What its axes mean.

    Returns:
        Blocks that hold every element once, in the order in which they are stored. Heads of a parameter of two axes
        are one stack for each block of ``split_sizes``.

    Raises:
        ValueError: for a shape that does not fit the reading; names the parameter, what it has and what was wanted.
    """
    dims, whole = tuple(shape), _whole(name, shape, reading)
    if reading.split_sizes is None and reading.num_heads is None:
        return (Block(whole, dims),)
    along_rows = reading.split_axis == "rows"
    if reading.flatten and not along_rows:
        raise ValueError(
            f"parameter {name!r} of shape {dims} has flatten=True and split_axis='cols', and its columns are input "
            "channels times kernel, which have no blocks: take split_axis='rows', or leave it whole."
        )
    row_axis = _row_axis(dims, reading)
    axis = row_axis + int(along_rows == reading.transposed)
    sizes = reading.split_sizes or (dims[axis],)
    if sum(sizes) != dims[axis]:
        what = "output" if along_rows else "input"
        raise ValueError(
            f"parameter {name!r} of shape {dims} has {dims[axis]} {what} features (axis {axis}) and split_sizes="
            f"{sizes}, which sum to {sum(sizes)}: give sizes that sum to {dims[axis]}."
        )
    return tuple(_blocks(whole, dims, row_axis, axis, sizes, reading))


def row_blocks(name: str, shape: Sequence[int], reading: Reading, count: int) -> tuple[Block, ...]:
    """Take a parameter apart into parts of its rows, as MuonBP does between whole steps (arXiv 2510.16981).

    The output features of the parameter are cut into ``count`` parts as :func:`torch.chunk` and FSDP2 cut an axis, and
    each matrix wherever it reaches from one part into the next. So a block lies in one part, and in one matrix.

    Args:
        name: Of the parameter.
        shape: Its global shape.
        reading: What its axes mean.
        count: How many parts.

    Returns:
        Blocks that hold every element once; equal ones of a parameter of two axes may be one stack.

    Raises:
        ValueError: as :func:`blocks_of`; for matrices that are blocks of columns, and blocks of a single row that was
            cut off; names the parameter.
    """
    dims, matrices = tuple(shape), blocks_of(name, shape, reading)
    axis = _row_axis(dims, reading) + int(reading.transposed)
    if any(block.cut is not None and block.cut.axis != axis for block in matrices):
        raise ValueError(
            f"parameter {name!r} of shape {dims} has matrices side by side (split_axis='cols'), and block_period cuts "
            "rows: read it whole (matrices={glob: 'whole'}), or give it a group with block_period=1."
        )
    size = dims[axis]
    strips = [_strip(dims, axis, *chunk(size, part, count)) for part in range(count)]
    cuts = []
    for cut in [block.cut or Cut(axis, 0, size) for block in matrices]:
        pieces = list(_pieces(cut, strips))
        if len(dims) == 2 and not cut.head and cut.size == size and size % count == 0:
            pieces = [Cut(axis, 0, size, head=size // count)]
        cuts += pieces
        for piece in pieces:
            if (piece.head or piece.size) == 1 < (cut.head or cut.size):
                raise ValueError(
                    f"parameter {name!r} of shape {dims} has {size} output features, and blocks={count} leaves "
                    f"feature {piece.start} alone in a block: pass fewer blocks, or give it a group with "
                    "block_period=1."
                )
    whole = _whole(name, dims, reading)
    return tuple(_block(whole, dims, _row_axis(dims, reading), cut) for cut in cuts)


def _strip(dims: tuple[int, ...], axis: int, start: int, length: int) -> Box:
    """Some of one axis of a parameter, and all of the others."""
    offsets, sizes = [0] * len(dims), list(dims)
    offsets[axis], sizes[axis] = start, length
    return Box(tuple(offsets), tuple(sizes))


def _pieces(cut: Cut, strips: Sequence[Box]) -> Iterator[Cut]:
    """A matrix, or a stack of heads, cut where it reaches from one strip into the next."""
    if any(cut.splits(strip) for strip in strips):
        for start in range(cut.start, cut.start + cut.size, cut.head):
            yield from _pieces(Cut(cut.axis, start, cut.head), strips)
        return
    for strip in strips:
        first, size = cut.range(strip)
        if size:
            yield dataclasses.replace(cut, start=cut.start + cut.step * first, size=size)


def _whole(name: str, shape: Sequence[int], reading: Reading) -> MatrixSpec:
    """A parameter before it is taken apart."""
    whole = matrix_spec(name, tuple(shape), flatten=reading.flatten)
    return dataclasses.replace(whole, transposed=True) if reading.transposed else whole


def _row_axis(dims: tuple[int, ...], reading: Reading) -> int:
    """The axis of the rows of matrices as they are stored."""
    return int(len(dims) == 3 and not reading.flatten)


def _blocks(
    whole: MatrixSpec, dims: tuple[int, ...], row_axis: int, axis: int, sizes: Sequence[int], reading: Reading
) -> Iterator[Block]:
    start = 0
    for number, size in enumerate(sizes):
        heads = reading.heads_of(number)
        if heads and size % heads:
            raise ValueError(
                f"parameter {whole.parameter!r} of shape {dims} has num_heads={heads} for {size} features along axis "
                f"{axis}, which it does not divide: give a divisor of {size}."
            )
        length = size // heads if heads else size
        if reading.interleaved:
            cuts = [Cut(axis, number, size, len(sizes))]
        elif heads and len(dims) == 2:
            cuts = [Cut(axis, start, size, head=length)]
        else:
            cuts = [Cut(axis, at, length) for at in range(start, start + size, length)]
        for cut in cuts:
            yield _block(whole, dims, row_axis, cut)
        start += size


def _block(whole: MatrixSpec, dims: tuple[int, ...], row_axis: int, cut: Cut) -> Block:
    shape = list(dims)
    shape[cut.axis] = cut.head or cut.size
    along_rows = cut.axis == row_axis
    heads = cut.size // cut.head if cut.head else 0
    along = f"{cut.start}:{cut.start + cut.size}" if cut.step == 1 else f"{cut.start}::{cut.step}"
    places = (*(":" for _ in range(cut.axis)), along)
    matrices = dataclasses.replace(
        whole,
        parameter=f"{whole.parameter}[{', '.join(places)}]",
        count=heads or whole.count,
        rows=shape[cut.axis] if along_rows else whole.rows,
        cols=whole.cols if along_rows else shape[cut.axis],
    )
    return Block(matrices, (heads, *shape) if heads else tuple(shape), cut)


def heads_apart(name: str, block: Block) -> Iterator[Block]:
    """The matrices of a block that is a stack of heads, each as a block of its own.

    Args:
        name: Of the parameter.
        block: One of :func:`blocks_of`.
    """
    cut, matrices = block.cut, block.matrices
    assert cut is not None and cut.head
    whole = MatrixSpec(name, 1, matrices.rows, matrices.cols, matrices.transposed)
    dims = block.shape[1:]
    for start in range(cut.start, cut.start + cut.size, cut.head):
        yield _block(whole, dims, 0, Cut(cut.axis, start, cut.head))


class Placing:
    """Finds out who stores what of blocks, once for the many parameters that are stored and cut alike."""

    def __init__(self) -> None:
        self._clipped: dict[tuple[Layout, Cut], tuple[Holding, ...]] = {}
        self._split: dict[tuple[Layout, Cut], bool] = {}

    def place(
        self, name: str, blocks: Sequence[Block], holdings: tuple[Holding, ...]
    ) -> Iterator[tuple[int, Block, tuple[Holding, ...]]]:
        """Blocks as they can be planned: a stack of heads is one block only where no rank stores part of a head.

        Args:
            name: Of the parameter.
            blocks: Of :func:`blocks_of`.
            holdings: Who stores what of the parameter.

        Returns:
            The number of the block, the block or one head of it, and who stores what of that.
        """
        layout = layout_of(holdings)
        for number, block in enumerate(blocks):
            if block.cut is None:
                yield number, block, holdings
                continue
            apart = heads_apart(name, block) if self._splits(layout, block.cut) else [block]
            for piece in apart:
                assert piece.cut is not None
                yield number, piece, self._clip(layout, piece.cut)

    def _splits(self, layout: Layout, cut: Cut) -> bool:
        key = layout, cut
        if key not in self._split:
            self._split[key] = any(cut.splits(holding.box) for holding in layout.holdings)
        return self._split[key]

    def _clip(self, layout: Layout, cut: Cut) -> tuple[Holding, ...]:
        key = layout, cut
        if key not in self._clipped:
            self._clipped[key] = tuple(
                Holding(holding.rank, cut.box(holding.box), holding.replica) for holding in layout.holdings
            )
        return self._clipped[key]
