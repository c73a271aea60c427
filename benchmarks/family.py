"""Which member of the Muon family ends lowest? Each at its best learning rate, on the built-in corpus; what each costs.

    python benchmarks/family.py --picture docs/family_losses.png         # final losses
    python benchmarks/family.py --members Moonlight NorMuon --seeds 0 1  # of two of them
    python benchmarks/family.py --costs                                  # a step's time, bytes and state

Model, weights, order of data, batch, warm-up, straight line to zero, clipping and decay are those of
token_efficiency.py's small size, with fewer steps. A rate is AdamW's, for embedding, head and norms; the matrices have
what ``distmuon.suggest_lr`` finds to stand for it, so that one number is tuned for each member. Rates are apart by
factors of two at seed 0, more of them while the best lies at the edge, and the best one runs at every seed.

A member is called lower or higher than Moonlight only if all seeds agree in that and the difference of the means is
more than twice the larger standard deviation over seeds.

SOAP takes part where pytorch_optimizer is installed. Every run is one process with one thread. Finished runs are kept
in the output folder, so that the same command goes on after an interruption; they belong to the code that made them, so
take a new folder after a change.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from family_costs import measure_costs
from family_members import MEMBERS, REFERENCE, WEIGHT_DECAY
from family_report import Outcome, draw, make_table
from lr_sweep_report import Curve
from rate_grids import extend_grids
from rich.console import Console
from token_efficiency_runs import SEQUENCE, Run, Runner, Size
from torch import nn
from torch.optim import Optimizer

import distmuon
from distmuon.pretrain import DataConfig, Summary
from distmuon.pretrain.data import open_corpus

MAX_EXTENSIONS = 4


@dataclass(frozen=True)
class FamilyRun(Run):
    """A run of the member ``optimizer``; ``lr`` is the rate."""

    @property
    def label(self) -> str:
        """A name for log and files."""
        name = re.sub(r"\W+", "_", self.optimizer).strip("_")
        return f"{name}-{self.size.steps}-rate{self.lr:g}-seed{self.seed}"

    def beyond_config(self) -> dict[str, Any]:
        """What the member is."""
        settings = {key: str(value) for key, value in MEMBERS[self.optimizer].settings.items()}
        return {"member": self.optimizer, "member_settings": settings, "decay": WEIGHT_DECAY}

    def train(self, folder: str) -> Summary:
        """Train with the member in place of the trainer's optimizer."""

        def build(model: nn.Module, *_: Any, **__: Any) -> Optimizer:
            return MEMBERS[self.optimizer].build(model, self.lr)

        with mock.patch("distmuon.pretrain.run.build_optimizer", build):
            return super().train(folder)


def tune(runner: Runner, size: Size, names: Sequence[str], seed: int) -> dict[str, Curve]:
    """Losses over rates of every member at one seed."""

    def measure(grids: dict[str, list[float]]) -> dict[str, Curve]:
        wanted = {name: [FamilyRun(size, name, rate, seed) for rate in grid] for name, grid in grids.items()}
        runner.run("Rates", [run for runs in wanted.values() for run in runs])
        return {
            name: Curve(name, size.hidden, {run.lr: [runner.results[run].loss] for run in runs})
            for name, runs in wanted.items()
        }

    return extend_grids(measure, {name: MEMBERS[name].rates for name in names}, MAX_EXTENSIONS)


def compare(runner: Runner, size: Size, names: Sequence[str], seeds: Sequence[int]) -> list[Outcome]:
    """Tune every member at the first seed, and run its best rate at all seeds."""
    curves = tune(runner, size, names, seeds[0])
    best = {name: [FamilyRun(size, name, curve.best_tried, seed) for seed in seeds] for name, curve in curves.items()}
    # seed by seed, so that what is there after an interruption has all members
    runner.run("Best rates, all seeds", [runs[place] for place in range(len(seeds)) for runs in best.values()])
    return [Outcome(curves[name], [runner.results[run] for run in runs]) for name, runs in best.items()]


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", choices=MEMBERS, help="these alone")
    parser.add_argument("--steps", type=int, default=150, help="of 512 tokens")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2, 3, 4), help="the first one is tuned at")
    parser.add_argument("--costs", action="store_true", help="measure steps, and train nothing")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each member's step, with --costs")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/family"), help="folder of the finished runs")
    parser.add_argument("--json", type=Path, help="write the figures here; without it, into the folder")
    parser.add_argument("--picture", type=Path, help="draw losses here, such as docs/family_losses.png")
    args = parser.parse_args()
    console = Console(highlight=False)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    names = []
    for name in args.members or MEMBERS:
        if MEMBERS[name].missing:
            console.print(f"{name} is left out: {MEMBERS[name].missing} is not installed.")
        else:
            names.append(name)
    versions = {"distmuon": distmuon.__version__, "torch": torch.__version__}
    if args.costs:
        table, lines, figures = measure_costs(list(dict.fromkeys([REFERENCE, *names])), args.rounds)
        console.print(table)
        for line in lines:
            console.print(line, markup=False)
        _write(args.json or args.out / "costs.json", {"versions": versions, **figures})
        return 0
    corpus = open_corpus(DataConfig(sequence_length=SEQUENCE))  # tokenized once, before the workers ask for it
    console.print(f"{corpus.description}; {args.steps} steps; torch {torch.__version__}, CPU")
    runner = Runner(args.out / "runs", args.workers, console)
    try:
        outcomes = compare(runner, Size("small", 64, 4, args.steps, 1), names, args.seeds)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on with the runs that are missing.")
        return 130
    finally:
        runner.close()
    console.print(make_table(outcomes))
    document: dict[str, Any] = {
        "corpus": corpus.description,
        "steps": args.steps,
        "seeds": list(args.seeds),
        "versions": versions,
        "members": [
            {"settings": {key: str(value) for key, value in MEMBERS[found.name].settings.items()}}
            | dataclasses.asdict(found)
            for found in outcomes
        ],
    }
    path = args.json or args.out / "found.json"
    _write(path, document)
    if args.picture:
        draw(outcomes, args.picture)
    spent = math.fsum(result.seconds for result in runner.results.values())
    console.print(f"{len(runner.results)} runs, {spent:.0f} s of training; wrote {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
