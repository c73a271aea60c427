"""Ranks that do the same, taken together: thousands of ranks are a few classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.planning.figures import Owned, RankFigures


@dataclass(frozen=True)
class RankClass:
    """Ranks that own as many matrices of each kind.

    Attributes:
        members: Their figures, by rank.
    """

    members: tuple[RankFigures, ...]

    @property
    def owned(self) -> tuple[tuple[Owned, int], ...]:
        """What each of them orthogonalizes."""
        return self.members[0].owned

    def worst(self, key: str) -> float:
        """The largest of a figure over the members."""
        return max(getattr(member, key) for member in self.members)

    def label(self) -> str:
        """Their number and first ranks."""
        ranks = [member.rank for member in self.members]
        if len(ranks) > 1 and ranks == list(range(ranks[0], ranks[0] + len(ranks))):
            return f"{ranks[0]}-{ranks[-1]}"
        shown = ", ".join(map(str, ranks[:3]))
        return shown if len(ranks) <= 3 else f"{shown}, ... ({len(ranks)})"


def classes(ranks: Sequence[RankFigures]) -> list[RankClass]:
    """The classes of the ranks, busiest first."""
    members: dict[tuple[tuple[Owned, int], ...], list[RankFigures]] = {}
    for figures in ranks:
        members.setdefault(figures.owned, []).append(figures)
    found = [RankClass(tuple(those)) for those in members.values()]
    return sorted(found, key=lambda these: (-round(these.members[0].ns, 9), these.members[0].rank))


def shown_ranks(ranks: Sequence[RankFigures], most: int = 16) -> list[int]:
    """At most ``most`` ranks that stand for all.

    All if there are so few, else one of each class if there are so few, else the busiest, the idlest and those evenly
    between.
    """
    if len(ranks) <= most:
        return [figures.rank for figures in ranks]
    kinds = classes(ranks)
    if len(kinds) <= most:
        return [these.members[0].rank for these in kinds]
    ordered = sorted(ranks, key=lambda figures: (-round(figures.ns, 9), figures.rank))
    last = len(ordered) - 1
    return [ordered[round(place * last / (most - 1))].rank for place in range(most)]
