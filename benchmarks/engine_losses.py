"""Does it matter to a training run which engine orthogonalizes? Loss curves of each engine, beside those of seeds.

    python benchmarks/engine_losses.py                   # configs/debug.yaml: each engine at seed 0, "auto" at 4 seeds
    python benchmarks/engine_losses.py --steps 120       # a shorter run with its own whole schedule

At one seed, weights and data are the same for all engines, so that what differs is the engine. A seed changes weights
and the order of the data. The spread of final validation losses over engines is put beside that over seeds: range
(largest minus smallest) and standard deviation.

``standard`` runs the quintic of torch.optim.Muon, in bfloat16 where the device multiplies it in hardware and in
float32 elsewhere, as emulated products would take minutes a step; ``--emulated`` runs its very bits all the same.
``auto`` is what the optimizer does unless told otherwise.

Every run is one process with one thread. Finished runs are kept in the output folder, so the same command goes on
after an interruption; a file of the folder belongs to the code that made it, so take a new folder after a change.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from engine_losses_report import Outcome, draw, same_curves, spread_line, spreads
from rich.console import Console

import distmuon
from distmuon.numerics.hardware import has_native_bf16
from distmuon.pretrain import CheckpointConfig, Config, LogConfig, load_config, train

ROOT = Path(__file__).parent.parent
ENGINES = ("standard", "composed", "gram", "rational", "auto")


@dataclass(frozen=True)
class Run:
    """One training run; ``steps`` None takes those of the config."""

    config: str
    engine: str
    seed: int
    steps: int | None = None
    emulated: bool = False

    @property
    def ns_dtype(self) -> str:
        """``"float32"`` for the standard engine where bfloat16 would be emulated."""
        return "float32" if self.engine == "standard" and not (self.emulated or has_native_bf16("cpu")) else "bfloat16"

    def settings(self, folder: str) -> Config:
        """The trainer's settings, which write to ``folder``."""
        config = load_config(self.config, f"--optim.ns_engine={self.engine}", f"--optim.ns_dtype={self.ns_dtype}")
        steps = self.steps or config.train.steps
        assert steps is not None
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, seed=self.seed),
            train=dataclasses.replace(
                config.train,
                steps=steps,
                seed=self.seed,
                device="cpu",
                dtype="float32",
                threads=1,
                eval_every=max(1, steps // 16),
                sample_tokens=0,
            ),
            log=LogConfig(dir=folder, name="run", every=steps, progress="off", plot=False),
            checkpoint=CheckpointConfig(every=0),
        )


def execute(run: Run, folder: Path) -> Outcome:
    """The outcome of a run, from the folder if it is there already; for a worker process."""
    settings = dataclasses.asdict(run.settings(""))
    versions = [distmuon.__version__, torch.__version__]
    content = json.dumps([settings, versions], sort_keys=True)
    path = (
        folder / f"{run.engine}-{run.ns_dtype}-seed{run.seed}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.json"
    )
    if path.exists():
        return Outcome.of(json.loads(path.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as scratch:
        done = train(run.settings(scratch))
    outcome = Outcome(run.engine, run.seed, run.ns_dtype, done.validation_loss, done.seconds, done.validation_curve)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(outcome), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return outcome


def execute_all(runs: Sequence[Run], folder: Path, workers: int, console: Console) -> list[Outcome]:
    """All runs, each in a worker process, in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    # inherited by the workers, where it must be set before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[Run, Outcome] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(execute, run, folder): run for run in runs}
        for number, future in enumerate(as_completed(futures), 1):
            outcome = found[futures[future]] = future.result()
            label = f"{outcome.engine} ({outcome.ns_dtype}), seed {outcome.seed}"
            console.print(f"[{number}/{len(runs)}] {label}: {outcome.loss:.4f}, {outcome.seconds:.0f} s", markup=False)
    return [found[run] for run in runs]


def plan(
    config: str, engines: Sequence[str], seeds: Sequence[int], of_seeds: str, *, steps: int | None, emulated: bool
) -> list[Run]:
    """Every engine at the first seed, and one of them at every seed."""
    pairs = [(engine, seeds[0]) for engine in engines] + [(of_seeds, seed) for seed in seeds]
    return [Run(config, engine, seed, steps, emulated) for engine, seed in dict.fromkeys(pairs)]


def main() -> None:
    """Parse the command line, train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/debug.yaml")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2, 3))
    parser.add_argument("--seeds-of", default="auto", choices=ENGINES, help="the engine that runs at every seed")
    parser.add_argument("--steps", type=int, help="instead of those of the config")
    parser.add_argument("--emulated", action="store_true", help="standard in bfloat16 even where that is emulated")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/engine_losses", help="folder of the finished runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--picture", type=Path, help="draw the curves here, such as docs/engine_losses.png")
    args = parser.parse_args()
    console = Console(highlight=False)
    runs = plan(str(args.config), args.engines, args.seeds, args.seeds_of, steps=args.steps, emulated=args.emulated)
    steps = args.steps or load_config(str(args.config)).train.steps
    console.print(f"{args.config.name}, {steps} steps, {len(runs)} runs; torch {torch.__version__}, CPU")
    outcomes = execute_all(runs, args.out, args.workers, console)
    alike = [names for names, _ in same_curves([found for found in outcomes if found.seed == args.seeds[0]])]
    console.print("curves: " + ", ".join(alike))
    over_engines, over_seeds = spreads(outcomes, seed=args.seeds[0], engine=args.seeds_of)
    console.print(spread_line(f"over {len(over_engines.losses)} engines, seed {args.seeds[0]}", over_engines))
    console.print(spread_line(f"over {len(over_seeds.losses)} seeds, engine {args.seeds_of}", over_seeds))
    ratio = over_engines.range / over_seeds.range if over_seeds.range > 0 else float("nan")
    console.print(f"range over engines / range over seeds: {ratio:.2f}")
    if args.json:
        document: dict[str, Any] = {
            "config": args.config.name,
            "steps": steps,
            "versions": {"distmuon": distmuon.__version__, "torch": torch.__version__},
            "runs": [dataclasses.asdict(outcome) for outcome in outcomes],
            "over_engines": dataclasses.asdict(over_engines),
            "over_seeds": dataclasses.asdict(over_seeds),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(outcomes, args.picture, seed=args.seeds[0], engine=args.seeds_of)


if __name__ == "__main__":
    main()
