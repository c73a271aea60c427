"""The operations of torch.optim.Muon in their order, one matrix at a time: its bits, its speed, its range."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.numerics.coefficients import Stage
from distmuon.numerics.engines.gram import polynomial
from distmuon.numerics.products import Whole, as_wide


def orthogonalize_alone(matrix: Tensor, stages: Sequence[Stage], eps: float) -> Tensor:
    """Normalize and iterate as :class:`torch.optim.Muon` does.

    Args:
        matrix: ``(m, n)`` in the dtype of the iterates; written.
        stages: One tuple a step.
        eps: Smallest Frobenius norm to divide by. Norms over 1e19 overflow.

    Returns:
        ``(m, n)``; a transposed view where ``m > n``.
    """
    x = as_wide(matrix)
    x.div_(x.norm().clamp(min=eps if eps > 0.0 else torch.finfo(x.dtype).tiny))
    for stage in stages:
        constant, rest = polynomial(x @ x.mT, stage, Whole())
        x = torch.addmm(x, rest, x, beta=constant)
    return x.mT if matrix.size(-2) > matrix.size(-1) else x
