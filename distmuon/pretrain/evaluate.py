"""Validation: loss in nats a token and bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmuon.pretrain.precision import autocast
from distmuon.pretrain.processes import total


@dataclass(frozen=True)
class Validation:
    """A validation.

    Attributes:
        loss: Mean cross entropy, nats a token.
        bits_per_byte: The same in bits a byte of text, comparable between tokenizers; None where it is not known.
        tokens: Number of predicted tokens, over all ranks.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int


def language_model_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the next token, in float32.

    Args:
        model: A causal language model of transformers.
        input_ids: int64 ``(batch, tokens)``.
        labels: int64 ``(batch, tokens)``, already shifted: ``labels[:, t]`` follows ``input_ids[:, t]``.

    Returns:
        The mean, a scalar of nats.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    bytes_per_token: float | None,
    device: torch.device,
    dtype: torch.dtype,
    copies: int = 1,
) -> Validation:
    """Mean loss over the batches of all ranks, the model in eval mode for the while.

    Args:
        model: A causal language model of transformers; not its DDP wrapper.
        batches: Dicts of input_ids and labels, int64 ``(batch, tokens)``, as many on each rank.
        bytes_per_token: Mean length of a validation token in bytes of UTF-8 text; None: not known.
        device: The model's device.
        dtype: Of the forward pass.
        copies: Ranks that are given the same batches, as those of a tensor parallel group are.
    """
    was_training = model.training
    model.eval()
    # a mean for each batch in float32, their sum in Python's float64
    losses, count = [], 0
    for batch in batches:
        input_ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        with autocast(device, dtype):
            losses.append(language_model_loss(model, input_ids, labels) * labels.numel())
        count += labels.numel()
    model.train(was_training)
    summed, count_all = total([sum(torch.stack(losses).tolist()), count])
    mean = summed / count_all
    bits = None if bytes_per_token is None else mean / math.log(2) / bytes_per_token
    return Validation(mean, bits, int(count_all) // copies)
