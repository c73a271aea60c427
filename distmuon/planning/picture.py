"""The picture of a plan: what ranks do when, how much each has to do, and how that scales."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from distmuon.planning.advice import Advice
from distmuon.planning.compare import Scaling
from distmuon.planning.figures import Prediction
from distmuon.planning.picture_gantt import draw_gantt
from distmuon.planning.picture_loads import draw_loads
from distmuon.planning.picture_scaling import draw_scaling
from distmuon.planning.story import title

_DPI = 110


def draw(prediction: Prediction, scaling: Sequence[Scaling], path: pathlib.Path, advice: Advice | None = None) -> None:
    """Write a PNG with a Gantt chart of some ranks, the loads of all, and the scaling curve.

    Args:
        prediction: With spans of the ranks to show.
        scaling: Of the same setup on other numbers of ranks.
        path: The file.
        advice: What would be faster, for the title.

    Raises:
        OSError: if it cannot be written.
    """
    shown = len({span.rank for span in prediction.spans})
    figure = Figure(figsize=(14, 5.2 + 0.27 * shown), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.2 + 0.27 * shown, 3.6), width_ratios=(1.5, 1))
    figure.suptitle(title(prediction, advice), fontsize=12, fontweight="bold", x=0.01, ha="left")
    draw_gantt(figure.add_subplot(grid[0, :]), prediction)
    draw_loads(figure.add_subplot(grid[1, 0]), prediction)
    draw_scaling(figure.add_subplot(grid[1, 1]), prediction, scaling)
    figure.savefig(path, dpi=_DPI, format="png")
