"""Training runs of the benchmarks of losses: their settings, their execution in processes, their results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import distmuon
from distmuon.pretrain import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    Summary,
    TrainConfig,
    UserError,
    train,
)

SEQUENCE, BATCH = 128, 4  # 512 tokens a step: small steps suit AdamW, which loses more by large ones


@dataclass(frozen=True)
class Size:
    """A Llama of a hidden size, and the training tokens and validations of its full-length runs."""

    name: str
    hidden: int
    layers: int
    steps: int
    validations: int


@dataclass(frozen=True)
class Run:
    """One training run; ``fraction`` is its share of the size's steps."""

    size: Size
    optimizer: str
    lr: float
    seed: int = 0
    fraction: float = 1.0

    @property
    def label(self) -> str:
        """A name for log and files."""
        part = "" if self.fraction == 1 else f"-part{self.fraction:g}"
        return f"{self.size.name}-{self.optimizer}-lr{self.lr:g}-seed{self.seed}{part}"

    def config(self, folder: str) -> Config:
        """The trainer's settings, which write to ``folder``."""
        size = self.size
        steps = round(size.steps * self.fraction)
        heads = max(2, size.hidden // 32)
        return Config(
            model=ModelConfig(
                "llama",
                {
                    "hidden_size": size.hidden,
                    "intermediate_size": math.ceil(size.hidden * 8 / 3 / 32) * 32,
                    "num_hidden_layers": size.layers,
                    "num_attention_heads": heads,
                    "num_key_value_heads": heads,
                    "tie_word_embeddings": False,
                },
            ),
            data=DataConfig(sequence_length=SEQUENCE, seed=self.seed),
            # warm-up, then a straight line to zero
            optim=OptimConfig(
                name="muon" if self.optimizer == "muon" else "adamw",
                lr=self.lr,
                weight_decay=0.1,
                betas=[0.9, 0.95],
                adjust_lr_fn="match_rms_adamw",
                schedule="wsd",
                warmup_steps=round(0.05 * steps),
                warmdown_ratio=1.0,
            ),
            train=TrainConfig(
                steps=steps,
                global_batch_tokens=SEQUENCE * BATCH,
                device_batch=BATCH,
                dtype="float32",
                device="cpu",
                threads=1,
                seed=self.seed,
                eval_every=max(1, steps // size.validations),
                eval_tokens=32_768,
            ),
            log=LogConfig(dir=folder, name="run", every=max(1, steps // 10), progress="off", plot=False),
            checkpoint=CheckpointConfig(every=0),
        )

    def beyond_config(self) -> dict[str, Any]:
        """What a result depends on beside the trainer's settings."""
        return {}

    def train(self, folder: str) -> Summary:
        """Train; the trainer writes to ``folder``."""
        return train(self.config(folder))


@dataclass(frozen=True)
class Result:
    """What is kept of a run: losses in nats a token, infinite where it diverged."""

    loss: float
    bits_per_byte: float | None = None
    parameters: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)


def execute(run: Run, folder: Path) -> tuple[Result, bool]:
    """The result of a run, and whether it was there already; for a worker process."""
    settings = {**dataclasses.asdict(run.config("")), **run.beyond_config()}
    del settings["log"]
    settings["versions"] = [distmuon.__version__, torch.__version__, platform.python_version()]
    content = json.dumps(settings, sort_keys=True)
    path = folder / f"{run.label}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))["result"]
        kept["curve"] = [(tokens, loss) for tokens, loss in kept["curve"]]
        return Result(**kept), True
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = run.train(scratch)
        except UserError as error:
            if "not finite" not in str(error):
                raise
            result = Result(math.inf)
        else:
            result = Result(
                done.validation_loss,
                done.bits_per_byte,
                done.parameters,
                done.tokens,
                done.seconds,
                done.validation_curve,
            )
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    document = {"settings": settings, "result": dataclasses.asdict(result)}
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return result, False


class Runner:
    """Executes runs in worker processes and remembers their results."""

    def __init__(self, folder: Path, workers: int, console: Console) -> None:
        self.results: dict[Run, Result] = {}
        self._folder, self._console = folder, console
        # inherited by the workers, where it must be set before torch is imported
        os.environ["OMP_NUM_THREADS"] = "1"
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    def run(self, title: str, runs: Sequence[Run]) -> None:
        """Execute the runs that are not known yet, the longest first."""
        new = [run for run in dict.fromkeys(runs) if run not in self.results]
        new.sort(key=lambda run: -run.size.hidden * run.size.steps * run.fraction)
        if new:
            self._console.rule(f"{title}: {len(new)} runs", align="left")
        futures = {self._pool.submit(execute, run, self._folder): run for run in new}
        for number, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            self.results[run], kept = future.result()
            result = self.results[run]
            note = "kept from before" if kept else f"{result.seconds:.0f} s"
            loss = "diverged" if math.isinf(result.loss) else f"loss {result.loss:.4f}"
            self._console.print(f"[{number}/{len(new)}] {run.label}: {loss} ({note})", highlight=False, markup=False)

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)
