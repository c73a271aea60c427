"""How far Muon's step scales: makespan over ideal, with teams and without, and what the exchange adds; simulated.

    python benchmarks/scaling.py

writes the table of docs/scaling.md to stdout and its picture to docs/scaling.png. Nothing is measured: rates are those
given here, and the step is that of distmuon.plan.simulate.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from distmuon.planning.devices import Device, find_device
from distmuon.planning.figures import Prediction
from distmuon.planning.layouts import make_layout
from distmuon.planning.models import load_model
from distmuon.planning.predict import Makespan, makespan, predict
from distmuon.planning.rivals import ROUND_ROBIN
from distmuon.planning.specs import Setup

# 600 TFLOP/s in all products, 400 GB/s inside a node of 8, 50 GB/s a GPU between nodes
TFLOPS, LOCAL_GB_S, REMOTE_GB_S, NODE = 600.0, 400.0, 50.0, 8
# Model, ranks that share the experts of a layer, numbers of ranks
CASES = (
    ("llama-3-8b", 1, (8, 64, 256, 1024)),
    ("llama-3-70b", 1, (8, 64, 256, 1024)),
    ("deepseek-v3", 8, (256, 1024, 4096)),
)
_COLUMNS = (
    *("model", "ranks", "whole matrices", "with teams", "round robin", "step ms", "exposed ms", "busiest link ms"),
    *("of a training step", "teams", "what bounds it"),
)
_PICTURE = pathlib.Path(__file__).parent.parent / "docs" / "scaling.png"


@dataclass(frozen=True)
class Row:
    """One model on one number of ranks.

    Attributes:
        model: Its name.
        ranks: Number of ranks.
        teams: The step with teams.
        whole: Orthogonalization by single owners.
    """

    model: str
    ranks: int
    teams: Prediction
    whole: Makespan

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Makespan over ideal: whole matrices, teams, round robin."""
        rivals = {rival.name: rival.makespan for rival in self.teams.rivals}
        ideal = self.teams.ideal
        return self.whole.seconds / ideal, self.teams.over_ideal, rivals[ROUND_ROBIN] / ideal

    def cells(self) -> tuple[str, ...]:
        """As a row of the table."""
        whole, teams, dealt = self.ratios
        p = self.teams
        sizes = ", ".join(f"{count:,} by {size}" for size, count in p.teams().items() if size > 1) or "none"
        figures = (f"{1e3 * p.seconds:,.1f}", f"{1e3 * p.exposed:,.1f}", f"{1e3 * p.links:,.1f}", f"{p.share:.1%}")
        return (
            self.model,
            f"{self.ranks:,}",
            f"{whole:.2f}",
            f"**{teams:.2f}**",
            f"{dealt:.2f}",
            *figures,
            sizes,
            bound(p),
        )


def bound(p: Prediction) -> str:
    """What keeps the makespan from the ideal."""
    if p.over_ideal <= 1.05:
        return "nothing: even shares"
    if p.largest >= 0.95 * p.makespan:
        return f"the largest matrix on its best team: {1e3 * p.largest:.2f} ms"
    team_work = sum(p.plan.loads().values()) * 1e-9 / len(p.ranks)
    idle = p.makespan / team_work - 1
    extra = team_work / p.ideal - 1
    return f"work that teams repeat and talk: {extra:.0%}; uneven shares: {idle:.0%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict all cases, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", default="fsdp", help="fsdp (default), hsdp or ddp")
    parser.add_argument("--models", nargs="+", default=[name for name, _, _ in CASES], help="some of the three")
    parser.add_argument("--out", type=pathlib.Path, default=_PICTURE, metavar="FILE.png", help="docs/scaling.png")
    known = parser.parse_args(arguments)
    started = time.perf_counter()
    device = find_device("h100", tflops=TFLOPS, local_gb_s=LOCAL_GB_S, remote_gb_s=REMOTE_GB_S)
    print("| " + " | ".join(_COLUMNS) + " |")
    print("|" + "---|" * len(_COLUMNS), flush=True)
    rows = []
    for name, parallel, worlds in CASES:
        if name in known.models:
            for world in worlds:
                rows.append(_row(name, parallel, world, known.parallel, device))
                print("| " + " | ".join(rows[-1].cells()) + " |", flush=True)
    _draw(rows, known.out)
    print(f"\n{known.parallel}; {time.perf_counter() - started:.0f} s; wrote {known.out.name}")


def _row(name: str, parallel: int, world: int, kind: str, device: Device) -> Row:
    layout = make_layout(kind, world // NODE, NODE, parallel)
    setup = Setup(load_model(name), layout, device)
    return Row(name, world, predict(setup), makespan(setup.but(teams=False)))


def _draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """A panel a model: makespan over ideal by ranks, and the step as a part of a training step."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(4.6 * len(models), 4.4), layout="constrained")
    words = (
        "Whole matrices hit a wall where ranks outnumber them, and teams push it out (1: all ranks are equally busy)"
    )
    figure.suptitle(words, fontweight="bold", fontsize=11)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        own = [row for row in rows if row.model == model]
        ranks = [row.ranks for row in own]
        styles = (("whole matrices", "#4c78a8", "o"), ("with teams", "#e45756", "D"), ("round robin", "#bab0ac", "s"))
        for place in (2, 0, 1):
            label, color, marker = styles[place]
            values = [row.ratios[place] for row in own]
            panel.plot(ranks, values, label=label, color=color, marker=marker)
            if place < 2:
                panel.annotate(
                    f"{values[-1]:.2f}",
                    (ranks[-1], values[-1]),
                    textcoords="offset points",
                    xytext=(0, 6),
                    ha="right",
                    color=color,
                )
        panel.axhline(1.0, color="black", linestyle="--", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(ranks, [f"{row.ranks:,}\n{row.teams.share:.1%}" for row in own])
        panel.set_yticks([1, 1.5, 2, 3, 4, 6, 8, 12, 20], ["1", "1.5", "2", "3", "4", "6", "8", "12", "20"])
        panel.set_ylim(0.92, 1.4 * max(max(row.ratios) for row in own))
        panel.set_title(f"{model}, {sum(p.count for p in own[0].teams.setup.model.on_muon):,} matrices")
        panel.set_xlabel("ranks, and the step's share of a training step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper left")
    panels[0].set_ylabel("makespan / ideal")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
