"""What lr_sweep.py shows: the best learning rate of each width, a table and a drawing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Curve:
    """Final validation losses of one scale at one width.

    Attributes:
        scale: The ``adjust_lr_fn``.
        width: Hidden size.
        losses: By learning rate, one loss a seed in nats a token, infinite where a run diverged.
    """

    scale: str
    width: int
    losses: dict[float, list[float]]

    @property
    def means(self) -> dict[float, float]:
        """Mean over seeds, by rising rate."""
        return {lr: statistics.fmean(self.losses[lr]) for lr in sorted(self.losses)}

    @property
    def best_tried(self) -> float:
        """The rate of the lowest mean."""
        return min(self.means, key=self.means.__getitem__)

    @property
    def edge(self) -> float | None:
        """The rate to try next where the best one has no neighbour on one side."""
        rates = list(self.means)
        if self.best_tried == rates[0]:
            return rates[0] / 2
        return rates[-1] * 2 if self.best_tried == rates[-1] else None

    @property
    def best(self) -> float | None:
        """Between the rates tried, from the means; None at an edge."""
        return vertex(self.means)

    @property
    def best_by_seed(self) -> list[float | None]:
        """The same of each seed alone."""
        count = min(len(losses) for losses in self.losses.values())
        return [vertex({lr: self.losses[lr][seed] for lr in sorted(self.losses)}) for seed in range(count)]


def vertex(losses: dict[float, float]) -> float | None:
    """Where a parabola over log2 of the rate, through the lowest loss and its neighbours, is lowest.

    Args:
        losses: By rising rate, neighbours apart by a factor of two.

    Returns:
        A rate; None where the lowest loss lies at the edge, or a neighbour is infinite.
    """
    rates = list(losses)
    index = min(range(len(rates)), key=lambda place: losses[rates[place]])
    if index in (0, len(rates) - 1):
        return None
    left, low, right = (losses[rates[place]] for place in (index - 1, index, index + 1))
    if not math.isfinite(left + right):
        return None
    bend = left - 2 * low + right
    return float(rates[index] * 2 ** (0.5 * (left - right) / bend)) if bend > 0 else rates[index]


def make_table(curves: Sequence[Curve]) -> Table:
    """Best rates and their losses, a row for each scale and a column for each width."""
    widths = sorted({curve.width for curve in curves})
    table = Table(
        title="best learning rate of the matrices (loss at the best rate tried)",
        caption="In brackets nats a byte; with several seeds mean, ± half the range of their best rates.",
        box=box.SIMPLE,
        padding=(0, 1),
    )
    table.add_column("adjust_lr_fn")
    for width in widths:
        table.add_column(f"{width}", justify="right")
    for scale in dict.fromkeys(curve.scale for curve in curves):
        row = {curve.width: curve for curve in curves if curve.scale == scale}
        table.add_row(scale, *(_cell(row[width]) if width in row else "" for width in widths))
    return table


def _cell(curve: Curve) -> str:
    loss = f"({curve.means[curve.best_tried]:.3f})"
    if curve.best is None:
        return f"{curve.best_tried:.2g}, at the edge {loss}"
    known = [rate for rate in curve.best_by_seed if rate is not None]
    spread = f" ± {(max(known) - min(known)) / 2:.2g}" if len(known) > 1 else ""
    return f"{curve.best:.3g}{spread} {loss}"


def moves(curves: Sequence[Curve]) -> list[str]:
    """By which factor the best rate moves between the narrowest and the widest model; one line a scale."""
    lines = []
    for scale in dict.fromkeys(curve.scale for curve in curves):
        row = sorted((curve for curve in curves if curve.scale == scale), key=lambda curve: curve.width)
        first, last = row[0], row[-1]
        if first is last or first.best is None or last.best is None:
            continue
        kept = last.losses.get(first.best_tried)
        cost = f", and costs {statistics.fmean(kept) - last.means[last.best_tried]:.3f} nats there" if kept else ""
        lines.append(
            f"{scale}: from {first.best:.3g} at {first.width} to {last.best:.3g} at {last.width}, times "
            f"{last.best / first.best:.2f}; the best rate tried at {first.width} is {first.best_tried:g}{cost}"
        )
    return lines


def draw(curves: Sequence[Curve], path: Path) -> None:
    """One panel a scale: loss over learning rate, a line a width, a mark at the best rate."""
    from matplotlib.figure import Figure

    scales = list(dict.fromkeys(curve.scale for curve in curves))
    widths = sorted({curve.width for curve in curves})
    figure = Figure(figsize=(3.1 * len(scales), 3.6), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for panel, scale in zip(panels, scales, strict=True):
        for curve in curves:
            if curve.scale != scale:
                continue
            color = f"C{widths.index(curve.width)}"
            means = {lr: loss for lr, loss in curve.means.items() if math.isfinite(loss)}
            panel.plot(list(means), list(means.values()), "o-", color=color, label=f"width {curve.width}", markersize=4)
            if curve.best is not None:
                panel.axvline(curve.best, color=color, linestyle=":", linewidth=1.2)
        panel.set(xscale="log", xlabel="learning rate", title=scale)
        panel.set_xscale("log", base=2)
        ticks = sorted({lr for curve in curves if curve.scale == scale for lr in curve.losses})
        panel.set_xticks(ticks[::2], [f"{lr:.2g}" for lr in ticks[::2]])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("final validation loss (nats a byte)")
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
