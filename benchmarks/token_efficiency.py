"""How many of AdamW's tokens does Muon need? Both, each at its best learning rate, on the built-in corpus.

    python benchmarks/token_efficiency.py --quick                        # one size
    python benchmarks/token_efficiency.py --out runs/token_efficiency    # two sizes

Model, weights, data order, batch, warm-up, decay, weight decay and clipping are the same for both. Each
optimizer gets five or six learning rates at seed 0, more where the best lies at the edge, and its best one runs
at seeds 0, 1 and 2. Then Muon runs with smaller budgets, each with its own whole schedule, to find the
share of AdamW's tokens that reaches AdamW's final validation loss. The same is read off the curve of the
long Muon run too, whose learning rate is not yet down to zero at that point.

A step has 512 tokens, which suits AdamW: with 1024 and 800,000 tokens in all, the small size ended 0.05
higher for it and the same for Muon.

Every run is one process with one thread. Finished runs are kept in the output folder, so the same command
goes on after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from token_efficiency_report import OPTIMIZERS, Comparison, draw, make_table
from token_efficiency_runs import SEQUENCE, Run, Runner, Size

import distmuon
from distmuon.pretrain import DataConfig
from distmuon.pretrain.data import open_corpus

RATES = {"adamw": (6.25e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2), "muon": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)}
MAX_EXTENSIONS = 2
SEEDS = (0, 1, 2)
FRACTIONS = (0.3, 0.45, 0.6)
FRACTIONS_BELOW, FRACTIONS_ABOVE = (0.2, 0.13), (0.8,)


FULL = (Size("small", 64, 4, 1200, 10), Size("large", 128, 4, 1200, 10))
QUICK = (Size("small", 64, 4, 260, 5),)


def sweep(runner: Runner, sizes: Sequence[Size], console: Console) -> dict[tuple[Size, str], list[Run]]:
    """Runs of all learning rates at seed 0; a grid grows while its best rate lies at its edge."""
    grids = {(size, name): list(RATES[name]) for size, name in itertools.product(sizes, OPTIMIZERS)}
    for extension in range(MAX_EXTENSIONS + 1):
        runs = {key: [Run(key[0], key[1], lr) for lr in sorted(grid)] for key, grid in grids.items()}
        runner.run("Learning rates", [run for group in runs.values() for run in group])
        for (size, name), group in runs.items():
            best = group.index(min(group, key=lambda run: runner.results[run].loss))
            if 0 < best < len(group) - 1:
                continue
            rate = group[best].lr * (0.5 if best == 0 else 2.0)
            edge = f"{size.name} {name}: the best learning rate {group[best].lr:g} is at the edge of the grid"
            if extension < MAX_EXTENSIONS:
                console.print(f"{edge}, trying {rate:g} too.")
                grids[size, name].append(rate)
            else:
                console.print(f"{edge} still; read its result as a lower bound of what it can do.")
    return runs


def shorter(runner: Runner, runs: Sequence[Run], targets: Sequence[float]) -> list[float]:
    """Run Muon with smaller budgets until they lie on both sides of AdamW's losses; returns the fractions."""
    fractions = list(FRACTIONS)
    below, above = list(FRACTIONS_BELOW), list(FRACTIONS_ABOVE)

    def gaps(fraction: float) -> list[float]:
        cut = [dataclasses.replace(run, fraction=fraction) for run in runs]
        return [runner.results[run].loss - target for run, target in zip(cut, targets, strict=True)]

    while True:
        cut = [dataclasses.replace(run, fraction=part) for part in fractions for run in runs]
        runner.run(f"Muon, {runs[0].size.name}, smaller budgets", cut)
        if below and min(gaps(min(fractions))) <= 0:
            fractions.append(below.pop(0))
        elif above and max(gaps(max(fractions))) > 0:
            fractions.append(above.pop(0))
        else:
            return sorted([*fractions, 1.0])


def crossing(points: Sequence[tuple[float, float]], target: float) -> tuple[float | None, bool]:
    """Where losses first reach a target, between points by straight lines in the logarithm of x.

    Args:
        points: ``(x, loss)``, x ascending and positive.
        target: The loss to reach.

    Returns:
        x (None if no point reaches it), and whether it is only an upper bound as the first point already does.
    """
    for index, (x, loss) in enumerate(points):
        if loss <= target:
            if index == 0:
                return x, True
            before, higher = points[index - 1]
            part = 1.0 if math.isinf(higher) else (higher - target) / (higher - loss)
            return before * (x / before) ** part, False
    return None, False


def compare(runner: Runner, sizes: Sequence[Size], console: Console) -> list[Comparison]:
    """Execute everything and put the numbers together."""
    swept = sweep(runner, sizes, console)
    best = {key: min(runs, key=lambda run: runner.results[run].loss) for key, runs in swept.items()}
    seeds = {key: [dataclasses.replace(run, seed=seed) for seed in SEEDS] for key, run in best.items()}
    runner.run("Best rates, all seeds", [run for runs in seeds.values() for run in runs])
    found = []
    for size in sizes:
        results = {name: [runner.results[run] for run in seeds[size, name]] for name in OPTIMIZERS}
        targets = [result.loss for result in results["adamw"]]
        fractions = shorter(runner, seeds[size, "muon"], targets)
        cut = {
            part: [runner.results[dataclasses.replace(run, fraction=part)].loss for run in seeds[size, "muon"]]
            for part in fractions
        }
        crossings = [
            crossing([(part, losses[index]) for part, losses in cut.items()], target)
            for index, target in enumerate(targets)
        ]
        on_curve = [crossing(r.curve, target)[0] for r, target in zip(results["muon"], targets, strict=True)]
        found.append(
            Comparison(
                size=size,
                grids={n: [(run.lr, runner.results[run].loss) for run in swept[size, n]] for n in OPTIMIZERS},
                best_lr={name: best[size, name].lr for name in OPTIMIZERS},
                results=results,
                shorter=cut,
                share=[share for share, _ in crossings],
                share_is_upper_bound=any(bound for _, bound in crossings),
                share_on_curve=[x and x / results["adamw"][0].tokens for x in on_curve],
            )
        )
    return found


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size and few tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/token_efficiency"), help="output folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    args = parser.parse_args()
    console = Console()
    began = time.time()
    runs_folder: Path = args.out / "runs"
    runs_folder.mkdir(parents=True, exist_ok=True)
    corpus = open_corpus(DataConfig(sequence_length=SEQUENCE))  # tokenized once, before the workers ask for it
    console.print(f"{corpus.description}; {args.workers} workers", highlight=False)
    runner = Runner(runs_folder, args.workers, console)
    try:
        comparisons = compare(runner, QUICK if args.quick else FULL, console)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on with the runs that are missing.")
        return 130
    finally:
        runner.close()
    for found in comparisons:
        console.print(make_table(found))
    name = "quick" if args.quick else "full"
    draw(comparisons, args.out / f"{name}.png")
    document: dict[str, Any] = {
        "corpus": corpus.description,
        "versions": {"distmuon": distmuon.__version__, "torch": torch.__version__},
        "training_seconds": sum(result.seconds for result in runner.results.values()),
        "wall_seconds_of_this_call": time.time() - began,
        "sizes": [dataclasses.asdict(found) for found in comparisons],
    }
    (args.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"{len(runner.results)} runs, {time.time() - began:.0f} s; wrote {name}.png and {name}.json.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
