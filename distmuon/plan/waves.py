"""Which buckets are exchanged together: neighbours that other ranks own.

With about as many ranks as matrices, a rank owns something of one bucket and nothing of the next. One after another
their exchanges would use the links of some owners at a time; together they use all of them, and no rank holds more.
Where all ranks own something of every bucket, each is a wave of its own, so that one is orthogonalized while others are
on their way.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.plan.assign import Assignment
from distmuon.plan.buckets import Bucket

# Buckets are joined if the busiest owner of both has at most this share of what the busiest of each have together
_APART = 0.75
# Updates that leave or reach a rank in one exchange may take this many times what it may own of a bucket
_AT_ONCE = 8


@dataclass(frozen=True)
class Wave:
    """Buckets that travel together.

    Attributes:
        buckets: These, neighbours in the plan.
        first: Place of the first of them in the plan.
        legs: In how many exchanges updates come back.
    """

    buckets: tuple[Bucket, ...]
    first: int
    legs: int

    @functools.cached_property
    def assignments(self) -> tuple[Assignment, ...]:
        """All that is in it; a place among these is called a slot."""
        return tuple(assignment for bucket in self.buckets for assignment in bucket.assignments)

    @property
    def gathers(self) -> bool:
        """Whether anything has to be moved to its owner."""
        return any(bucket.gathers for bucket in self.buckets)

    @property
    def scatters(self) -> bool:
        """Whether any update has to be moved from its owner."""
        return any(bucket.scatters for bucket in self.buckets)

    @property
    def replicated(self) -> bool:
        """Whether every rank of the plan stores all of it."""
        return all(bucket.replicated for bucket in self.buckets)

    @property
    def returns(self) -> int:
        """Elements of updates that come back to a rank, at most."""
        return sum(bucket.returns for bucket in self.buckets)

    @property
    def sends(self) -> int:
        """Elements of updates that leave an owner, at most."""
        return _most_sent(self.buckets)

    def owned_numel(self) -> Counter[int]:
        """Elements by owner."""
        owned: Counter[int] = Counter()
        for bucket in self.buckets:
            owned.update(bucket.owned_numel())
        return owned


def waves_of(buckets: Sequence[Bucket], bucket_numel: int) -> tuple[Wave, ...]:
    """Join neighbours whose owners are others.

    Args:
        buckets: In the order in which they are run.
        bucket_numel: Most elements that one rank owns of a bucket; so much it may own of a wave.
    """
    waves: list[list[Bucket]] = []
    owned: Counter[int] = Counter()
    for bucket in buckets:
        own = bucket.owned_numel()
        both = owned + own
        alone = max(owned.values(), default=0), max(own.values(), default=0)
        together = max(both.values(), default=0)
        if (
            waves
            and waves[-1][-1].replicated == bucket.replicated
            and together <= _APART * sum(alone)
            and together <= max(bucket_numel, *alone)
        ):
            waves[-1].append(bucket)
            owned = both
        else:
            waves.append([bucket])
            owned = own
    found = []
    first = 0
    for members in waves:
        found.append(Wave(tuple(members), first, _legs(members, bucket_numel)))
        first += len(members)
    return tuple(found)


def _legs(members: Sequence[Bucket], bucket_numel: int) -> int:
    if not any(bucket.scatters for bucket in members):
        return 1
    # no more than there are rows, or columns, to send
    most = min(max(bucket.rows, bucket.cols) for bucket in members)
    numel = max(sum(bucket.returns for bucket in members), _most_sent(members))
    # where a companion alone comes back, nothing is counted
    return max(1, min(most, -(-numel // (_AT_ONCE * bucket_numel))))


def _most_sent(members: Sequence[Bucket]) -> int:
    sent: Counter[int] = Counter()
    for bucket in members:
        sent.update(dict(bucket.sends))
    return max(sent.values(), default=0)
