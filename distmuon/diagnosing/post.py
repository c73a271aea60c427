"""Messages between ranks through a store, which works where their collectives do not.

Every rank posts what it saw, rank 0 collects as much as comes in time, and says what is done next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeAlias

import torch.distributed as dist

Store: TypeAlias = "dist.Store"  # type: ignore[name-defined]  # torch's stubs leave it out

_POLL_S = 0.02
# Ranks that gave up at the same moment say so a little later
_SLACK_S = 5.0


class SilenceError(RuntimeError):
    """Rank 0 does not say what is next, told in one sentence."""


class Post:
    """The messages of one rank.

    Args:
        store: Of this job alone.
        rank: Which this is.
        size: How many there are.
        timeout_s: Seconds to wait for a message, after those that its sender may have waited.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._store, self._rank, self._size, self._timeout_s = store, rank, size, timeout_s

    def send(self, topic: str, value: Any) -> None:
        """Post a value that JSON can hold, for rank 0."""
        self._store.set(f"{topic}/{self._rank}", json.dumps(value))

    def collect(self, topic: str, ranks: Iterable[int] | None = None, timeout_s: float | None = None) -> dict[int, Any]:
        """Rank 0's part: what ranks have posted; those that post nothing in time are left out.

        Args:
            topic: As they send it.
            ranks: Which are waited for; None: all.
            timeout_s: How long; None: as long as they may wait for one another, and a little longer.
        """
        missing = list(range(self._size) if ranks is None else ranks)
        deadline = time.monotonic() + (self._timeout_s + _SLACK_S if timeout_s is None else timeout_s)
        found: dict[int, Any] = {}
        while missing:
            for rank in missing:
                if self._store.check([f"{topic}/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"{topic}/{rank}"))
            missing = [rank for rank in missing if rank not in found]
            if time.monotonic() > deadline:
                break
            if missing:
                time.sleep(_POLL_S)
        return dict(sorted(found.items()))

    def decide(self, topic: str, value: Callable[[], Any]) -> Any:
        """Give what rank 0 says to all.

        Args:
            topic: The same on all ranks.
            value: Asked on rank 0 alone.

        Raises:
            SilenceError: if it says nothing.
        """
        key = f"{topic}/decided"
        if self._rank == 0:
            decided = value()
            self._store.set(key, json.dumps(decided))
            return decided
        # rank 0 may itself have waited for others, twice
        patience = 3 * (self._timeout_s + _SLACK_S)
        try:
            # the store wakes all that wait; a thousand that asked again and again would keep it busy
            self._store.wait([key], timedelta(seconds=patience))
            return json.loads(self._store.get(key))
        except dist.DistNetworkError as error:
            raise SilenceError(
                f"rank {self._rank}: the store is gone, which lives with rank 0 or its machine: look there first."
            ) from error
        except RuntimeError as error:  # of a wait that was too long; its type depends on the store
            raise SilenceError(
                f"rank {self._rank}: rank 0 has been silent for {patience:.0f} s: look there first."
            ) from error
