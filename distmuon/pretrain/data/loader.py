"""Batches for training, which can be resumed exactly, and for validation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from distmuon.pretrain.data.config import DataConfig
from distmuon.pretrain.data.corpus import Corpus
from distmuon.pretrain.data.order import ShuffledBatches
from distmuon.pretrain.data.windows import Batch, Windows
from distmuon.pretrain.errors import UserError


def train_loader(
    corpus: Corpus,
    config: DataConfig,
    device_batch: int,
    seed: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> StatefulDataLoader[Batch]:
    """Endless shuffled training batches.

    Call ``iter`` once and draw from that. ``state_dict`` of the loader is a few numbers; after
    ``load_state_dict`` on a new loader, ``iter`` goes on with the very next batch. A loader with another batch
    size or another number of ranks goes on with the next sample.

    Args:
        corpus: The data.
        config: Its settings; ``sequence_length`` is T.
        device_batch: b, the samples in one batch of one rank.
        seed: Seed of the order; None means ``config.seed``.
        rank: This process.
        world_size: How many processes share each global batch.
        num_workers: Processes that read ahead; reading mapped tokens is cheap without any.

    Returns:
        A loader of ``{"input_ids", "labels"}``, int64 of shape (b, T); ``labels[:, t]`` is the token after
        ``input_ids[:, t]``.

    Raises:
        UserError: The training data are shorter than one sample, or ``device_batch`` is below 1. When
            iterating: a loaded state belongs to other data or another seed.
        ValueError: ``rank`` is not below ``world_size``.
    """
    windows = Windows(corpus.train, config.sequence_length)
    seed = config.seed if seed is None else seed
    with warnings.catch_warnings():
        # torchdata calls a function that newer versions of torch call deprecated
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        return StatefulDataLoader(
            windows,
            batch_sampler=ShuffledBatches(len(windows), device_batch, seed, rank, world_size),
            collate_fn=_as_is,
            num_workers=num_workers,
            # without its own generator, ``iter`` would draw from the global one and disturb the model's
            generator=torch.Generator().manual_seed(seed),
        )


def val_batches(
    corpus: Corpus,
    config: DataConfig,
    device_batch: int,
    max_tokens: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The same validation batches at every call, spread evenly over the validation data.

    Args:
        corpus: The data.
        config: Its settings; ``sequence_length`` is T.
        device_batch: b, the samples in one batch; the last batch may have fewer.
        max_tokens: Predict at most this many tokens over all ranks, but at least one sample a rank; None
            takes all.
        rank: This process.
        world_size: How many processes share the samples; each gets batches of the same shapes, and up to
            ``world_size - 1`` samples are left out.

    Yields:
        ``{"input_ids", "labels"}`` as from ``train_loader``.

    Raises:
        UserError: There are fewer samples than ranks, or ``device_batch`` is below 1.
    """
    windows = Windows(corpus.val, config.sequence_length)
    if device_batch < 1:
        raise UserError(f"the device batch is {device_batch}, but must be at least 1; set a positive number.")
    if len(windows) < world_size:
        raise UserError(
            f"the validation data make {len(windows)} samples, but each of {world_size} ranks needs one; "
            "give more text, or raise data.val_fraction."
        )
    count = len(windows)
    if max_tokens is not None:
        count = min(count, max(world_size, max_tokens // config.sequence_length))
    count -= count % world_size
    chosen = np.linspace(0, len(windows) - 1, count).astype(np.int64)[rank::world_size].tolist()
    for start in range(0, len(chosen), device_batch):
        yield windows.__getitems__(chosen[start : start + device_batch])


def _as_is(batch: Batch) -> Batch:
    """``Windows`` already returns whole batches."""
    return batch
