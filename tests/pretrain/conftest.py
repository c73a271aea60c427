from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from harness import Pool

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 4 kB of words: 15 steps of the tiny run are more than an epoch of it."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(20)), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tmp_path: Path, corpus_file: Path) -> Callable[..., Path]:
    """Write the config of a run of about a second; ``optim__lr=1.0`` changes ``optim.lr``."""

    def write(name: str = "tiny", **changes: Any) -> Path:
        tree: dict[str, dict[str, Any]] = {
            "model": {"type": "llama", "config": dict(MODEL)},
            "data": {"source": str(corpus_file), "sequence_length": 32, "cache_dir": str(corpus_file.parent / "cache")},
            "optim": {"lr": 3e-3, "warmup_steps": 2},
            "train": {
                "steps": 20,
                "global_batch_tokens": 256,
                "device_batch": 8,
                "device": "cpu",
                "dtype": "float32",
                "threads": 1,
                "eval_every": 8,
                "eval_tokens": 256,
            },
            "log": {"dir": str(tmp_path / "runs"), "every": 1, "plot": False, "progress": "lines"},
            "checkpoint": {"every": 6},
        }
        for key, value in changes.items():
            section, inner = key.split("__", 1)
            if section == "model" and inner != "type":
                tree["model"]["config"][inner] = value
            else:
                tree[section][inner] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    """Two ranks that live through all tests of this folder."""
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def four() -> Iterator[Pool]:
    """Four ranks that live through all tests of this folder."""
    with Pool(4) as pool:
        yield pool
