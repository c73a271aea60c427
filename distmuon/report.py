"""The routing table: what each parameter got, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distmuon.plan.plan import Plan


@dataclass(frozen=True)
class RoutingRow:
    """One parameter.

    Attributes:
        name: Its clean name.
        shape: Its global shape.
        matrices: What Muon reads it as, such as ``"8 of 768 x 512"``; empty for AdamW.
        algorithm: ``"muon"`` or ``"adamw"``.
        reason: Which rule decided.
        lr: The effective learning rate: that of the group times the scale of the matrix shape.
    """

    name: str
    shape: tuple[int, ...]
    matrices: str
    algorithm: str
    reason: str
    lr: float


@dataclass(frozen=True)
class RoutingReport:
    """Every parameter of an optimizer, in the order of its groups; ``str()`` is a table."""

    rows: tuple[RoutingRow, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = ("parameter", "shape", "matrices", "algorithm", "reason", "lr")
        cells = [header]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape)) or "scalar"
            cells.append((row.name, shape, row.matrices, row.algorithm, row.reason, f"{row.lr:.3g}"))
        widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([line.rstrip() for line in lines] + ["", self.summary, *self.notes])

    @property
    def summary(self) -> str:
        """One sentence: parameters and elements on each algorithm."""
        parts = []
        for algorithm in ("muon", "adamw"):
            rows = [row for row in self.rows if row.algorithm == algorithm]
            elements = sum(_numel(row.shape) for row in rows)
            parts.append(f"{algorithm}: {len(rows)} parameters, {elements:,} elements")
        return "; ".join(parts)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def plan_note(plan: Plan, dtype: torch.dtype) -> str:
    """Who does the work, and how much memory that takes for the while."""
    owned = max((max(bucket.owned_numel().values()) for bucket in plan.buckets), default=0) * dtype.itemsize
    if len(plan.ranks) == 1:
        return f"{len(plan.buckets)} buckets on one rank, at most {owned / 2**20:.1f} MiB of matrices each."
    return (
        f"{len(plan.buckets)} buckets over {len(plan.ranks)} ranks, load of the busiest {plan.imbalance:.3f} of the "
        f"mean; a rank owns at most {owned / 2**20:.1f} MiB of a bucket and buffers take at most five times that."
    )
