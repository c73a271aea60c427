"""A rational function of the Gram matrix: two Cholesky factorizations instead of fourteen products.

``Y = f(X X^T) X`` with ``f`` of :mod:`distmuon.numerics.rationals`. Two products of the size of ``X`` remain, one
for the Gram matrix and one for the result. Needs float32 or float64: a shift of 1e-5 is nothing to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.numerics.coefficients import resolve_stages
from distmuon.numerics.engines import gram as polynomials
from distmuon.numerics.products import Products, as_wide
from distmuon.numerics.rationals import Rational


def run(x: Tensor, rational: Rational, products: Products) -> Tensor:
    """Apply ``f`` to matrices whose spectral norm is at most 1.

    Args:
        x: ``(m, n)`` or ``(b, m, n)``, float32 or float64.
        rational: ``f``.
        products: Makes the Gram matrix.

    Returns:
        A new tensor of the shape of ``x``, row-major; NaN for a matrix that holds NaN or Inf.
    """
    gram = products.gram(as_wide(x))
    rest, failed = evaluate(gram, rational)
    y = polynomials.apply(x, rational.constant, rest)
    if failed.any():
        # not finite, or rounding beyond the shift: polynomials need no factorization
        stages = resolve_stages("nested14")
        if x.ndim == 2:
            return polynomials.run(x, stages, range(len(stages)), products)
        for index in failed.nonzero().flatten().tolist():
            y[index] = polynomials.run(x[index : index + 1], stages, range(len(stages)), products)[0]
    return y


def evaluate(gram: Tensor, rational: Rational) -> tuple[Tensor, Tensor]:
    """``f(R)`` without its constant, which :func:`distmuon.numerics.engines.gram.apply` adds for free.

    Args:
        gram: ``R``, ``(m, m)`` or ``(b, m, m)``, float32 or float64.
        rational: ``f``.

    Returns:
        The matrices, and for each whether a factorization failed and it must not be used.
    """
    rest = gram * rational.linear
    failed = torch.zeros(gram.shape[:-2], dtype=torch.bool, device=gram.device)
    for pole in rational.poles:
        failed |= add_inverse(rest, gram, *pole)
    return rest, failed


def add_inverse(rest: Tensor, gram: Tensor, weight: float, shift: float) -> Tensor:
    """Add ``weight (R + shift)^(-1)`` to ``rest``, and say for which matrices this failed."""
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, info = torch.linalg.cholesky_ex(shifted)
    failed = info != 0
    if failed.any():
        # what is left of a factorization may have a zero on its diagonal, which the inverse refuses
        factor[failed] = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    # not add_(alpha=...), which rounds the last elements of a tensor otherwise than those in full vectors
    rest.add_(torch.cholesky_inverse(factor).mul_(weight))
    return failed
