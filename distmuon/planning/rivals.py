"""What other ways of choosing owners would take: whole matrices, wherever they are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from distmuon.plan.baselines import largest_first, longest_first
from distmuon.plan.parameters import ParameterSpec
from distmuon.planning.figures import Rival

ROUND_ROBIN = "round robin, shape by shape (dion)"
BY_ELEMENTS = "largest first, by elements"
BY_COST = "longest first, by cost"


def rivals_of(specs: Sequence[ParameterSpec], ranks: Sequence[int]) -> tuple[Rival, ...]:
    """The makespan of each way, seconds."""
    return (
        Rival(ROUND_ROBIN, 1e-9 * _shape_by_shape(specs, len(ranks))),
        Rival(BY_ELEMENTS, 1e-9 * max(largest_first(specs, ranks).values())),
        Rival(BY_COST, 1e-9 * max(longest_first(specs, ranks).values())),
    )


def _shape_by_shape(specs: Sequence[ParameterSpec], world: int) -> int:
    """Matrices of each shape are dealt out from rank 0 on, so that it is the busiest (microsoft/dion pads the rest)."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for spec in specs:
        counts[spec.matrices.rows, spec.matrices.cols, spec.cost] += spec.matrices.count
    return sum(-(-count // world) * cost for (_, _, cost), count in counts.items())
