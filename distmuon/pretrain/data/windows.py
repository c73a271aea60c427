"""Cut a token stream into samples without padding: each token is predicted once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distmuon.pretrain.data.stream import TokenStream
from distmuon.pretrain.errors import UserError

Batch = dict[str, torch.Tensor]


class Windows:
    """Windows of ``sequence_length + 1`` tokens that overlap by one, a dataset in PyTorch's sense.

    Window ``i`` reads tokens ``i * T`` to ``(i + 1) * T``, both included, so its T inputs and the T labels after
    them follow on the previous window's without gap or overlap. Fewer than T tokens at the end of the
    stream are left out.

    Args:
        stream: The tokens.
        sequence_length: T.

    Raises:
        UserError: The stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self._stream = stream
        self._length = sequence_length
        self._count = (len(stream) - 1) // sequence_length
        if self._count < 1:
            raise UserError(
                f"the data has {len(stream):,} tokens, but data.sequence_length {sequence_length} needs at "
                f"least {sequence_length + 1}; give more text or lower data.sequence_length."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        """One sample: ``input_ids`` and ``labels``, int64 of shape (1, T)."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch: ``input_ids`` and ``labels``, int64 of shape (b, T); labels are the inputs shifted by one."""
        rows = np.empty((len(indices), self._length + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            row[:] = self._stream.slice(index * self._length, (index + 1) * self._length + 1)
        tokens = torch.from_numpy(rows)
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
