"""Starts the scripts of launch/ with an environment of their own, and ends all that they started."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
# what the scripts read, and what batch systems or torchrun may have left
OURS = (
    "NGPU NNODES NODE_RANK CONFIG LOG_RANK LOG_DIR HEAD PORT JOB RDZV RDZV_CONF LOCAL_ADDR MAX_RESTARTS DRY_RUN NTASKS"
)
PREFIXES = ("SLURM_", "SBATCH_", "PET_", "MASTER_", "TORCHELASTIC_", "GLOO_")


def environment(**changes: object) -> dict[str, str]:
    """That of the tests without settings of a launcher, and with some changed."""
    kept = {key: value for key, value in os.environ.items() if key not in OURS.split() and not key.startswith(PREFIXES)}
    changed = {key: str(value) for key, value in changes.items()}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **changed}


def call(script: str, *arguments: str, cwd: Path = ROOT, **changes: object) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(
        command, env=environment(**changes), cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def dry_run(script: str, *arguments: str, **changes: object) -> list[str]:
    """The command that a script would start; nothing else may be printed."""
    done = call(script, "--dry-run", *arguments, **changes)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    return shlex.split(done.stdout)


def tiny_config(folder: Path, **changes: Any) -> Path:
    """A run of any number of ranks; ``train__steps=3`` changes ``train.steps``."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(60)]
    (folder / "words.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(20)))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tree: dict[str, dict[str, Any]] = {
        "model": {"type": "llama", "config": {**sizes, "num_key_value_heads": 2}},
        "data": {"source": str(folder / "words.txt"), "sequence_length": 32, "cache_dir": str(folder / "cache")},
        "train": {"steps": 300, "global_batch_tokens": 256, "device_batch": 8, "device": "cpu", "dtype": "float32"},
        "parallel": {"dp_shard": -1, "timeout_seconds": 60},
        "log": {"dir": str(folder / "runs"), "every": 1, "plot": False, "progress": "lines"},
        "checkpoint": {"every": 100_000, "async_save": False},
    }
    tree["train"].update(threads=1, eval_every=0, eval_tokens=256)
    for key, value in changes.items():
        section, inner = key.split("__")
        tree[section][inner] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@contextmanager
def started(command: list[str], log: Path, **changes: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards, with all that it started."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment(**changes), cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()


def descendants(pid: int) -> list[int]:
    """Children and theirs; torchrun's ranks have sessions of their own."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    children = [int(line) for line in found.stdout.split()]
    return [other for child in children for other in (*descendants(child), child)]


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, read(log)[-5000:]
        time.sleep(0.05)


def finish(process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not finished in time\n{read(log)[-5000:]}") from None


def read(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""
