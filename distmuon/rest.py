"""What needs no whole matrix: the state of a parameter, and the AdamW step of everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distmuon.comm.layout import local_gradient, local_tensor
from distmuon.groups import Group
from distmuon.moments import STATE_KEY, blank_moments, has_these, moments_dtype, moments_in
from distmuon.numerics.adamw import adamw_update, init_state
from distmuon.options import Options
from distmuon.participation import Turn
from distmuon.plan.companions import Moments


def create_state(turn: Turn, groups: Sequence[Group], state: dict[Tensor, dict[str, Any]], options: Options) -> None:
    """Make the state of the parameters that take part and have none, or lack some that their group wants by now."""
    for entry in turn.entries:
        _complete(state[entry.param], entry.param, groups[entry.fact.group], entry.fact.moments, options)


def complete_state(
    groups: Sequence[Group], state: dict[Tensor, dict[str, Any]], options: Options, *, begun: bool = False
) -> None:
    """Make the state that the next steps would, for all trainable parameters, once training has ``begun``.

    ``torch.distributed.checkpoint`` restores what the optimizer has when it is about to load. It makes that by a dummy
    step, which it leaves out if there is any state or gradient.
    """
    params = [(param, group) for group in groups for param in group["params"]]
    if begun or state or any(param.grad is not None for param, _ in params):
        for param, group in params:
            if param.requires_grad:
                _complete(state.setdefault(param, {}), param, group, moments_in(group, param), options)


def follow_parameters(groups: Sequence[Group], state: Mapping[Tensor, dict[str, Any]], options: Options) -> None:
    """Bring state to the device and dtype of its parameter, which ``model.to`` moves without it."""
    for group in groups:
        for param in group["params"]:
            kept = state.get(param) or {}
            for key, value in kept.items():
                if key == STATE_KEY:
                    kept[key] = value.to(param.device)
                elif key != "step":
                    dtype = (options.momentum_dtype if _averages(group) else None) or param.dtype
                    kept[key] = value.to(device=param.device, dtype=dtype)
                elif options.fused:
                    kept[key] = value.to(device=param.device)


def _averages(group: Group) -> bool:
    """Whether the state of a group is a momentum average, and not that of AdamW."""
    return group["use_muon"] or group["lmo"] is not None


def _complete(kept: dict[str, Any], param: Tensor, group: Group, moments: Moments | None, options: Options) -> None:
    """Make state where there is none, or second moments alone where their group had another variant before."""
    if not kept:
        kept.update(_blank_state(param, group, options))
    if moments is not None and not has_these(kept, moments):
        kept[STATE_KEY] = blank_moments(param, moments, moments_dtype(options.wire_dtype))


def _blank_state(param: Tensor, group: Group, options: Options) -> dict[str, Any]:
    """Zeros of the shape, mesh and placements of a parameter, but for second moments."""
    if not _averages(group):
        return dict(init_state(param, fused=options.fused))
    momentum = torch.zeros_like(param, dtype=options.momentum_dtype, memory_format=torch.preserve_format)
    return {"momentum_buffer": momentum}


def step_adamw(turn: Turn, groups: Sequence[Group], state: dict[Tensor, dict[str, Any]], options: Options) -> None:
    """Update what is neither on Muon nor has an ``lmo``, each rank its own shard."""
    members: dict[int, list[Tensor]] = {}
    for entry in turn.entries:
        if not entry.fact.use_muon and entry.fact.lmo is None:
            members.setdefault(entry.fact.group, []).append(entry.param)
    for index, params in members.items():
        group = groups[index]
        local = [local_tensor(param) for param in params]
        grads = [local_gradient(param) for param in params]
        adamw_update(
            local,
            # a shard whose gradient other ranks have takes part with zeros
            [torch.zeros_like(mine) if grad is None else grad for mine, grad in zip(local, grads, strict=True)],
            [{key: local_tensor(value) for key, value in state[param].items()} for param in params],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            foreach=options.foreach,
            fused=options.fused,
            cautious_wd=group["cautious_wd"],
        )
