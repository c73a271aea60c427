"""What family.py shows of final losses: a table and a drawing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from family_members import REFERENCE
from lr_sweep_report import Curve
from rich import box
from rich.table import Table
from token_efficiency_runs import Result


@dataclass
class Outcome:
    """One member: losses over rates at the first seed, and its runs at the best rate, one a seed."""

    curve: Curve
    results: list[Result]

    @property
    def name(self) -> str:
        """Of the member."""
        return self.curve.scale

    @property
    def losses(self) -> list[float]:
        """Final validation losses, one a seed."""
        return [result.loss for result in self.results]

    @property
    def mean(self) -> float:
        """Of the losses."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Standard deviation (of a sample) over seeds; 0 of one seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0


def against(found: Outcome, reference: Outcome) -> tuple[float, str]:
    """The difference of the means, and whether seeds could make it.

    Returns:
        Mean loss less that of the reference, and ``"lower"`` or ``"higher"`` where all seeds agree and the difference
        is more than twice the larger standard deviation over seeds, else ``"in the spread"``; of one seed that.
    """
    differences = [loss - other for loss, other in zip(found.losses, reference.losses, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, "one seed"
    agree = all(difference * mean > 0 for difference in differences)
    if agree and abs(mean) > 2 * max(found.deviation, reference.deviation):
        return mean, "lower" if mean < 0 else "higher"
    return mean, "in the spread"


def make_table(outcomes: Sequence[Outcome]) -> Table:
    """A row a member, the lowest loss first."""
    first = outcomes[0].results[0]
    table = Table(
        title=f"{first.parameters:,} parameters, {first.tokens:,} tokens",
        caption=f"Nats a byte; mean ± standard deviation over seeds: {len(outcomes[0].results)}.",
        box=box.SIMPLE,
        padding=(0, 1),
    )
    table.add_column("member")
    for column in ("best rate", "validation\nloss", f"less\n{REFERENCE}'s", "which is"):
        table.add_column(column, justify="right", no_wrap=True)
    reference = next((found for found in outcomes if found.name == REFERENCE), None)
    for found in sorted(outcomes, key=lambda outcome: outcome.mean):
        rate = f"{found.curve.best_tried:.3g}" + ("" if found.curve.edge is None else ", at the edge")
        difference, words = "", ""
        if reference is not None and found is not reference:
            mean, words = against(found, reference)
            difference = f"{mean:+.3f}"
        table.add_row(found.name, rate, f"{found.mean:.3f} ± {found.deviation:.3f}", difference, words)
    return table


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Left final losses at the best rate, a dot a seed; right losses over rates beside it, at the first seed."""
    from matplotlib.figure import Figure

    ordered = sorted(outcomes, key=lambda outcome: -outcome.mean)
    figure = Figure(figsize=(12, 1.2 + 0.33 * len(ordered)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, found in enumerate(ordered):
        color = f"C{place % 10}"
        left.plot(found.losses, [place] * len(found.losses), "o", color=color, markersize=5)
        left.plot([found.mean], [place], "|", color=color, markersize=14, markeredgewidth=2)
        means = {rate: loss for rate, loss in found.curve.means.items() if math.isfinite(loss)}
        style = "o-" if place < 10 else "s--"
        beside = [rate / found.curve.best_tried for rate in means]
        right.plot(beside, list(means.values()), style, color=color, label=found.name, markersize=3, linewidth=1.2)
    left.set_yticks(range(len(ordered)), [found.name for found in ordered])
    left.set(xlabel="final validation loss (nats a byte), a dot a seed", title="at the best rate")
    right.set_xscale("log", base=2)
    right.set(xlabel="rate, of the best one", title="losses over rates, first seed")
    ticks = sorted({rate / found.curve.best_tried for found in ordered for rate in found.curve.losses})
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    lowest = min(min(found.curve.means.values()) for found in ordered)
    right.set_ylim(lowest - 0.03, max(found.mean for found in ordered) + 0.4)
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for panel in (left, right):
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
