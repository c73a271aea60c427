"""How a step's tokens are cut into forward passes, and how many steps a run has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distmuon.pretrain.config import TrainConfig
from distmuon.pretrain.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The sizes of one optimizer step.

    Attributes:
        sequences: Sequences of one step, over all devices.
        device_batch: Sequences of one forward pass on one device; at most ``train.device_batch``.
        accumulation: Forward passes of one device in a step.
        tokens: Tokens of one step, over all devices.
        steps: Steps of the whole run.
    """

    sequences: int
    device_batch: int
    accumulation: int
    tokens: int
    steps: int


def plan_batches(config: TrainConfig, sequence_length: int, data_ranks: int = 1) -> BatchPlan:
    """Cut the global batch into forward passes.

    Args:
        config: The ``train`` section.
        sequence_length: Tokens of a sequence.
        data_ranks: Processes that read different data.

    Raises:
        UserError: If the global batch is not a whole number of forward passes, with numbers that fit.
    """
    total = config.global_batch_tokens
    share = total // (sequence_length * data_ranks)
    device_batch = min(config.device_batch, share) or config.device_batch
    one_pass = device_batch * sequence_length * data_ranks
    if total % one_pass:
        raise UserError(_misfit(config, sequence_length, data_ranks, one_pass))
    if config.steps is not None:
        steps = config.steps
    else:
        assert config.tokens is not None, "validate() lets exactly one of tokens and steps through"
        steps = config.tokens // total
        if steps == 0:
            raise UserError(
                f"train.tokens is {config.tokens}, less than one step of train.global_batch_tokens {total}: "
                f"train on at least {total} tokens."
            )
    sequences = total // sequence_length
    return BatchPlan(sequences, device_batch, total // one_pass, total, steps)


def _misfit(config: TrainConfig, sequence_length: int, data_ranks: int, one_pass: int) -> str:
    total = config.global_batch_tokens
    below, above = total // one_pass * one_pass, math.ceil(total / one_pass) * one_pass
    fits = f"{below} or {above}" if below else str(above)
    advice = f"set train.global_batch_tokens to {fits}"
    per_rank, rest = divmod(total, sequence_length * data_ranks)
    if rest == 0:
        divisor = max(d for d in range(1, min(config.device_batch, per_rank) + 1) if per_rank % d == 0)
        advice += f", or train.device_batch to {divisor}"
    fitting = [n for n in range(data_ranks, 0, -1) if _fits(config, sequence_length, n)]
    if data_ranks > 1 and fitting:
        advice += f", or start as many processes as make {fitting[0]} data rank{'s' * (fitting[0] > 1)}"
    ranks = f" x {data_ranks} data ranks" if data_ranks > 1 else ""
    return (
        f"train.global_batch_tokens is {total}, not a whole number of forward passes of train.device_batch "
        f"{config.device_batch} sequences x {sequence_length} tokens{ranks} = {one_pass} tokens: {advice}."
    )


def _fits(config: TrainConfig, sequence_length: int, data_ranks: int) -> bool:
    """Whether the global batch is a whole number of forward passes of so many ranks."""
    share = config.global_batch_tokens // (sequence_length * data_ranks)
    one_pass = min(config.device_batch, share) * sequence_length * data_ranks
    return one_pass > 0 and config.global_batch_tokens % one_pass == 0
