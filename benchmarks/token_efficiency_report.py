"""What token_efficiency.py shows: a table and a drawing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from token_efficiency_runs import Result, Size

OPTIMIZERS = ("adamw", "muon")


@dataclass
class Comparison:
    """The outcome at one size; lists have one entry a seed, shares are of AdamW's tokens."""

    size: Size
    grids: dict[str, list[tuple[float, float]]]
    best_lr: dict[str, float]
    results: dict[str, list[Result]]
    shorter: dict[float, list[float]]
    share: list[float | None]
    share_is_upper_bound: bool
    share_on_curve: list[float | None]


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean and standard deviation as text, or what is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"not reached by {len(values) - len(known)} of {len(values)} seeds"
    return f"{statistics.mean(known):{form}} ± {statistics.stdev(known):{form}}"


def make_table(found: Comparison) -> Table:
    """The outcome at one size as a table that fits 80 columns."""
    first = found.results["muon"][0]
    table = Table(
        title=f"{found.size.name}: {first.parameters:,} parameters, {first.tokens:,} tokens",
        caption=f"Mean ± standard deviation over {len(found.results['muon'])} seeds; losses in nats a byte.",
        box=box.SIMPLE,
        padding=(0, 1),
    )
    table.add_column("optimizer")
    for column in (
        "learning\nrate",
        "validation\nloss",
        "tokens to\nAdamW's loss",
        "the same, on the\nlong run's curve",
    ):
        table.add_column(column, justify="right")
    for name in OPTIMIZERS:
        share, on_curve = "100%", "100%"
        if name == "muon":
            share = ("at most " if found.share_is_upper_bound else "") + spread(found.share, ".1%")
            on_curve = spread(found.share_on_curve, ".1%")
        loss = spread([run.loss for run in found.results[name]], ".4f")
        table.add_row(name, f"{found.best_lr[name]:g}", loss, share, on_curve)
    return table


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """One row a size: loss against tokens, and final loss against learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5 * len(comparisons)), layout="constrained")
    panels = figure.subplots(len(comparisons), 2, squeeze=False)
    for (left, right), found in zip(panels, comparisons, strict=True):
        for name, color in zip(OPTIMIZERS, ("tab:orange", "tab:blue"), strict=True):
            for index, result in enumerate(found.results[name]):
                label = f"{name}, lr {found.best_lr[name]:g}" if index == 0 else None
                left.plot(*zip(*result.curve, strict=True), color=color, label=label, linewidth=1.2)
            rates = [(lr, loss) for lr, loss in found.grids[name] if math.isfinite(loss)]
            right.plot(*zip(*rates, strict=True), "o-", color=color, label=name)
        full = found.results["muon"][0].tokens
        cut = [(part * full, statistics.mean(losses)) for part, losses in found.shorter.items()]
        left.plot(*zip(*cut, strict=True), "kD", markersize=5, label="muon, own schedule for that budget")
        target = statistics.mean(result.loss for result in found.results["adamw"])
        left.axhline(target, color="tab:orange", linestyle=":", label="adamw's final loss")
        parameters = f"{found.results['muon'][0].parameters:,} parameters"
        left.set(xlabel="tokens", ylabel="validation loss (nats per byte)", title=f"{found.size.name}, {parameters}")
        low = min(loss for losses in found.shorter.values() for loss in losses)
        left.set_ylim(low - 0.05, target + 1.0)
        ticks = sorted({lr for name in OPTIMIZERS for lr, _ in found.grids[name]})
        right.set(xscale="log", xlabel="learning rate", ylabel="final validation loss", title="seed 0")
        right.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
        right.set_xticks([], minor=True)
        for panel in (left, right):
            panel.grid(alpha=0.3)
            panel.legend()
    figure.savefig(path, dpi=120)
