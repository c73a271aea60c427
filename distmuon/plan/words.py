"""Blocks in words, for reports."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from distmuon.plan.blocks import Block
from distmuon.plan.matrices import MatrixSpec
from distmuon.plan.reading import Reading

# More blocks than this are told by what repeats
_SHOWN = 4


def describe(blocks: Sequence[Block], reading: Reading, labels: Sequence[str] = ()) -> str:
    """What a parameter is taken apart into, as output x input features: ``"768 + 256 + 256 x 768 (rows: q | k | v)"``.

    Args:
        blocks: All blocks of the parameter.
        reading: What they were made by.
        labels: What the blocks are called; where blocks repeat, those of one repetition.
    """
    first = blocks[0].matrices
    notes = ["stored transposed"] if reading.transposed else []
    if blocks[0].cut is None:
        return f"{first} ({notes[0]})" if notes else str(first)
    along_rows = reading.split_axis == "rows"
    other = first.logical[1] if along_rows else first.logical[0]
    sizes = reading.split_sizes or (sum(block.cut.size for block in blocks if block.cut is not None),)
    heads = [reading.heads_of(number) for number in range(len(sizes))]
    lengths = [size // count if count else size for size, count in zip(sizes, heads, strict=True)]
    times, sizes = _repeated(sizes, len(labels)) if not any(heads) else (1, sizes)
    if all(heads) and len(set(lengths)) == 1:
        shape = f"{lengths[0]} x {other}" if along_rows else f"{other} x {lengths[0]}"
        text = f"{' + '.join(map(str, heads))} heads of {shape}"
    else:
        parts = [f"{h} heads of {n}" if h else str(n) for h, n in zip(heads, lengths[: len(sizes)], strict=False)]
        joined = " + ".join(parts)
        if times > 1:
            joined = f"{times} times ({joined})"
        elif not along_rows and len(parts) > 1:
            joined = f"({joined})"
        text = f"{joined} x {other}" if along_rows else f"{other} x {joined}"
    if len(blocks[0].shape) == 3 and not blocks[0].cut.head and not reading.flatten:
        text = f"{first.count} of {text}"
    axis = "rows" if along_rows else "columns"
    if labels and len(labels) == len(sizes):
        axis += f": {' | '.join(labels)}"
    if reading.interleaved:
        axis += ", taking turns"
    return f"{text} ({'; '.join([axis, *notes])})"


def count_blocks(blocks: Sequence[Block]) -> str:
    """How many blocks there are of each shape: ``"3 of 64 x 768 + 58 x 768"``."""
    counts: Counter[MatrixSpec] = Counter()
    for block in blocks:
        counts[block.matrices.alike] += block.matrices.count
    return " + ".join(str(dataclasses.replace(spec, count=count)) for spec, count in counts.items())


def _repeated(sizes: tuple[int, ...], labels: int) -> tuple[int, tuple[int, ...]]:
    """How often which sizes repeat, where there are too many to list; as many as there are labels, if any."""
    count = len(sizes)
    if count > _SHOWN:
        for period in range(labels or 1, count // 2 + 1):
            if count % period == 0 and sizes == sizes[:period] * (count // period):
                return count // period, sizes[:period]
    return 1, sizes
