"""The exact polar factor, by SVD in float64: the yardstick of accuracy, too slow for a training step."""

from __future__ import annotations

import torch
from torch import Tensor


def polar_factor(x: Tensor) -> Tensor:
    """``U V^T`` of each matrix ``U S V^T`` in ``x``.

    Args:
        x: ``(..., m, n)``, any real floating-point dtype, finite.

    Returns:
        ``(..., m, n)`` in float64. Directions whose singular value is zero are filled in arbitrarily.
    """
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh
