"""The scale of a matrix is taken out first, in float32, whatever it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Frobenius norms whose squares are well inside float32
_SMALLEST, _LARGEST = 1e-12, 1e18


def normalize(x: Tensor, eps: float, add_up: Callable[[Tensor], None] | None = None) -> Tensor:
    """Divide each matrix by its Frobenius norm.

    Where squares of entries would leave float32, the largest entry is divided out first.

    Args:
        x: ``(b, m, n)``.
        eps: Smallest norm to divide by.
        add_up: Where ``x`` holds slabs of matrices: adds a tensor up over all who hold one, in place.

    Returns:
        A new tensor of the same shape, float32 or wider. Zero stays zero, and NaN or Inf become NaN.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    norm = _norms(wide)
    ordinary = (norm > _SMALLEST) & (norm < _LARGEST)
    peak = torch.ones_like(norm)
    # reading the answer costs nothing on a CPU; an accelerator would have to be waited for
    if x.numel() and (x.device.type != "cpu" or not ordinary.all()):
        flat = wide.flatten(1)
        # the infinity norm of torch takes 20 times as long
        largest = torch.maximum(flat.amax(1), flat.amin(1).neg_())[:, None, None]
        # what a matrix is divided by does not depend on its neighbours in the batch
        peak = torch.where(ordinary | (largest == 0), peak, largest)
        wide.div_(peak)
        norm = _norms(wide)
    if add_up is not None:
        # squares of anything in float32 are well inside float64
        squares = (norm.double() * peak).square_()
        add_up(squares)
        norm = squares.sqrt_().div_(peak).to(norm.dtype)
    norm = torch.where(norm == 0, torch.ones_like(norm), norm)
    if eps > 0.0:
        norm = torch.maximum(norm, eps / peak)
    return wide.div_(norm)


def _norms(x: Tensor) -> Tensor:
    """``(b, 1, 1)``; row by row, which takes all threads and gives the same bits for any number of them."""
    by_row = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(by_row, dim=-2, keepdim=True)
