"""A Gantt chart: a row for each rank, its engine as a bar and its exchanges as lines above and below."""

from __future__ import annotations

from collections import Counter, defaultdict

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from distmuon.plan.simulate import Span
from distmuon.planning.figures import Prediction, RankFigures
from distmuon.planning.story import EXPOSED, ms, work

COLORS = {"gather": "#4c78a8", "scatter": "#54a24b", "ns": "#e45756", "pack": "#b8a038", "wait": "#d9d9d9"}
_LEGEND = {
    "gather": "gather (line above)",
    "ns": "Newton-Schulz",
    "scatter": "scatter (line below)",
    "pack": "pack, unpack, apply",
    "wait": "wait",
}
# Where a row has what: bottom and height
_ROWS = {"gather": (-0.42, 0.12), "scatter": (0.30, 0.12)}
_ENGINE = (-0.26, 0.52)


def draw_gantt(axes: Axes, prediction: Prediction) -> None:
    """Draw the spans of a prediction.

    Args:
        axes: To draw on.
        prediction: With spans of the ranks to show; few of many ranks stand for all.
    """
    shown = _ordered(prediction)
    row_of = {figures.rank: row for row, figures in enumerate(shown)}
    bars: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for span in prediction.spans:
        kind = "pack" if span.kind == "apply" else span.kind
        bars[row_of[span.rank], kind].append((1e3 * span.start, 1e3 * (span.end - span.start)))
    for (row, kind), found in bars.items():
        bottom, height = _ROWS.get(kind, _ENGINE)
        edges = {"edgecolor": "white", "linewidth": 0.4} if kind == "ns" and len(found) < 60 else {"linewidth": 0}
        axes.broken_barh(found, (row + bottom, height), facecolor=COLORS[kind], **edges)
    for row, figures in enumerate(shown):
        done = 1e3 * figures.finish
        axes.plot([done, done], [row - 0.42, row + 0.42], color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [_label(prediction, figures) for figures in shown])
    busiest = prediction.busiest
    if busiest.rank in row_of and not prediction.even:
        label = axes.get_yticklabels()[row_of[busiest.rank]]
        label.set_fontweight("bold")
        label.set_color(COLORS["ns"])
    axes.set_ylim(len(shown) - 0.4, -1.15)
    last = 1e3 * prediction.seconds
    axes.set_xlim(0, 1.02 * last)
    axes.axvline(last, color="black", linewidth=0.8, linestyle=":")
    _annotate(axes, prediction, row_of)
    axes.set_xlabel("ms since the step began (black tick: the rank is done)")
    axes.set_title(_heading(prediction, len(shown)), loc="left", fontsize=11)
    handles = [Patch(color=COLORS[kind], label=text) for kind, text in _LEGEND.items()]
    axes.legend(handles=handles, ncols=5, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _ordered(prediction: Prediction) -> list[RankFigures]:
    """Ranks with spans: by number where all are shown, else busiest first."""
    ranks = {span.rank for span in prediction.spans}
    shown = [figures for figures in prediction.ranks if figures.rank in ranks]
    if len(shown) < len(prediction.ranks):
        shown.sort(key=lambda figures: (-round(figures.ns, 9), figures.rank))
    return shown


def _label(prediction: Prediction, figures: RankFigures) -> str:
    ordered = sorted(prediction.ranks, key=lambda other: (-round(other.ns, 9), other.rank))
    places = {ordered[-1].rank: "idlest", ordered[len(ordered) // 2].rank: "median", ordered[0].rank: "busiest"}
    place = None if prediction.even else places.get(figures.rank)
    alike = Counter(other.owned for other in prediction.ranks)[figures.owned] - 1
    hidden = len({span.rank for span in prediction.spans}) < len(prediction.ranks)
    more = f" + {alike:,} like it" if hidden and alike else ""
    return f"rank {figures.rank}{more}{f', {place}' if place else ''}"


def _heading(prediction: Prediction, shown: int) -> str:
    if shown == len(prediction.ranks):
        return "The step, rank by rank"
    return f"The step of {shown} of {len(prediction.ranks):,} ranks, from the busiest to the idlest"


def awaited(prediction: Prediction, wait: Span) -> str:
    """What a rank waits for: the exchange of its own that ends with the wait, or else the ranks of its team."""
    exchanges = [s for s in prediction.spans if s.rank == wait.rank and s.kind in ("gather", "scatter")]
    nearest = min(exchanges, key=lambda span: abs(span.end - wait.end), default=None)
    if nearest is None or abs(nearest.end - wait.end) > 1e-3 * (wait.end - wait.start):
        return "ranks of its team"
    # an exchange is named by the first bucket of its wave
    wave = next(k for k, found in enumerate(prediction.plan.waves) if found.first == nearest.bucket)
    what = "gathers" if nearest.kind == "gather" else "updates"
    return f"{what} of wave {wave + 1} of {len(prediction.plan.waves)}"


def _annotate(axes: Axes, prediction: Prediction, row_of: dict[int, int]) -> None:
    """Say in the row of the busiest rank what it is busy with."""
    busiest = prediction.busiest
    spans = [span for span in prediction.spans if span.rank == busiest.rank and span.kind == "ns"]
    if not spans:
        return
    most = max(span.end - span.start for span in spans)
    longest = next(span for span in spans if span.end - span.start > 0.99 * most)
    axes.annotate(
        f"rank {busiest.rank}: {work(busiest)}, {ms(busiest.ns)} ms",
        xy=(500 * (longest.start + longest.end), row_of[busiest.rank] - 0.26),
        xytext=(0.012, 0.985),
        textcoords="axes fraction",
        va="top",
        fontsize=9,
        color=COLORS["ns"],
        fontweight="bold",
        arrowprops={"arrowstyle": "->", "color": COLORS["ns"], "relpos": (0.5, 0)},
    )
    waits = [s for s in prediction.spans if s.rank == busiest.rank and s.kind == "wait"]
    if waits and prediction.exposed > EXPOSED * prediction.seconds:
        wait = max(waits, key=lambda span: span.end - span.start)
        text = f"waits {ms(wait.end - wait.start)} ms for {awaited(prediction, wait)}"
        middle = 500 * (wait.start + wait.end)
        axes.annotate(
            text,
            xy=(middle, row_of[busiest.rank]),
            # the left end is taken
            xytext=(min(0.85, max(0.5, middle / axes.get_xlim()[1])), 0.985),
            textcoords="axes fraction",
            ha="center",
            va="top",
            fontsize=9,
            color="#555555",
            arrowprops={"arrowstyle": "->", "color": "#555555", "relpos": (0, 0.2)},
        )
