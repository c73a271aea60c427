"""Grids of learning rates that grow until the best rate lies inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from lr_sweep_report import Curve

Key = TypeVar("Key")


def extend_grids(
    measure: Callable[[dict[Key, list[float]]], dict[Key, Curve]],
    grids: Mapping[Key, Sequence[float]],
    extensions: int,
) -> dict[Key, Curve]:
    """Measure all grids, and while the best rate of one is at its edge, that one with the next rate too.

    Args:
        measure: The curves of all grids; what it has measured before it remembers.
        grids: Rates, apart by factors of two.
        extensions: At most so many rates more.

    Returns:
        The curves, of which some are at the edge still if ``extensions`` did not do.
    """
    wanted = {key: sorted(grid) for key, grid in grids.items()}
    for extension in range(extensions + 1):
        curves = measure(wanted)
        edges = {key: curve.edge for key, curve in curves.items() if curve.edge is not None}
        if not edges or extension == extensions:
            return curves
        wanted = {key: sorted([*grid, edges[key]]) if key in edges else grid for key, grid in wanted.items()}
    raise AssertionError("the last extension returns")
