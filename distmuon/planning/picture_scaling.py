"""Makespan over ideal by number of ranks: this plan, single owners, round robin."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from distmuon.planning.compare import Scaling
from distmuon.planning.figures import Prediction

_LINES = (
    ("round_robin", "round robin (dion)", "#bab0ac", "s"),
    ("single", "single owners, longest first", "#4c78a8", "o"),
    ("planned", "this plan", "#e45756", "D"),
)


def draw_scaling(axes: Axes, prediction: Prediction, scaling: Sequence[Scaling]) -> None:
    """Draw the curves.

    Args:
        axes: To draw on.
        prediction: Whose number of ranks is marked.
        scaling: Points of the curves, by ascending number of ranks.
    """
    ranks = [point.ranks for point in scaling]
    for key, label, color, marker in _LINES:
        if key == "planned" and prediction.setup.teams:
            label += ", with teams"
        axes.plot(ranks, [getattr(point, key) for point in scaling], marker=marker, color=color, label=label)
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1)
    world = len(prediction.ranks)
    # in the legend, as text beside it would lie on a curve of one model or another
    axes.axvline(world, color="black", linestyle=":", linewidth=1, label=f"{world:,} ranks")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ranks, [f"{rank}" for rank in ranks], minor=False)
    highest = max(getattr(point, key) for point in scaling for key, *_ in _LINES)
    ticks = [tick for tick in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if tick <= 1.3 * highest]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(0.93, max(1.3, 1.25 * highest))
    axes.set_title("Busiest rank over an even share (1: perfect)", loc="left", fontsize=11)
    axes.set_xlabel("ranks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
