"""Cutting a step into forward passes, and arranging processes."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distmuon.pretrain.batch import plan_batches
from distmuon.pretrain.config import ParallelConfig, TrainConfig
from distmuon.pretrain.data.order import ShuffledBatches
from distmuon.pretrain.errors import UserError
from distmuon.pretrain.parallel import Layout, check_features, resolve_layout


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


def test_a_device_batch_over_the_share_of_a_rank_is_made_smaller() -> None:
    config = TrainConfig(steps=1, global_batch_tokens=4096, device_batch=16)
    plans = {ranks: plan_batches(config, 128, data_ranks=ranks) for ranks in (1, 2, 4, 32)}
    assert {ranks: (plan.device_batch, plan.accumulation) for ranks, plan in plans.items()} == {
        1: (16, 2),
        2: (16, 1),
        4: (8, 1),
        32: (1, 1),
    }


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
        (ParallelConfig(tp=2), 8, "set parallel.dp_shard to 4"),
    ],
)
def test_a_layout_that_does_not_fit_says_what_would(config: ParallelConfig, world: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_layout(config, world)


@pytest.mark.parametrize(
    ("config", "world", "layout"),
    [
        (ParallelConfig(dp_shard=-1), 8, Layout(1, 8, 1)),
        (ParallelConfig(dp_replicate=2, dp_shard=-1), 8, Layout(2, 4, 1)),
        (ParallelConfig(dp_shard=-1, tp=4), 8, Layout(1, 2, 4)),
    ],
)
def test_minus_one_is_what_is_left(config: ParallelConfig, world: int, layout: Layout) -> None:
    assert resolve_layout(config, world) == layout


@pytest.mark.parametrize(
    ("layout", "mesh", "kind"),
    [
        (Layout(), {}, "one"),
        (Layout(dp_replicate=2), {"dp_replicate": 2}, "ddp"),
        (Layout(dp_shard=2), {"dp_shard": 2}, "fsdp"),
        (Layout(tp=2), {"tp": 2}, "tp"),
        (Layout(2, 2, 1), {"dp_replicate": 2, "dp_shard": 2}, "fsdp"),
        (Layout(1, 2, 2), {"dp_shard": 2, "tp": 2}, "fsdp"),
        # DDP takes no tensor parallel parameters
        (Layout(2, 1, 2), {"dp_replicate": 2, "dp_shard": 1, "tp": 2}, "fsdp"),
    ],
)
def test_a_layout_has_a_mesh_and_a_wrapper(layout: Layout, mesh: dict[str, int], kind: str) -> None:
    assert layout.mesh_dims == mesh
    assert (layout.fully_shards, layout.replicates) == (kind == "fsdp", kind == "ddp")


def test_ranks_of_a_tensor_parallel_group_read_the_same() -> None:
    layout = Layout(2, 2, 2)
    assert layout.data_ranks == 4
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_does_not_go_together_is_a_sentence() -> None:
    train = TrainConfig(steps=1, compile=True, activation_checkpointing=True)
    check_features(Layout(dp_shard=2), train)
    with pytest.raises(UserError, match="set one of the three off"):
        check_features(Layout(tp=2), train)


@given(ranks=st.sampled_from([1, 2, 3, 4, 8]), device_batch=st.integers(1, 24), samples=st.integers(5, 60))
def test_a_step_has_the_same_sequences_at_any_number_of_ranks(ranks: int, device_batch: int, samples: int) -> None:
    config = TrainConfig(steps=1, global_batch_tokens=24 * 16, device_batch=device_batch)
    try:
        plan = plan_batches(config, 16, data_ranks=ranks)
    except UserError:
        assume(False)
    alone = iter(ShuffledBatches(samples, 24, seed=0))
    shares = [iter(ShuffledBatches(samples, plan.device_batch, 0, rank, ranks)) for rank in range(ranks)]
    for _ in range(4):
        passes = [[next(share) for share in shares] for _ in range(plan.accumulation)]
        assert [number for ranked in passes for batch in ranked for number in batch] == next(alone)
