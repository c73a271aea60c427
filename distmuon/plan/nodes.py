"""Which ranks share a node, and which of them may own a matrix together."""

from __future__ import annotations

import functools
from typing import TypeAlias

Nodes: TypeAlias = tuple[tuple[int, ...], ...]
"""The ranks of each node, ascending; nodes by their lowest rank."""


def one_node(ranks: tuple[int, ...]) -> Nodes:
    """All ranks on one node: what is assumed where nothing else is known."""
    return (ranks,)


def node_of(nodes: Nodes) -> dict[int, int]:
    """The number of each rank's node."""
    return {rank: number for number, members in enumerate(nodes) for rank in members}


def largest(nodes: Nodes) -> int:
    """Ranks of the largest node; teams of up to so many stay inside a node."""
    return max(map(len, nodes))


@functools.lru_cache(maxsize=64)
def teams_of(nodes: Nodes, size: int) -> Nodes:
    """The teams of ``size`` ranks that there may be.

    Neighbours form teams, so that a rank is in one team of each size, always at the same place in it, and few process
    groups are needed. Ranks that are left over are in none.

    Args:
        nodes: The nodes.
        size: Ranks of a team. No larger than a node, teams stay inside one; else they cross nodes.
    """
    rows = nodes if size <= largest(nodes) else (tuple(rank for members in nodes for rank in members),)
    return tuple(
        # ascending, as the ranks of a process group are: those of several nodes may be dealt out in turn
        tuple(sorted(members[start : start + size]))
        for members in rows
        for start in range(0, len(members) - size + 1, size)
    )
