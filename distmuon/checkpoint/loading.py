"""What loading a state dict needs beyond torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


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
