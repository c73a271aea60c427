"""Whether numbers are numbers: which tensors hold NaN or an infinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def nonfinite(tensors: Sequence[Tensor]) -> list[bool]:
    """Tell for each tensor whether it holds NaN or an infinity.

    Reads each tensor once (the extremes of one that holds NaN are NaN) and waits once for each device and dtype.
    """
    found = [False] * len(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            alike.setdefault((tensor.device, tensor.dtype), []).append(number)
    for numbers in alike.values():
        extremes = torch.stack([extreme for number in numbers for extreme in torch.aminmax(tensors[number])])
        for number, finite in zip(numbers, extremes.view(-1, 2).isfinite().all(dim=1).tolist(), strict=True):
            found[number] = not finite
    return found
