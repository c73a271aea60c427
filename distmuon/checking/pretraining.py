"""The check of a pretraining config: its model, in the layout of its ``parallel`` section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.checking.check import check
from distmuon.checking.report import CheckReport
from distmuon.pretrain.config import Config, validate
from distmuon.pretrain.data import open_tokenizer
from distmuon.pretrain.errors import UserError
from distmuon.pretrain.evaluate import language_model_loss
from distmuon.pretrain.model import build_model, model_config
from distmuon.pretrain.optimizer import muon_options
from distmuon.pretrain.parallel import resolve_layout
from distmuon.pretrain.parse import parse_command
from distmuon.pretrain.precision import autocast, choose_device, choose_dtype
from distmuon.pretrain.processes import local_rank, rank, world_size
from distmuon.pretrain.sharding import Placed, build_mesh, place

_SEQUENCES = 2


def read_config(arguments: Sequence[str], prog: str) -> Config:
    """The config of a command line of ``distmuon pretrain``.

    Raises:
        UserError: for a setting that does not exist or cannot work, or an optimizer that is not Muon.
    """
    config = parse_command(arguments, prog).config
    validate(config)
    if config.optim.name != "muon":
        raise UserError(f"optim.name is {config.optim.name}, and the check is of muon: add --optim.name muon.")
    resolve_layout(config.parallel, world_size())
    return config


def check_config(
    config: Config, *, steps: int, micro_batches: int, tolerance: float | None, options: dict[str, Any]
) -> CheckReport:
    """Check the model of a config as :func:`distmuon.check` does, on random tokens, without its data.

    Args:
        config: From `read_config`; ``train.compile`` is left out, as it does not reach the update.
        steps: See :func:`distmuon.check`, as the others.
        micro_batches: Forward passes of a step, with communication as in training.
        tolerance: Allowed error.
        options: Arguments of :class:`distmuon.Muon` that come before those of the config.

    Raises:
        UserError: if the model cannot be made or sharded.
    """
    layout = resolve_layout(config.parallel, world_size())
    device = choose_device(config.train.device, local_rank() if layout.world > 1 else None)
    dtype = choose_dtype(config.train.dtype, device)
    length = config.data.sequence_length
    vocabulary = config.model.config.get("vocab_size") or open_tokenizer(config.data.tokenizer).vocab_size
    lm_config = model_config(config.model, vocabulary, length)
    mesh = build_mesh(layout, device)
    placed: dict[nn.Module, Placed] = {}

    def build() -> nn.Module:
        return build_model(
            lm_config, seed=config.train.seed, activation_checkpointing=config.train.activation_checkpointing
        )

    def shard(model: nn.Module) -> nn.Module:
        found = place(model, lm_config, layout, mesh, device=device, dtype=dtype)
        placed[found.wrapped] = found
        return found.wrapped

    def loss(model: nn.Module, step: int, micro_batch: int) -> Tensor:
        seed = (step * micro_batches + micro_batch) * layout.data_ranks + layout.data_rank(rank())
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(lm_config.vocab_size, (_SEQUENCES, length + 1), generator=generator).to(device)
        with placed[model].micro_batch(last=micro_batch == micro_batches - 1), autocast(device, dtype):
            return language_model_loss(model, tokens[:, :-1], tokens[:, 1:])

    return check(
        build,
        shard,
        batch_fn=loss,
        steps=steps,
        micro_batches=micro_batches,
        tolerance=tolerance,
        **{**muon_options(config.optim), **options},
    )
