"""Learning rate schedules: the factor on the peak learning rate, step by step."""

from __future__ import annotations

import functools
import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmuon.pretrain.config import OptimConfig


def lr_factor(
    step: int,
    *,
    steps: int,
    schedule: str = "wsd",
    warmup_steps: int = 0,
    warmdown_ratio: float = 0.2,
    final_lr_frac: float = 0.0,
) -> float:
    """The learning rate of one step as a part of the peak.

    Args:
        step: Which step, from 0.
        steps: Steps of the whole run.
        schedule: ``"wsd"``, ``"cosine"`` or ``"constant"``.
        warmup_steps: Steps of linear warm-up; step 0 has ``1 / (warmup_steps + 1)``.
        warmdown_ratio: Part of ``steps``, at the end, over which wsd goes down linearly.
        final_lr_frac: What wsd and cosine would reach at step ``steps``, the first one not taken.

    Returns:
        A number from 0 to 1.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        start, shape = warmup_steps, _half_cosine
    else:
        start, shape = max(warmup_steps, steps - round(warmdown_ratio * steps)), _line
    if step < start or start >= steps:
        return 1.0
    done = min(1.0, (step - start) / (steps - start))
    return final_lr_frac + (1.0 - final_lr_frac) * shape(done)


def build_scheduler(optimizer: Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """A scheduler that multiplies each group's learning rate by `lr_factor`; step it once a step."""
    factor = functools.partial(
        lr_factor,
        steps=steps,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )
    return LambdaLR(optimizer, factor)


def _line(done: float) -> float:
    return 1.0 - done


def _half_cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))
