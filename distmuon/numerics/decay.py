"""Weight decay: of all weights, or only of those that the step makes smaller (cautious, arXiv 2510.12402)."""

from __future__ import annotations

import torch
from torch import Tensor


def decay_(param: Tensor, update: Tensor, factor: float | Tensor, *, cautious: bool) -> None:
    """Multiply weights by ``factor``, ``1 - lr * weight_decay``, before the step.

    Cautious decay takes those ``w`` alone with ``w * u >= 0``, as algorithm 1 of arXiv 2510.12402 has it
    (``w <- w - lr * (u + weight_decay * 1[w * u >= 0] * w)``): the weights are those before the step, and where the
    step is zero there is decay. Signs are what is multiplied, since a product of small numbers is rounded to zero.

    Args:
        param: The weights ``w``; written.
        update: What is subtracted from them, ``u``, times any positive number; read by cautious decay alone.
        factor: A number or a 0-d tensor.
        cautious: Whether to look at signs.
    """
    if not cautious:
        param.mul_(factor)
        return
    agree = param.sign() * update.sign() >= 0
    param.copy_(torch.where(agree, param * factor, param))
