"""What loading a state dict needs beyond torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer


def merge_groups(saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Complete saved groups with the keys that only the present ones have.

    A state dict of torch.optim.Muon says nothing of ``use_muon``, ``betas`` or ``flatten``.

    Raises:
        ValueError: if the groups differ in number, or a group changed between Muon and AdamW.
    """
    if len(saved) != len(current):
        raise ValueError(
            f"the state dict has {len(saved)} parameter groups and the optimizer {len(current)}: build the "
            "optimizer with the groups of the run that saved it."
        )
    merged = []
    for index, (old, new) in enumerate(zip(saved, current, strict=True)):
        if old.get("use_muon", new["use_muon"]) != new["use_muon"]:
            names = ("AdamW", "Muon")
            raise ValueError(
                f"group {index} was saved on {names[old['use_muon']]} and is on {names[new['use_muon']]} now: its "
                "state does not carry over. Route it as before, or start without optimizer state."
            )
        merged.append({**{key: value for key, value in new.items() if key != "params"}, **old})
    return merged


def restore_momentum(optimizer: Optimizer, state_dict: dict[str, Any], dtype: torch.dtype) -> None:
    """Put loaded momentum back into ``dtype``: torch casts all loaded state to that of the parameter."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in zip(saved, params, strict=True):
        buffer = state_dict["state"].get(index, {}).get("momentum_buffer")
        if buffer is not None:
            optimizer.state[param]["momentum_buffer"] = buffer.to(device=param.device, dtype=dtype, copy=True)


def place_steps(optimizer: Optimizer, *, fused: bool | None) -> None:
    """Put AdamW's step counters where its kernels want them: on the parameter's device if fused, else on the host.

    A state dict may come from the other kind, or from a file that was read onto the host.
    """
    for param, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            device = param.device if fused else torch.device("cpu")
            state["step"] = state["step"].to(device=device, dtype=torch.float32)
