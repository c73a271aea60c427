"""What orthogonalize.py shows: a table a shape, geometric means, JSON, and a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matrix_families import Closeness
from orthogonalize_contenders import FLOAT32, TORCH
from rich import box
from rich.table import Table
from timing import Judged

# Before a ratio to a time that was foretold and not measured
FORETOLD = "~"
# Ratios to float32 beyond, of emulated products, would flatten the others in the picture
_HIGHEST_BAR = 3.0


@dataclass(frozen=True)
class Result:
    """One shape, or a list of shapes that are worked off together.

    Attributes:
        work: As on the command line.
        timings: Milliseconds by contender.
        foretold_ms: Of torch's function where it was left out.
        flops: FLOPs that a contender's formula needs, products counted whole.
        peak: FLOPs a second of a large matrix product in the same rounds.
        chosen: Engine of ``auto``, by shape.
        accuracy: By kind of matrix and contender, the worst over shapes.
    """

    work: str
    timings: Mapping[str, Judged]
    foretold_ms: float | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    peak: float | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, Closeness]] = field(default_factory=dict)

    def ratio(self, label: str, base: str) -> float | None:
        """Median over median, None if one of the two was not measured."""
        if label not in self.timings or base not in self.timings:
            return None
        return self.timings[label].median / self.timings[base].median

    def foretold_ratio(self, label: str) -> float | None:
        """Median over the foretold time of torch's function, None if there is none."""
        if self.foretold_ms is None or label not in self.timings:
            return None
        return self.timings[label].median / self.foretold_ms

    def rate(self, label: str) -> float:
        """FLOPs a second."""
        return self.flops[label] / (self.timings[label].median * 1e-3)


def worst(found: Sequence[Closeness]) -> Closeness:
    """The worst of each measure."""
    return Closeness(
        max(one.error for one in found),
        max(one.off for one in found),
        min(one.low for one in found),
        max(one.high for one in found),
    )


def make_table(result: Result) -> Table:
    """One row a contender."""
    chosen = ", ".join(f"{shape} {engine}" for shape, engine in result.chosen.items())
    title = f"{result.work}   (auto: {chosen})" if chosen else result.work
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1), title_justify="left")
    table.add_column("engine", no_wrap=True)
    for column in ("ms\nmedian", "fastest to\nslowest", "kept,\nrejected", "of\ntorch", "of\nfloat32"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("GFLOP/s", justify="right")
    table.add_column("of a\nproduct's", justify="right")
    for kind in result.accuracy:
        table.add_column(f"{kind}\nerror", justify="right")
        table.add_column("\noff", justify="right")
        table.add_column("low to\nhigh", justify="right", no_wrap=True)
    if result.foretold_ms is not None:
        table.add_row(TORCH, f"{FORETOLD}{result.foretold_ms:,.0f}", "foretold", "")
    for label, timing in result.timings.items():
        table.add_row(
            label,
            f"{timing.median:,.1f}{'' if timing.quiet else '*'}",
            f"{timing.fastest:,.1f} to {timing.slowest:,.1f}",
            f"{timing.samples}, {timing.rejected}",
            _to_torch(result, label),
            _number(result.ratio(label, FLOAT32)),
            f"{result.rate(label) / 1e9:,.1f}" if label in result.flops else "",
            f"{result.rate(label) / result.peak:.0%}" if result.peak and label in result.flops else "",
            *(cell for found in result.accuracy.values() for cell in _cells(found.get(label))),
        )
    return table


def _to_torch(result: Result, label: str) -> str:
    measured, foretold = result.ratio(label, TORCH), result.foretold_ratio(label)
    return _number(measured) if foretold is None else f"{FORETOLD}{foretold:.4f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cells(found: Closeness | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    return f"{found.error:.3f}", f"{found.off:.3f}", f"{found.low:.2f} to {found.high:.2f}"


def geometric_mean(values: Sequence[float | None]) -> tuple[float | None, int]:
    """Of the known values, and how many they are."""
    known = [value for value in values if value is not None]
    return (math.exp(sum(map(math.log, known)) / len(known)) if known else None), len(known)


def geometric_means(results: Sequence[Result]) -> dict[str, dict[str, tuple[float | None, int]]]:
    """By baseline and contender, over the shapes where both were measured; foretold times have a key of their own."""
    labels = list(dict.fromkeys(label for result in results for label in result.timings))
    return {
        TORCH: {label: geometric_mean([r.ratio(label, TORCH) for r in results]) for label in labels},
        FLOAT32: {label: geometric_mean([r.ratio(label, FLOAT32) for r in results]) for label in labels},
        "torch_foretold": {label: geometric_mean([r.foretold_ratio(label) for r in results]) for label in labels},
    }


def summary(results: Sequence[Result]) -> list[str]:
    """Geometric means in lines for the terminal."""
    titles = {
        TORCH: "of torch's function, measured",
        FLOAT32: "of its operations in float32, measured",
        "torch_foretold": f"of torch's function, {FORETOLD} foretold from its FLOPs",
    }
    lines = []
    for base, means in geometric_means(results).items():
        known = {label: (mean, count) for label, (mean, count) in means.items() if mean is not None and label != base}
        if known:
            mark = FORETOLD if base == "torch_foretold" else ""
            cells = ", ".join(f"{label} {mark}{mean:.3f} ({count})" for label, (mean, count) in known.items())
            lines.append(f"geometric mean (number of shapes) {titles[base]}: {cells}")
    return lines


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What a script needs; ratios to foretold times are apart from those to measured ones."""
    return [
        {
            "work": result.work,
            "chosen": dict(result.chosen),
            "ms": {label: dataclasses.asdict(timing) for label, timing in result.timings.items()},
            "foretold_torch_ms": result.foretold_ms,
            "ratios": {
                base: {label: result.ratio(label, base) for label in result.timings}
                for base in (TORCH, FLOAT32)
                if base in result.timings
            },
            "ratios_to_foretold_torch": {label: result.foretold_ratio(label) for label in result.timings}
            if result.foretold_ms is not None
            else {},
            "gflops": {label: result.rate(label) / 1e9 for label in result.timings if label in result.flops},
            "product_gflops": None if result.peak is None else result.peak / 1e9,
            "accuracy": {
                kind: {label: dataclasses.asdict(found) for label, found in by_label.items()}
                for kind, by_label in result.accuracy.items()
            },
        }
        for result in results
    ]


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Bars of ratios, a group a shape: to torch's function, hatched where its time was foretold, and to float32."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = [label for label in dict.fromkeys(name for r in results for name in r.timings) if label != TORCH]
    figure = Figure(figsize=(1.2 * len(results) + 3, 7), layout="constrained")
    figure.suptitle(title, fontsize=10)
    to_torch, to_float32 = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        for place, result in enumerate(results):
            x = place + (number - (len(labels) - 1) / 2) * width
            for panel, measured in ((to_torch, result.ratio(label, TORCH)), (to_float32, result.ratio(label, FLOAT32))):
                foretold = result.foretold_ratio(label) if panel is to_torch else None
                value = measured if foretold is None else foretold
                if value is None or (panel is to_float32 and (label == FLOAT32 or value > _HIGHEST_BAR)):
                    continue
                hatch = "////" if foretold is not None else None
                panel.bar(x, value, width, color=f"C{number}", hatch=hatch, edgecolor="white", linewidth=0.3)
                panel.annotate(
                    f"{value:.2g}", (x, value), ha="center", va="bottom", fontsize=6, rotation=90, xytext=(0, 2),
                    textcoords="offset points",
                )  # fmt: skip
    to_torch.set(yscale="log", ylabel="time / torch.optim.Muon's function")
    to_float32.set(ylabel=f"time / its operations in float32\n(over {_HIGHEST_BAR:g} left out)")
    to_float32.set_xticks(range(len(results)), [result.work for result in results], rotation=25, ha="right")
    for panel in (to_torch, to_float32):
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.margins(y=0.15)
        panel.grid(axis="y", alpha=0.3)
    names = [Patch(color=f"C{number}", label=label) for number, label in enumerate(labels)]
    if any(result.foretold_ms is not None for result in results):
        names.append(Patch(facecolor="0.7", hatch="////", edgecolor="white", label="torch's time foretold"))
    figure.legend(handles=names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
