"""Between the host, where CPU offload keeps parameters and momentum, and the device where matrices are multiplied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from distmuon.comm.buffers import BufferPool

Pairs: TypeAlias = "Sequence[tuple[Tensor, Tensor]]"

_HOST = torch.device("cpu")


class Mark(Protocol):
    """The end of some copies."""

    @property
    def passed(self) -> bool:
        """Whether they have ended; asks without waiting."""

    def join(self) -> None:
        """Let what the device is given from here on come after them."""

    def wait(self) -> None:
        """Let the host wait for them."""


class Lane(Protocol):
    """Copies one after another, beside what the device computes."""

    def copy(self, pairs: Pairs) -> Mark:
        """Begin to copy each source to its target, once the device has done what it was given up to here."""

    def inside(self) -> AbstractContextManager[Any]:
        """What the device is given inside comes after the copies of this lane, and waits for nothing else."""


class StreamLane:
    """A stream of an accelerator.

    Args:
        device: The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def copy(self, pairs: Pairs) -> Mark:
        """Begin to copy; what lies on the host is pinned, or the host waits."""
        # the current stream writes what is copied from, and may still use memory that it freed for the targets
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self.inside():
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        return _StreamMark(self._device, self._stream.record_event())

    def inside(self) -> AbstractContextManager[Any]:
        """Make the stream the current one."""
        context: AbstractContextManager[Any] = self._module.stream(self._stream)
        return context


@dataclass(frozen=True)
class _StreamMark:
    """An event behind the copies."""

    device: torch.device
    event: Any

    @property
    def passed(self) -> bool:
        return bool(self.event.query())

    def join(self) -> None:
        torch.get_device_module(self.device).current_stream(self.device).wait_event(self.event)

    def wait(self) -> None:
        self.event.synchronize()


@dataclass(frozen=True)
class Arrival:
    """Updates on their way to the host.

    Attributes:
        sent: What they are copied from; held until the copy has ended.
        mark: The end of the copy.
    """

    host: Tensor
    sent: Tensor
    mark: Mark

    def wait(self) -> Tensor:
        """The updates, 1-D on the host, to be handed to :meth:`Staging.give` afterwards."""
        self.mark.wait()
        return self.host


@dataclass
class Staging:
    """Lends packed buffers on the host, and copies a whole one at a time between host and device.

    One lane goes each way, so that copies overlap each other and the products of the wave before.

    Attributes:
        up: To the device. The exchange that sends what was copied starts inside.
        down: To the host. The exchange that brings what is copied is waited for inside, so that the host does not wait
            for the products that the device was given meanwhile.
        pool: Buffers on the host: pinned, or the copies would make the host wait.
    """

    up: Lane
    down: Lane
    pool: BufferPool
    _rising: deque[tuple[Tensor, Mark]] = field(default_factory=deque)

    @classmethod
    def of(cls, device: torch.device) -> Staging:
        """For an accelerator."""
        return cls(StreamLane(device), StreamLane(device), BufferPool(pinned=True))

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A 1-D buffer on the host, uninitialized."""
        # one that is still copied from must not be written
        while self._rising and self._rising[0][1].passed:
            self.pool.give(self._rising.popleft()[0])
        return self.pool.take(numel, dtype, _HOST)

    def lift(self, pairs: Pairs) -> Mark:
        """Begin to copy packed buffers, which go back by themselves, to those of the same size on the device.

        Args:
            pairs: A buffer from :meth:`take`, and its target.

        Returns:
            Where the copies end: what reads the targets outside of the lane joins it first.
        """
        mark = self.up.copy(pairs)
        self._rising.extend((source, mark) for source, _ in pairs)
        return mark

    def lower(self, sent: Tensor) -> Arrival:
        """Begin to copy a packed buffer of the device, which nobody writes before the copy ends, to the host."""
        host = self.take(sent.numel(), sent.dtype)
        return Arrival(host, sent, self.down.copy([(sent, host)]))

    def give(self, host: Tensor) -> None:
        """Take back a buffer that no copy uses any more."""
        self.pool.give(host)

    def clear(self) -> None:
        """Drop everything: after an error, a buffer may still be written by a copy under way."""
        self._rising.clear()
        self.pool.clear()
