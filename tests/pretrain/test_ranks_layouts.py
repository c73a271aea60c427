"""A run computes the same on one process and on several, whatever their layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import rank_runs
import torch
from harness import Pool

Tiny = Callable[..., Path]

# heads have norms of their own, and there are two blocks to shard
QWEN3 = {
    "model__type": "qwen3",
    "model__head_dim": 8,
    "model__num_hidden_layers": 2,
    "train__steps": 6,
    "train__device_batch": 2,
    "train__eval_every": 3,
    "train__eval_tokens": 128,
    "train__sample_tokens": 8,
    "checkpoint__every": 0,
}
# float32 sums in another order
EXACT = {"rtol": 2e-6, "atol": 0.0}
# Newton-Schulz begins with a rounding to bfloat16, which the last bit of a float32 gradient can tip over
MUON = {"rtol": 5e-5, "atol": 0.0}
BFLOAT16 = {"rtol": 2e-3, "atol": 0.0}
OPTIMIZERS = [
    pytest.param(["--optim.name=adamw"], EXACT, id="adamw"),
    pytest.param(["--optim.name=muon"], MUON, id="muon"),
    pytest.param(["--optim.name=muon", "--optim.ns_dtype=float32"], EXACT, id="muon-float32"),
]

LAYOUTS_OF_2 = [{"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}]
LAYOUTS_OF_4 = [{"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "tp": 2}]


def flags_of(layout: dict[str, int]) -> list[str]:
    return [f"--parallel.{key}={size}" for key, size in layout.items()]


def name_of(layout: dict[str, int]) -> str:
    return "-".join(f"{key}{size}" for key, size in layout.items())


def compare(
    pool: Pool,
    path: Path,
    layout: dict[str, int],
    flags: list[str],
    tolerance: dict[str, float],
    function: Callable[..., rank_runs.Run] = rank_runs.run,
) -> None:
    one = rank_runs.run(path, flags)
    runs = pool.run(function, path, [*flags, *flags_of(layout)], timeout=120.0)
    assert all(found[:3] == runs[0][:3] for found in runs)
    torch.testing.assert_close(runs[0].losses, one.losses, **tolerance)
    torch.testing.assert_close(runs[0].validation, one.validation, **tolerance)
    # a norm is made of small differences, so it moves more than the loss
    torch.testing.assert_close(runs[0].norms, one.norms, rtol=10 * tolerance["rtol"], atol=0.0)
    assert all(found.sample == one.sample for found in runs)
    assert [record["tokens"] for record in runs[0].records] == [record["tokens"] for record in one.records]


@pytest.mark.parametrize(("optimizer", "tolerance"), OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS_OF_2, ids=name_of)
def test_two_ranks_train_as_one(
    tiny: Tiny, two: Pool, layout: dict[str, int], optimizer: list[str], tolerance: dict[str, float]
) -> None:
    compare(two, tiny(**QWEN3), layout, optimizer, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "tolerance"), OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS_OF_4, ids=name_of)
def test_four_ranks_train_as_one(
    tiny: Tiny, four: Pool, layout: dict[str, int], optimizer: list[str], tolerance: dict[str, float]
) -> None:
    # one sequence a pass: two passes a step, the gradients of which are summed before the last one communicates
    compare(four, tiny(**{**QWEN3, "train__device_batch": 1}), layout, optimizer, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS_OF_2, ids=name_of)
def test_tied_and_recomputed_models_train_as_one(tiny: Tiny, two: Pool, layout: dict[str, int]) -> None:
    path = tiny(**{**QWEN3, "model__tie_word_embeddings": True, "train__activation_checkpointing": True})
    compare(two, path, layout, ["--optim.name=adamw"], EXACT)


def test_experts_train_as_on_one(tiny: Tiny, two: Pool) -> None:
    experts = {"model__num_experts": 4, "model__num_experts_per_tok": 2, "model__moe_intermediate_size": 16}
    path = tiny(**{**QWEN3, **experts, "model__type": "qwen3_moe"})
    compare(two, path, {"dp_shard": 2}, [], MUON)


def test_bfloat16_is_as_near_as_its_rounding(tiny: Tiny, two: Pool) -> None:
    # matrices are the same as under autocast, but norms are rounded to bfloat16 where they are gathered
    compare(two, tiny(**{**QWEN3, "train__dtype": "bfloat16"}), {"dp_shard": 2}, ["--optim.name=adamw"], BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS_OF_2, ids=name_of)
def test_compiled_models_train_as_one(tiny: Tiny, two: Pool, layout: dict[str, int]) -> None:
    changes = {**QWEN3, "train__sample_tokens": 0, "train__steps": 2, "train__eval_every": 0}
    path = tiny(**{**changes, "model__num_hidden_layers": 1, "train__device_batch": 4})
    compare(two, path, layout, ["--optim.name=adamw"], EXACT, function=rank_runs.run_traced)


def test_speed_is_of_one_device_and_stats_are_logged(tiny: Tiny, two: Pool) -> None:
    found = two.run(rank_runs.run, tiny(**QWEN3), ["--parallel.dp_shard=2", "--log.step_stats=true"])[0]
    for record in found.records:
        assert record["throughput(tps)"] == pytest.approx(256 / record["time_metrics/end_to_end(s)"] / 2)
        assert record["optim/bytes_sent"] > 0
        assert math.isfinite(record["optim/wire_ms"])


def test_agreements(two: Pool) -> None:
    found = two.run(rank_runs.agreements)
    assert found[0] == found[1]
    assert found[0][:4] == [15, [2.0, 1.0], 0.5, "of rank 0"]
    assert found[0][4].startswith("train.seed is 0 on rank 0 and 1 on rank 1, and all processes")
    assert found[0][5] == "rank 0 refuses."
