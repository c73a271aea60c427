"""Which learning rates carry over from a narrow model to a wide one? Each ``adjust_lr_fn`` at widths 128 to 1024.

    python benchmarks/lr_sweep.py --picture docs/lr_sweep.png    # 52 minutes on a core shared with other work
    python benchmarks/lr_sweep.py --widths 128 256               # the narrow ones alone

A Llama of one layer learns the built-in corpus, byte by byte, for 60 steps of 512 tokens, with warm-up and a straight
line to zero. Learning rates of the matrices are apart by factors of two; AdamW's, for embedding, head and norms, is the
same everywhere, and nothing decays, so that within a width the scale of the matrices is all that differs. Weights are
drawn with a standard deviation of 0.64 / sqrt(width), which is 0.02 at 1024, so that layers of all widths begin alike.

The narrowest width gets seven rates, a wider one the best of the width before and its neighbours, and more of them
while the best lies at the edge. The best rate is the lowest point of a parabola through the best one tried and its
neighbours, over the logarithm of the rate. Every run has one thread. Finished runs are kept in the output folder, so
that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lr_sweep_report import Curve, draw, make_table, moves
from rate_grids import extend_grids
from rich.console import Console
from token_efficiency_runs import SEQUENCE, Run, Runner, Size

import distmuon
from distmuon.pretrain import Config, DataConfig
from distmuon.pretrain.data import open_corpus

Scale = Literal["original", "match_rms_adamw", "spectral", "none"]
SCALES: tuple[Scale, ...] = ("original", "match_rms_adamw", "spectral", "none")
# near the best rate at the narrowest width, by a few runs by hand
FIRST: dict[Scale, float] = {"original": 0.04, "match_rms_adamw": 0.02, "spectral": 0.04, "none": 0.04}
ADAMW_LR = 2e-3
SPREAD_AT_1024 = 0.02
MAX_EXTENSIONS = 4


@dataclass(frozen=True)
class SweepRun(Run):
    """A run of one learning rate; ``lr`` is that of the matrices."""

    scale: Scale = "original"

    @property
    def label(self) -> str:
        """A name for log and files."""
        return f"{self.size.hidden}-{self.scale}-lr{self.lr:g}-seed{self.seed}"

    def config(self, folder: str) -> Config:
        """The trainer's settings, which write to ``folder``."""
        config = super().config(folder)
        spread = SPREAD_AT_1024 * math.sqrt(1024 / self.size.hidden)
        sizes = {**config.model.config, "initializer_range": spread}
        changes: dict[str, Any] = {"adjust_lr_fn": self.scale, "adamw_lr": ADAMW_LR, "weight_decay": 0.0}
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, config=sizes),
            optim=dataclasses.replace(config.optim, **changes),
            train=dataclasses.replace(config.train, eval_every=0, eval_tokens=8192),
        )


def rates_around(middle: float, reach: int) -> list[float]:
    """``middle`` and its multiples by powers of two, ``reach`` of them on each side."""
    return [middle * 2.0**power for power in range(-reach, reach + 1)]


def sweep_width(
    runner: Runner, size: Size, starts: Mapping[Scale, float], reach: int, seeds: Sequence[int]
) -> dict[Scale, Curve]:
    """The losses at one width; more rates are tried while the best one is at the edge.

    Args:
        runner: Executes the runs.
        size: Width and steps.
        starts: The middle of the first rates, by scale; other scales are left out.
        reach: Rates on each side of it.
        seeds: Seeds of every rate.

    Returns:
        By scale.
    """

    def measure(grids: dict[Scale, list[float]]) -> dict[Scale, Curve]:
        wanted = {scale: _runs(size, scale, grid, seeds) for scale, grid in grids.items()}
        runner.run(f"width {size.hidden}", [run for runs in wanted.values() for run in runs])
        return {scale: _curve(runner, runs) for scale, runs in wanted.items()}

    return extend_grids(measure, {scale: rates_around(start, reach) for scale, start in starts.items()}, MAX_EXTENSIONS)


def _runs(size: Size, scale: Scale, rates: Sequence[float], seeds: Sequence[int]) -> list[SweepRun]:
    return [SweepRun(size, "muon", lr, seed, scale=scale) for lr in rates for seed in seeds]


def _curve(runner: Runner, runs: Sequence[SweepRun]) -> Curve:
    losses: dict[float, list[float]] = {}
    for run in runs:
        losses.setdefault(run.lr, []).append(runner.results[run].loss)
    return Curve(runs[0].scale, runs[0].size.hidden, losses)


def sweep(runner: Runner, sizes: Sequence[Size], seeds: Sequence[int], *, seeds_to: int, scales_to: int) -> list[Curve]:
    """All widths in turn, the narrowest first.

    Args:
        runner: Executes the runs.
        sizes: By rising width.
        seeds: Those of the narrow widths; wider ones take the first.
        seeds_to: The largest width that takes all seeds.
        scales_to: The largest width that takes all scales; wider ones take the first two.
    """
    starts: dict[Scale, float] = dict(FIRST)
    found: list[Curve] = []
    for index, size in enumerate(sizes):
        scales = SCALES if size.hidden <= scales_to else SCALES[:2]
        chosen = {scale: starts[scale] for scale in scales}
        curves = sweep_width(runner, size, chosen, 1 if index else 3, seeds if size.hidden <= seeds_to else seeds[:1])
        found.extend(curves.values())
        starts = {scale: curve.best_tried for scale, curve in curves.items()}
    return found


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=(128, 256, 512, 1024))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--seeds-to", type=int, default=256, help="wider models take the first seed alone")
    parser.add_argument("--scales-to", type=int, default=512, help="wider models take the first two scales alone")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/lr_sweep"), help="folder of the finished runs")
    parser.add_argument("--json", type=Path, help="write the figures here; without it, into the folder")
    parser.add_argument("--picture", type=Path, help="draw losses here, such as docs/lr_sweep.png")
    args = parser.parse_args()
    console = Console(highlight=False)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    corpus = open_corpus(DataConfig(sequence_length=SEQUENCE))  # tokenized once, before the workers ask for it
    console.print(f"{corpus.description}; {args.layers} layers, {args.steps} steps; torch {torch.__version__}, CPU")
    sizes = [Size(f"width{width}", width, args.layers, args.steps, 1) for width in sorted(args.widths)]
    runner = Runner(args.out / "runs", args.workers, console)
    try:
        curves = sweep(runner, sizes, args.seeds, seeds_to=args.seeds_to, scales_to=args.scales_to)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on with the runs that are missing.")
        return 130
    finally:
        runner.close()
    console.print(make_table(curves))
    for line in moves(curves):
        console.print(line)
    document: dict[str, Any] = {
        "corpus": corpus.description,
        "layers": args.layers,
        "steps": args.steps,
        "adamw_lr": ADAMW_LR,
        "versions": {"distmuon": distmuon.__version__, "torch": torch.__version__},
        "training_seconds": sum(result.seconds for result in runner.results.values()),
        "curves": [
            {**dataclasses.asdict(curve), "best_lr": curve.best, "best_lr_by_seed": curve.best_by_seed}
            for curve in curves
        ],
    }
    path = args.json or args.out / "found.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(curves, args.picture)
    spent = math.fsum(result.seconds for result in runner.results.values())
    console.print(f"{len(runner.results)} runs, {spent:.0f} s of training; wrote {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
