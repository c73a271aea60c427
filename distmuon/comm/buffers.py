"""Flat buffers that are used again."""

from __future__ import annotations

import torch
from torch import Tensor

# A kept buffer may be this many times as large as what is asked for
_SLACK = 1.25


class BufferPool:
    """Lends flat tensors.

    On a CPU a returned buffer is kept, since fresh memory of the system is slow to touch for the first time;
    elsewhere torch's caching allocator does that, and memory is free for activations between steps.

    Args:
        pinned: Whether memory of the host is pinned, so that an accelerator copies it while the host goes on.

    Attributes:
        lent: Bytes lent at present.
        peak: Most bytes lent at once.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._kept: list[Tensor] = []
        self._out: dict[int, Tensor] = {}
        self.lent = 0
        self.peak = 0

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized 1-D tensor of ``numel`` elements."""
        if numel == 0:
            return torch.empty(0, dtype=dtype, device=device)
        fitting = [
            buffer
            for buffer in self._kept
            if buffer.dtype == dtype and buffer.device == device and numel <= buffer.numel() <= _SLACK * numel
        ]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._drop(buffer)
        else:
            self._make_room(numel * dtype.itemsize)
            buffer = torch.empty(numel, dtype=dtype, device=device, pin_memory=self._pinned)
        self._out[buffer.data_ptr()] = buffer
        self.lent += buffer.nbytes
        self.peak = max(self.peak, self.lent)
        return buffer[:numel]

    def give(self, tensor: Tensor) -> None:
        """Take back what :meth:`take` lent; nobody may read it afterwards."""
        if tensor.numel() == 0:
            return
        buffer = self._out.pop(tensor.data_ptr())
        self.lent -= buffer.nbytes
        if buffer.device.type == "cpu":
            self._kept.append(buffer)

    def clear(self) -> None:
        """Drop everything: after an error, a buffer may still be written by a transfer under way."""
        self._kept.clear()
        self._out.clear()
        self.lent = 0

    def _make_room(self, new: int) -> None:
        """Drop kept buffers until all that are lent or kept take no more than was lent at once."""
        most = max(self.peak, self.lent + new)
        while self._kept and self.lent + new + sum(buffer.nbytes for buffer in self._kept) > most:
            self._drop(max(self._kept, key=lambda buffer: buffer.nbytes))

    def _drop(self, buffer: Tensor) -> None:
        self._kept = [other for other in self._kept if other is not buffer]
