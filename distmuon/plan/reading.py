"""What the axes of a parameter mean, as a user or a preset declares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Reading:
    """How a parameter is taken apart into matrices. Rows are output features and columns input features.

    Attributes:
        flatten: All axes after the first are joined to one, as of a convolution ``(out, in, *kernel)``.
        transposed: Stored as ``(in, out)``, so that rows run along the last axis.
        split_sizes: Lengths of the blocks that lie one after another; None: one block.
        num_heads: Equal matrices that each block is cut into; one number for all blocks, or one for each of which
            None leaves the block whole; None: no block is cut.
        split_axis: ``"rows"`` or ``"cols"``: which features blocks and heads divide.
        interleaved: The blocks do not lie one after another but take turns, feature by feature.

    Raises:
        ValueError: for values that mean nothing, in words that a caller begins with the name of what has them.
    """

    flatten: bool = False
    transposed: bool = False
    split_sizes: tuple[int, ...] | None = None
    num_heads: int | tuple[int | None, ...] | None = None
    split_axis: str = "rows"
    interleaved: bool = False

    def __post_init__(self) -> None:
        for key in ("flatten", "transposed", "interleaved"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"has {key}={getattr(self, key)!r}: it is True or False.")
        if self.split_axis not in ("rows", "cols"):
            raise ValueError(
                f"has split_axis={self.split_axis!r}: it is 'rows', the output features, or 'cols', the input features."
            )
        sizes, heads = self.split_sizes, self.num_heads
        if sizes is not None and not (isinstance(sizes, tuple) and sizes and all(map(_counts, sizes))):
            raise ValueError(f"has split_sizes={sizes!r}: it is a tuple of whole numbers of 1 or more, or None.")
        if isinstance(heads, tuple):
            blocks = len(sizes) if sizes is not None else 1
            if len(heads) != blocks or not all(count is None or _counts(count) for count in heads):
                raise ValueError(
                    f"has num_heads={heads!r}: it is one whole number, or one or None for each of {blocks} blocks."
                )
        elif heads is not None and not _counts(heads):
            raise ValueError(f"has num_heads={heads!r}: it is a whole number of 1 or more, a tuple of them, or None.")
        if self.flatten and self.transposed:
            raise ValueError("has flatten=True and transposed=True: a flattened parameter is (out, in * kernel).")
        if self.interleaved and (sizes is None or len(set(sizes)) > 1 or heads is not None):
            raise ValueError(
                f"has interleaved=True, split_sizes={sizes!r} and num_heads={heads!r}: blocks that take turns have "
                "equal split_sizes and no heads."
            )

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Reading:
        """From the keys of a parameter group, others among them; lists count as tuples.

        Raises:
            ValueError: as the class.
        """
        found: dict[str, Any] = {key: keys[key] for key in READING_KEYS if key in keys}
        for key, value in found.items():
            found[key] = tuple(value) if isinstance(value, list) else value
        return cls(**found)

    @property
    def keys(self) -> dict[str, Any]:
        """As keys of a parameter group."""
        return {key: getattr(self, key) for key in READING_KEYS}

    def heads_of(self, block: int) -> int:
        """How many equal matrices a block is cut into; 0: it is left whole."""
        heads = self.num_heads[block] if isinstance(self.num_heads, tuple) else self.num_heads
        return heads or 0


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


READING_KEYS = tuple(field.name for field in fields(Reading))
WHOLE = Reading()
"""One matrix, or a stack of them, as it is stored."""
