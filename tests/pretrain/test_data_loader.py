"""Packing, order, exact resume and the shares of several ranks."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmuon.pretrain.data import (
    Corpus,
    DataConfig,
    TokenStream,
    check_vocabulary,
    train_loader,
    val_batches,
)
from distmuon.pretrain.errors import UserError


def make_corpus(train: int = 101, val: int = 41) -> Corpus:
    """Tokens that count up, so that a sample shows where it is from; in two parts."""
    ids = np.arange(train, dtype=np.uint16)
    parts = [ids[: train // 3], ids[train // 3 :]]
    return Corpus(
        TokenStream(parts), TokenStream([np.arange(val, dtype=np.uint16)]), None, max(train, val), None, "counted"
    )


def starts(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def take(loader: object, count: int) -> list[list[int]]:
    return [starts(batch) for batch in itertools.islice(loader, count)]  # type: ignore[call-overload]


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(2, 60), length=st.integers(1, 20), batch=st.integers(1, 4))
def test_an_epoch_predicts_every_token_once(tokens: int, length: int, batch: int) -> None:
    corpus, config = make_corpus(tokens), DataConfig(sequence_length=length)
    if tokens <= length:
        with pytest.raises(UserError, match=rf"{tokens} tokens.*at least {length + 1}"):
            train_loader(corpus, config, batch)
        return
    windows = (tokens - 1) // length
    # as many batches as make whole epochs
    seen = itertools.islice(train_loader(corpus, config, batch), windows)
    inputs, labels = zip(*((b["input_ids"], b["labels"]) for b in seen), strict=True)
    assert torch.equal(torch.cat(labels), torch.cat(inputs) + 1)
    counts = np.bincount(torch.cat(labels).flatten().numpy(), minlength=tokens)
    assert counts[1 : windows * length + 1].tolist() == [batch] * (windows * length)
    assert counts[0] == counts[windows * length + 1 :].sum() == 0


def test_batches_have_the_promised_form() -> None:
    batch = next(iter(train_loader(make_corpus(), DataConfig(sequence_length=7), 3)))
    assert sorted(batch) == ["input_ids", "labels"]
    for tensor in batch.values():
        assert tensor.shape == (3, 7) and tensor.dtype == torch.int64 and tensor.is_contiguous()


def test_order_depends_on_seed_and_epoch_only() -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=5, seed=3)
    first = take(train_loader(corpus, config, 20), 2)
    assert first == take(train_loader(corpus, config, 20, seed=3), 2)
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1])
    assert first != take(train_loader(corpus, config, 20, seed=4), 2)


def test_the_loader_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    next(iter(train_loader(make_corpus(), DataConfig(sequence_length=5), 2)))
    assert torch.equal(torch.rand(3), wanted)


# 20 windows and batches of 3: 0 is before the start, 6 and 7 surround the border of the first epoch
@pytest.mark.parametrize("done", [0, 1, 6, 7, 13])
def test_resume_gives_the_very_next_batch(done: int) -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=5)
    whole = take(train_loader(corpus, config, 3), done + 20)
    loader = train_loader(corpus, config, 3)
    batches = iter(loader)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    assert len(json.dumps(state)) < 400

    fresh = train_loader(corpus, config, 3)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert take(fresh, 20) == whole[done:]
    # taking the state does not disturb the loader it is taken from
    assert [starts(next(batches)) for _ in range(20)] == whole[done:]


def test_resume_with_another_batch_size_goes_on_with_the_next_sample() -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=5)
    whole = list(itertools.chain(*take(train_loader(corpus, config, 1), 24)))
    loader = train_loader(corpus, config, 4)
    take_two = iter(loader)
    next(take_two), next(take_two)
    fresh = train_loader(corpus, config, 2)
    fresh.load_state_dict(copy.deepcopy(loader.state_dict()))
    assert list(itertools.chain(*take(fresh, 8))) == whole[8:]


@pytest.mark.parametrize(
    ("tokens", "seed", "message"), [(90, 0, "samples 20.*17.*changed"), (101, 1, "seed 0.*1.*changed")]
)
def test_a_state_of_another_run_is_refused(tokens: int, seed: int, message: str) -> None:
    config = DataConfig(sequence_length=5)
    loader = train_loader(make_corpus(), config, 2)
    next(iter(loader))
    other = train_loader(make_corpus(tokens), config, 2, seed=seed)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(UserError, match=message):
        iter(other)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_same_global_batches(world: int) -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=5)
    alone = take(train_loader(corpus, config, 2 * world), 15)
    ranks = [take(train_loader(corpus, config, 2, rank=r, world_size=world), 15) for r in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == alone


def test_val_batches_are_the_same_every_time_and_cover_all() -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=4)
    found = [b["labels"] for b in val_batches(corpus, config, 3)]
    assert [len(b) for b in found] == [3, 3, 3, 1]
    assert sorted(torch.cat(found).flatten().tolist()) == list(range(1, 41))
    again = [b["labels"] for b in val_batches(corpus, config, 3)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_val_batches_keep_to_the_limit() -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=4)
    chosen = [starts(b) for b in val_batches(corpus, config, 2, max_tokens=15)]
    assert chosen == [[0, 16], [36]]  # three of ten windows, spread from the first to the last
    assert [starts(b) for b in val_batches(corpus, config, 2, max_tokens=1)] == [[0]]


def test_val_ranks_get_the_same_shapes() -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=4)
    ranks = [[starts(b) for b in val_batches(corpus, config, 2, rank=r, world_size=3)] for r in range(3)]
    assert [[len(b) for b in rank] for rank in ranks] == [[2, 1]] * 3
    merged = [s for rank in ranks for batch in rank for s in batch]
    assert len(set(merged)) == 9
    with pytest.raises(UserError, match=r"10 samples.*11 ranks"):
        next(val_batches(corpus, config, 2, world_size=11))


def test_bad_sizes_are_refused() -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=4)
    with pytest.raises(UserError, match=r"batch is 0"):
        train_loader(corpus, config, 0)
    with pytest.raises(UserError, match=r"batch is 0"):
        next(val_batches(corpus, config, 0))
    with pytest.raises(ValueError, match=r"rank 2"):
        train_loader(corpus, config, 1, rank=2, world_size=2)


def test_check_vocabulary_names_the_largest_id() -> None:
    check_vocabulary(make_corpus(), 101)
    with pytest.raises(UserError, match=r"token id 100.*vocabulary has 100 ids.*at least 101"):
        check_vocabulary(make_corpus(), 100)
    with pytest.raises(UserError, match=r"token id 400"):
        check_vocabulary(make_corpus(val=401), 200)


def test_worker_processes_give_the_same_batches(tmp_path: Path) -> None:
    corpus, config = make_corpus(), DataConfig(sequence_length=5)
    whole = take(train_loader(corpus, config, 3), 8)
    loader = train_loader(corpus, config, 3, num_workers=1)
    assert take(loader, 4) == whole[:4]
    fresh = train_loader(corpus, config, 3, num_workers=1)
    fresh.load_state_dict(loader.state_dict())
    assert take(fresh, 4) == whole[4:]
