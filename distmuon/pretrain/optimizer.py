"""The optimizer that the ``optim`` section describes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import distmuon
from distmuon.pretrain.config import OptimConfig
from distmuon.pretrain.errors import UserError
from distmuon.qk_clip.attach import QKClip
from distmuon.values import FAMILY_KEYS


def build_optimizer(model: nn.Module, config: OptimConfig, *, step_stats: bool = False) -> Optimizer:
    """Make the optimizer of a model.

    Args:
        model: The model on its device and in its layout: the DDP module where there is one, by which Muon knows that
            the ranks can share its work.
        config: The ``optim`` section.
        step_stats: Whether Muon measures the phases of its step.

    Returns:
        `distmuon.Muon`, or `torch.optim.AdamW` with the same learning rate, decay and betas.

    Raises:
        UserError: If the optimizer refuses its settings.
    """
    try:
        if config.name == "muon":
            return distmuon.Muon(model, step_stats=step_stats, **muon_options(config))
        return _adamw(model, config)
    except (TypeError, ValueError) as error:
        raise UserError(f"the optimizer refuses the optim section: {error}") from error


def attach_qk_clip(model: nn.Module, optimizer: Optimizer, config: OptimConfig) -> QKClip | None:
    """Keep attention logits under ``optim.qk_clip``.

    Args:
        model: As `build_optimizer` has it.
        optimizer: Of the model.
        config: The ``optim`` section.

    Returns:
        The handle; None if it is off.

    Raises:
        UserError: If the model's attention is none that can be clipped.
    """
    if config.qk_clip is None:
        return None
    try:
        return distmuon.attach_qk_clip(model, optimizer, tau=config.qk_clip, every=config.qk_clip_every)
    except ValueError as error:
        raise UserError(f"optim.qk_clip is {config.qk_clip:g}, and {error} Or set it to null.") from error


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The present learning rate of each algorithm, named ``lr/muon`` and ``lr/adamw``."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates.setdefault("lr/muon" if group.get("use_muon") else "lr/adamw", float(group["lr"]))
    return rates


def step_stats(optimizer: Optimizer) -> dict[str, float]:
    """What Muon measured of its last step, by the names of the metrics; empty if it was not asked to."""
    return optimizer.last_step_stats() if isinstance(optimizer, distmuon.Muon) else {}


def clip_metrics(handle: QKClip | None) -> dict[str, float]:
    """``qk_clip/max_logit`` and ``qk_clip/clipped_heads`` of the last step that was recorded; waits for the device.

    Args:
        handle: From `attach_qk_clip`.

    Returns:
        Empty without a handle, and before its first recorded step; the same on all ranks.
    """
    found = {} if handle is None else handle.metrics()
    # a count since the start of the process would not be that of a run that was resumed
    return {name: value for name, value in found.items() if name != "qk_clip/clips"}


def routing(optimizer: Optimizer) -> tuple[str, str]:
    """Which parameter is updated by what: one sentence, and a table with reasons and learning rates."""
    if isinstance(optimizer, distmuon.Muon):
        report = optimizer.report()
        return report.summary, str(report)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    summary = f"adamw: {len(params)} parameters, {sum(param.numel() for param in params):,} elements"
    return summary, summary


def muon_options(config: OptimConfig) -> dict[str, Any]:
    """The arguments of `distmuon.Muon` that the ``optim`` section means."""
    given: dict[str, Any] = {}
    if config.ns_coefficients is not None:
        coefficients = config.ns_coefficients
        given["ns_coefficients"] = coefficients if isinstance(coefficients, str) else tuple(coefficients)
    return {
        "lr": config.lr,
        "adamw_lr": config.adamw_lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "ns_steps": config.ns_steps,
        "ns_engine": config.ns_engine,
        "cost_table": config.cost_table,
        "teams": config.teams,
        "matrices": config.matrices,
        **{key: getattr(config, key) for key in FAMILY_KEYS},
        "on_nonfinite": config.on_nonfinite,
        "verify_exchange": config.verify_exchange,
        "ns_dtype": {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.ns_dtype],
        "adjust_lr_fn": config.adjust_lr_fn,
        "adamw_betas": (config.betas[0], config.betas[1]),
        "adamw_eps": config.eps,
        **given,
    }


def _adamw(model: nn.Module, config: OptimConfig) -> Optimizer:
    return torch.optim.AdamW(
        model.named_parameters(),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
