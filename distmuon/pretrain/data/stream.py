"""One long sequence of tokens that lies in several arrays or files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from distmuon.pretrain.data.tokenizer import Tokens

_SCAN = 1 << 22  # tokens looked at together, so that a scan of mapped files stays small in memory


class TokenStream:
    """Consecutive 1-D arrays of tokens, read as if they were one.

    Args:
        parts: Arrays (or memory maps) of uint16 or uint32, in order; empty ones are dropped.
    """

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts: list[Tokens] = [part for part in parts if len(part)]
        sizes = [len(part) for part in self.parts]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._length = sum(sizes)

    def __len__(self) -> int:
        return self._length

    def slice(self, start: int, stop: int) -> Tokens:
        """Tokens ``start`` to ``stop`` (exclusive) as one 1-D array; a view where it lies in one part.

        Raises:
            IndexError: ``0 <= start <= stop <= len(self)`` does not hold.
        """
        if not 0 <= start <= stop <= self._length:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self._length}")
        pieces: list[Tokens] = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            part = self.parts[index]
            begin = int(self._ends[index]) - len(part)
            end = min(stop, begin + len(part))
            pieces.append(part[start - begin : end - begin])
            start, index = end, index + 1
        if not pieces:
            return np.empty(0, dtype=np.uint16)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def head(self, tokens: int) -> TokenStream:
        """The first ``tokens`` tokens (all of them if there are fewer), without a copy."""
        kept, left = [], tokens
        for part in self.parts:
            kept.append(part[:left])
            left -= len(kept[-1])
        return TokenStream(kept)

    @cached_property
    def largest(self) -> int:
        """The largest id in the stream, -1 if it is empty; read once, in chunks."""
        result = -1
        for part in self.parts:
            for start in range(0, len(part), _SCAN):
                result = max(result, int(part[start : start + _SCAN].max()))
        return result
