"""Cutting a step into forward passes, and arranging processes."""

from __future__ import annotations

import pytest

from distmuon.pretrain.batch import plan_batches
from distmuon.pretrain.config import ParallelConfig, TrainConfig
from distmuon.pretrain.errors import UserError
from distmuon.pretrain.parallel import Layout, resolve_layout


def test_accumulation_follows_from_the_batch() -> None:
    plan = plan_batches(TrainConfig(tokens=10_000, global_batch_tokens=4096, device_batch=8), 128)
    assert (plan.sequences, plan.accumulation, plan.tokens, plan.steps) == (32, 4, 4096, 2)


def test_data_ranks_share_the_batch() -> None:
    plan = plan_batches(TrainConfig(steps=1, global_batch_tokens=4096, device_batch=8), 128, data_ranks=4)
    assert plan.accumulation == 1


@pytest.mark.parametrize(
    ("total", "device_batch", "fits"),
    [
        (4000, 8, "set train.global_batch_tokens to 3072 or 4096."),
        (4096, 12, "set train.global_batch_tokens to 3072 or 4608, or train.device_batch to 8."),
        (100, 8, "set train.global_batch_tokens to 1024."),
    ],
)
def test_a_batch_that_does_not_divide_names_numbers_that_do(total: int, device_batch: int, fits: str) -> None:
    with pytest.raises(UserError) as error:
        plan_batches(TrainConfig(steps=1, global_batch_tokens=total, device_batch=device_batch), 128)
    assert str(total) in str(error.value)
    assert str(error.value).endswith(fits)


def test_fewer_tokens_than_a_step() -> None:
    with pytest.raises(UserError, match="at least 4096 tokens"):
        plan_batches(TrainConfig(tokens=4095, global_batch_tokens=4096, device_batch=8), 128)


@pytest.mark.parametrize("config", [ParallelConfig(), ParallelConfig(dp_shard=-1), ParallelConfig(1, 1, -1)])
def test_one_process(config: ParallelConfig) -> None:
    assert resolve_layout(config, 1) == Layout(1, 1, 1)


@pytest.mark.parametrize(
    ("config", "world", "words"),
    [
        (ParallelConfig(dp_shard=2), 1, "set parallel.dp_shard to 1"),
        (ParallelConfig(dp_replicate=2, dp_shard=3), 8, "set parallel.dp_shard to 4"),
        (ParallelConfig(dp_replicate=3, dp_shard=-1), 8, "set parallel.dp_replicate to 8"),
        (ParallelConfig(dp_replicate=-1, dp_shard=-1), 8, "only one can be"),
        (ParallelConfig(tp=0), 1, "parallel.tp is 0"),
        (ParallelConfig(dp_shard=-1), 2, "this version trains on one"),
    ],
)
def test_a_layout_that_does_not_fit_says_what_would(config: ParallelConfig, world: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_layout(config, world)
