"""The table of overlap.py, and the timelines of a step with and without overlap."""

from __future__ import annotations

import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import matplotlib
from rich.table import Table

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import Patch

_COLORS = {"exchange": "#4c78a8", "ns": "#e45756", "pack": "#b8a038", "wait": "#d9d9d9"}
_KINDS = {"unpack": "pack", "apply": "pack", "wire": "pack", "agree": "wait"}
_LEGEND = {
    "exchange": "exchange on its way",
    "ns": "Newton-Schulz",
    "pack": "pack, unpack, apply",
    "wait": "wait",
}


def make_table(summary: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """A row for each contender, in ms."""
    table = Table(title=title, title_justify="left")
    for head in ("", "buckets", "step ms", "Newton-Schulz", "exposed", "of it waited", "exposed / inf", "step / inf"):
        table.add_column(head, justify="left" if not head else "right")
    for name, row in summary.items():
        cells = [f"{row['buckets']:.0f}", *(f"{row[key]:.0f}" for key in ("step", "ns", "exposed", "wait"))]
        table.add_row(name, *cells, f"{row['ratio']:.2f}", f"{row['step_ratio']:.2f}")
    return table


def draw(
    spans: Sequence[Mapping[str, Sequence[tuple[str, float, float]]]],
    summary: Mapping[str, Mapping[str, float]],
    title: str,
    where: pathlib.Path,
) -> None:
    """One step of each contender, a row for each rank: its engine as a bar, its exchanges as a line above.

    Args:
        spans: Of each rank, by contender: name, begin and end in ms.
        summary: What the table shows.
        title: Of the picture.
        where: The file to write.
    """
    figure, panels = plt.subplots(len(summary), 1, figsize=(11, 2.3 * len(summary)), sharex=True)
    for axes, name in zip(panels, summary, strict=True):
        for rank, of_rank in enumerate(spans):
            bars: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for event, begin, end in of_rank[name]:
                kind = event.removeprefix("distmuon/") if event.startswith("distmuon/") else "exchange"
                bars[_KINDS.get(kind, kind)].append((begin, end - begin))
            for kind, found in bars.items():
                bottom, height = (-0.42, 0.12) if kind == "exchange" else (-0.26, 0.6)
                if kind in _COLORS:
                    axes.broken_barh(found, (rank + bottom, height), facecolor=_COLORS[kind], linewidth=0)
        row = summary[name]
        axes.set_title(
            f"{name}: {row['buckets']:.0f} buckets, {row['exposed']:.0f} ms exposed of a step of {row['step']:.0f} ms "
            "(medians)",
            loc="left",
            fontsize=9,
        )
        axes.set_yticks(range(len(spans)), [f"rank {rank}" for rank in range(len(spans))])
        axes.set_ylim(len(spans) - 0.4, -0.6)
    panels[-1].set_xlabel("ms since the step began (one step, under the profiler)", loc="left")
    figure.legend(
        handles=[Patch(color=_COLORS[kind], label=text) for kind, text in _LEGEND.items()],
        loc="lower right",
        ncol=4,
        fontsize=8,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(where, dpi=110)
    plt.close(figure)
