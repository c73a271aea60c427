"""What engine_losses.py shows: how far losses spread, and a drawing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What is kept of a run: losses in nats a token, seconds of training, validations as ``(tokens, loss)``."""

    engine: str
    seed: int
    ns_dtype: str
    loss: float
    seconds: float
    curve: list[tuple[float, float]]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Outcome:
        """The outcome in parsed JSON."""
        return cls(**{**found, "curve": [(tokens, loss) for tokens, loss in found["curve"]]})


@dataclass
class Spread:
    """How far final losses lie apart.

    Attributes:
        losses: By engine or by seed.
        mean: Of the losses.
        deviation: Standard deviation (of a sample).
        range: Largest minus smallest.
    """

    losses: dict[str, float]
    mean: float = field(init=False)
    deviation: float = field(init=False)
    range: float = field(init=False)

    def __post_init__(self) -> None:
        values = list(self.losses.values())
        self.mean = statistics.mean(values)
        self.deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        self.range = max(values) - min(values)


def spreads(outcomes: Sequence[Outcome], *, seed: int, engine: str) -> tuple[Spread, Spread]:
    """Over engines at one seed, and over seeds of one engine."""
    over_engines = {found.engine: found.loss for found in outcomes if found.seed == seed}
    over_seeds = {str(found.seed): found.loss for found in outcomes if found.engine == engine}
    return Spread(over_engines), Spread(over_seeds)


def spread_line(title: str, spread: Spread) -> str:
    """One line for the terminal."""
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in spread.losses.items())
    return f"{title}: range {spread.range:.4f}, standard deviation {spread.deviation:.4f} ({losses})"


def draw(outcomes: Sequence[Outcome], path: Path, *, seed: int, engine: str) -> None:
    """Left the curves themselves, right their distance from the mean over seeds, where they can be told apart."""
    from matplotlib.figure import Figure

    of_seeds = [found.curve for found in outcomes if found.engine == engine]
    mean = [statistics.mean(loss for _, loss in points) for points in zip(*of_seeds, strict=True)]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    others = [found for found in outcomes if found.seed != seed]
    styles: list[tuple[Outcome, dict[str, Any]]] = [
        (found, {"label": f"{engine}, seed {found.seed}", "linewidth": 1.0, "color": "0.6", "linestyle": "--"})
        for found in others
    ]
    for names, found in same_curves([found for found in outcomes if found.seed == seed]):
        styles.append((found, {"label": f"{names}, seed {seed}", "linewidth": 1.4}))
    for found, style in styles:
        thousands = [tokens / 1000 for tokens, _ in found.curve]
        losses = [loss for _, loss in found.curve]
        left.plot(thousands, losses, **style)
        right.plot(thousands, [loss - middle for loss, middle in zip(losses, mean, strict=True)], **style)
    left.set(ylabel="validation loss (nats a token)", title="loss")
    right.set(ylabel=f"loss minus the mean of {engine} over seeds", title="difference")
    for panel in (left, right):
        panel.set(xlabel="thousand tokens")
        panel.grid(alpha=0.3)
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def same_curves(outcomes: Sequence[Outcome]) -> list[tuple[str, Outcome]]:
    """One outcome of each curve, and the engines that have it; ``auto`` has that of the engine it takes."""
    groups: dict[tuple[tuple[float, float], ...], list[Outcome]] = {}
    for found in outcomes:
        groups.setdefault(tuple(found.curve), []).append(found)
    return [(" = ".join(_name(found) for found in group), group[0]) for group in groups.values()]


def _name(found: Outcome) -> str:
    return found.engine if found.ns_dtype == "bfloat16" else f"{found.engine} ({found.ns_dtype})"
