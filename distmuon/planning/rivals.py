"""What other ways of choosing owners would take: whole matrices, wherever they are stored."""

from __future__ import annotations

from collections.abc import Sequence

from distmuon.plan.baselines import largest_first, longest_first, round_robin
from distmuon.plan.parameters import ParameterSpec
from distmuon.planning.figures import Rival

ROUND_ROBIN = "round robin, shape by shape (dion)"
BY_ELEMENTS = "largest first, by elements"
BY_COST = "longest first, by cost"


def rivals_of(specs: Sequence[ParameterSpec], ranks: Sequence[int]) -> tuple[Rival, ...]:
    """The makespan of each way, seconds."""
    return (
        Rival(ROUND_ROBIN, 1e-9 * max(round_robin(specs, ranks).values())),
        Rival(BY_ELEMENTS, 1e-9 * max(largest_first(specs, ranks).values())),
        Rival(BY_COST, 1e-9 * max(longest_first(specs, ranks).values())),
    )
