"""Packed buffers between ranks: how shards reach their owner and updates come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.comm.group import all_gather
from distmuon.comm.waiting import Wait, waiting
from distmuon.comm.watch import Watch, watch_of
from distmuon.plan.routes import Leg


@dataclass
class Transfer:
    """An exchange under way. Its buffers are held here until it is waited for.

    Attributes:
        send: What leaves, 1-D.
        receive: What arrives, 1-D; not to be read before :meth:`wait`.
        group: Whose ranks move it.
        work: What is under way; None if there is nothing to wait for.
        watch: Looks after it where the host does not wait.
    """

    send: Tensor
    receive: Tensor
    group: dist.ProcessGroup | None = None
    work: dist.Work | None = None
    watch: Watch | None = None

    def wait(self, what: str | Callable[[], str]) -> None:
        """Until ``receive`` is filled and ``send`` free: the host on a CPU, the current stream elsewhere.

        Args:
            what: What is moved, for an error: see :func:`distmuon.comm.waiting.waiting`.

        Raises:
            RuntimeError: if it does not come.
        """
        if self.work is not None and self.group is not None:
            with waiting(self.group, what):
                self.work.wait()
            if self.watch is not None:
                self.watch.add(Wait(self.group, what, self.work))
            self.work = None


class Exchange(Protocol):
    """Moves packed buffers."""

    def start(self, leg: Leg, send: Tensor, receive: Tensor) -> Transfer:
        """Begin to move ``send``; every rank of the plan calls this for the same leg at the same point."""


class LocalExchange:
    """The exchange of a single rank: there is nobody to talk to."""

    def start(self, leg: Leg, send: Tensor, receive: Tensor) -> Transfer:
        """Nothing is moved."""
        assert leg.send_numel == leg.receive_numel == 0, "a plan of one rank moves nothing"
        return Transfer(send, receive)


class GroupExchange:
    """The exchange of a process group: one collective a leg.

    Args:
        group: Whose ranks, ascending, are those of the plan.
        device: Where tensors of the group live.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._watch = group, watch_of(group, device)

    def start(self, leg: Leg, send: Tensor, receive: Tensor) -> Transfer:
        """Begin an all-to-all, or an all-gather where every rank sends the same to all."""
        if leg.gathered is not None:
            return Transfer(send, receive, self._group, all_gather(receive, send, self._group), self._watch)
        work = dist.all_to_all_single(
            receive, send, list(leg.receive_splits), list(leg.send_splits), group=self._group, async_op=True
        )
        return Transfer(send, receive, self._group, work, self._watch)
