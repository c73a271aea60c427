"""What other ways to choose owners give, and what no plan can beat."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distmuon.plan.parameters import ParameterSpec


@dataclass(frozen=True)
class LowerBound:
    """What no plan can beat, in the unit of :attr:`ParameterSpec.cost`.

    Attributes:
        ideal: The time of single owners together, over the number of ranks.
        longest: The least time of the matrix that takes longest, on the largest useful team.
    """

    ideal: float
    longest: int

    @property
    def least(self) -> float:
        """The larger of the two."""
        return max(self.ideal, self.longest)


def lower_bound(specs: Sequence[ParameterSpec], ranks: Sequence[int]) -> LowerBound:
    """Bounds of the makespan of any plan; teams do more work than single owners, so ``ideal`` holds for them too.

    Args:
        specs: The parameters.
        ranks: The ranks of the plan.
    """
    total = sum(spec.matrices.count * spec.cost for spec in specs)
    # a team cannot have ranks that do not share the parameter
    longest = max((min([s.cost, *(t.cost for t in s.teams if t.size <= len(s.holdings))]) for s in specs), default=0)
    return LowerBound(total / len(ranks), longest)


def round_robin(specs: Sequence[ParameterSpec], ranks: Sequence[int]) -> dict[int, int]:
    """Load by rank when matrices of each shape are dealt out from the first rank on, as microsoft/dion does.

    Args:
        specs: The parameters.
        ranks: Who owns; whatever a rank stores.
    """
    loads = dict.fromkeys(ranks, 0)
    dealt: Counter[tuple[int, int, int]] = Counter()
    for spec in specs:
        key = spec.matrices.rows, spec.matrices.cols, spec.cost
        for _ in range(spec.matrices.count):
            loads[ranks[dealt[key] % len(ranks)]] += spec.cost
            dealt[key] += 1
    return loads


def longest_first(specs: Sequence[ParameterSpec], ranks: Sequence[int]) -> dict[int, int]:
    """Load by rank when the costliest matrix left goes to the rank with the least load, without teams."""
    return _greedy(sorted(((cost, cost) for cost, _ in _matrices(specs)), reverse=True), ranks)


def largest_first(specs: Sequence[ParameterSpec], ranks: Sequence[int]) -> dict[int, int]:
    """Load by rank when the largest matrix left goes to the rank with the fewest elements, without teams."""
    return _greedy(sorted(((numel, cost) for cost, numel in _matrices(specs)), reverse=True), ranks)


def _matrices(specs: Sequence[ParameterSpec]) -> Iterator[tuple[int, int]]:
    """Cost and elements of each matrix."""
    for spec in specs:
        for _ in range(spec.matrices.count):
            yield spec.cost, spec.matrix_numel


def _greedy(weighed: Sequence[tuple[int, int]], ranks: Sequence[int]) -> dict[int, int]:
    """Load by rank when each matrix, of ``(weight, cost)``, goes to the rank of the least weight so far."""
    loads = dict.fromkeys(ranks, 0)
    heap = [(0, place) for place in range(len(ranks))]
    for weight, cost in weighed:
        total, place = heap[0]
        heapq.heapreplace(heap, (total + weight, place))
        loads[ranks[place]] += cost
    return loads
