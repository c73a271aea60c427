"""What loading a state dict needs beyond torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer


def restore_dtypes(optimizer: Optimizer, state_dict: dict[str, Any], dtypes: Mapping[str, torch.dtype | None]) -> None:
    """Put loaded state back into dtypes of its own: torch casts all loaded state to that of the parameter.

    Args:
        optimizer: That has just loaded it.
        state_dict: What it loaded.
        dtypes: By state key; None: that of the parameter.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in zip(saved, params, strict=True):
        for key, dtype in dtypes.items():
            value = state_dict["state"].get(index, {}).get(key)
            if value is not None and dtype is not None:
                optimizer.state[param][key] = value.to(device=param.device, dtype=dtype, copy=True)


def place_steps(optimizer: Optimizer, *, fused: bool | None) -> None:
    """Put AdamW's step counters where its kernels want them: on the parameter's device if fused, else on the host.

    A state dict may come from the other kind, or from a file that was read onto the host.
    """
    for param, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            device = param.device if fused else torch.device("cpu")
            state["step"] = state["step"].to(device=device, dtype=torch.float32)
