"""How much each rank has to orthogonalize, by kind of matrix, beside an even share."""

from __future__ import annotations

from collections import Counter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from distmuon.planning.figures import Owned, Prediction
from distmuon.planning.story import ms, work

# Bars up to here, a filled curve of sorted ranks above
_MOST_BARS = 64
_MOST_KINDS = 6
_COLORS = ("#4c78a8", "#f58518", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b")
_OTHERS = "#bab0ac"


def draw_loads(axes: Axes, prediction: Prediction) -> None:
    """Draw the loads.

    Args:
        axes: To draw on.
        prediction: Of few ranks or thousands.
    """
    loads = _loads(prediction)
    kinds = _main_kinds(loads)
    few = len(prediction.ranks) <= _MOST_BARS
    order = [figures.rank for figures in prediction.ranks]
    if not few:
        order.sort(key=lambda rank: (-sum(loads[rank].values()), rank))
    below = [0.0] * len(order)
    places = list(range(len(order)))
    handles = []
    for kind, color in [*zip(kinds, _COLORS, strict=False), (None, _OTHERS)]:
        part = [_part(loads[rank], kind, kinds) for rank in order]
        if not any(part):
            continue
        top = [a + b for a, b in zip(below, part, strict=True)]
        hatch = "//" if kind is not None and kind.parts > 1 else None
        style: dict[str, Any] = {"facecolor": color, "edgecolor": "white", "linewidth": 0.0, "hatch": hatch}
        if few:
            axes.bar(places, part, bottom=below, width=0.85, **style)
        else:
            edges = [place - 0.5 for place in (*places, len(places))]
            axes.fill_between(edges, [*below, below[-1]], [*top, top[-1]], step="post", **style)
        handles.append(Patch(label=_name(kind), **style))
        below = top
    ideal = 1e3 * prediction.ideal
    highest = max(below)
    even = f"even share: {ms(prediction.ideal)} ms"
    line = axes.axhline(ideal, color="black", linestyle="--", linewidth=1.2, label=even)
    axes.set_ylim(0, 1.45 * max(highest, ideal))
    axes.set_xlim(-0.6, len(order) - 0.4)
    busiest = prediction.busiest
    axes.annotate(
        f"rank {busiest.rank}: {work(busiest)}",
        xy=(order.index(busiest.rank), below[order.index(busiest.rank)]),
        xytext=(0.02, 0.72),
        textcoords="axes fraction",
        va="bottom",
        fontsize=9,
        fontweight="bold",
        color="#e45756",
        arrowprops={"arrowstyle": "->", "color": "#e45756", "relpos": (0, 0)},
    )
    axes.set_title("Newton-Schulz of each rank; hatched: slabs of matrices that a team shares", loc="left", fontsize=11)
    axes.set_xlabel("rank" if few else f"{len(order):,} ranks, busiest first")
    axes.set_ylabel("ms")
    axes.legend(handles=[*handles, line], fontsize=8, ncols=3, loc="upper right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _loads(prediction: Prediction) -> dict[int, Counter[Owned]]:
    """Milliseconds by rank and kind."""
    plan = prediction.plan
    loads: dict[int, Counter[Owned]] = {rank: Counter() for rank in plan.ranks}
    for bucket in plan.buckets:
        kind = Owned(bucket.rows, bucket.cols, bucket.parts)
        for assignment in bucket.assignments:
            loads[assignment.owner][kind] += 1e-6 * assignment.cost(plan.parameters[assignment.parameter])  # type: ignore[assignment]
    return loads


def _main_kinds(loads: dict[int, Counter[Owned]]) -> list[Owned]:
    """The kinds that take most time together, the longest first."""
    total: Counter[Owned] = Counter()
    for found in loads.values():
        total.update(found)
    return [kind for kind, _ in total.most_common(_MOST_KINDS)]


def _part(found: Counter[Owned], kind: Owned | None, kinds: list[Owned]) -> float:
    if kind is not None:
        return found[kind]
    return sum(value for other, value in found.items() if other not in kinds)


def _name(kind: Owned | None) -> str:
    if kind is None:
        return "others"
    return f"{kind.rows} x {kind.cols}" + (f", teams of {kind.parts}" if kind.parts > 1 else "")
