"""Which matrices are orthogonalized together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from distmuon.plan.matrices import MatrixSpec


@dataclass(frozen=True)
class Bucket:
    """Parameters whose matrices have one shape and go through the step together.

    Attributes:
        members: Their places in the sequence that was planned.
        specs: Their matrices, in the same order.
    """

    members: tuple[int, ...]
    specs: tuple[MatrixSpec, ...]

    @property
    def rows(self) -> int:
        """Rows of every matrix of the bucket."""
        return self.specs[0].rows

    @property
    def cols(self) -> int:
        """Columns of every matrix of the bucket."""
        return self.specs[0].cols

    @property
    def numel(self) -> int:
        """Elements of the bucket."""
        return sum(spec.numel for spec in self.specs)


@dataclass(frozen=True)
class Plan:
    """The buckets of one parameter group, in the order in which they are run."""

    buckets: tuple[Bucket, ...]


def build_plan(specs: Sequence[MatrixSpec], *, kinds: Sequence[Hashable], bucket_numel: int) -> Plan:
    """Put matrices of equal shape together, in the order of their first member.

    A pure function of its arguments.

    Args:
        specs: One per parameter.
        kinds: What must be equal inside a bucket beside the shape, such as device and dtype.
        bucket_numel: Most elements of a bucket; a single parameter may exceed it.

    Returns:
        Buckets that hold every parameter exactly once.
    """
    by_shape: dict[tuple[int, int, Hashable], list[int]] = {}
    for index, (spec, kind) in enumerate(zip(specs, kinds, strict=True)):
        by_shape.setdefault((spec.rows, spec.cols, kind), []).append(index)
    buckets: list[Bucket] = []
    for members in by_shape.values():
        open_members: list[int] = []
        filled = 0
        for index in members:
            if open_members and filled + specs[index].numel > bucket_numel:
                buckets.append(_bucket(specs, open_members))
                open_members, filled = [], 0
            open_members.append(index)
            filled += specs[index].numel
        buckets.append(_bucket(specs, open_members))
    return Plan(tuple(buckets))


def _bucket(specs: Sequence[MatrixSpec], members: Sequence[int]) -> Bucket:
    return Bucket(tuple(members), tuple(specs[index] for index in members))
