r"""Polynomial stages on the Gram matrix, in segments.

A stage maps ``X`` to ``P(R) X`` with ``R = X X^T``. In a segment of several stages the small ``R`` takes the
place of ``X``: the next one's is ``P R P``, and the segment ends with one product by all its polynomials,
``Q X`` with ``Q = ... P_2 P_1``. A restart begins a segment: ``R`` is made from ``X`` again, which takes away the
rounding that the small products piled up. A segment a stage is the ordinary iteration.

(Gram Newton-Schulz: Dao-AILab/gram-newton-schulz.)

:func:`iterate` is apart so that ranks that hold slabs of one matrix can add up their Gram matrices before it
(:mod:`distmuon.numerics.slabs`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distmuon.numerics.coefficients import Stage
from distmuon.numerics.products import Multiplies, Products, S, addmm, as_wide


def run(x: Tensor, stages: Sequence[Stage], restarts: Sequence[int], products: Products) -> Tensor:
    """Run all stages on matrices whose spectral norm is at most 1.

    Args:
        x: ``(m, n)`` or ``(b, m, n)``; tall ones need no transpose.
        stages: One tuple a step.
        restarts: Ascending numbers of the stages that begin a segment; the first is 0.
        products: Makes the symmetric products.

    Returns:
        A new tensor of the shape of ``x``, row-major.
    """
    for first, end in zip(restarts, [*restarts[1:], len(stages)], strict=True):
        constant, rest = iterate(products.gram(as_wide(x)), stages[first:end], products)
        x = apply(x, constant, rest)
    return x


def iterate(gram: S, stages: Sequence[Stage], products: Multiplies[S]) -> tuple[float, S]:
    """What the stages of one segment multiply ``X`` by.

    Args:
        gram: ``R``, ``(m, m)`` or ``(b, m, m)``.
        stages: One tuple a step.
        products: Makes the symmetric products.

    Returns:
        ``constant`` and ``rest`` of ``Q = constant I + rest``. Added to the diagonal in 16 bits, the constant
        would round away what small singular values need.
    """
    constant, rest = polynomial(gram, stages[0], products)
    total, accumulated = constant, rest
    for stage in stages[1:]:
        # R <- P R P
        once = products.symmetric(rest, gram, add=gram, beta=constant)
        gram = products.symmetric(rest, once, add=once, beta=constant)
        constant, rest = polynomial(gram, stage, products)
        # Q <- P Q, with both split
        product = products.symmetric(rest, accumulated, add=accumulated, beta=constant)
        accumulated = product.add_(rest * total)
        total *= constant
    return total, accumulated


def apply(x: Tensor, constant: float, rest: Tensor) -> Tensor:
    """``(constant I + rest) X``, on the right of tall ``X``.

    Args:
        x: ``(m, n)`` or ``(b, m, n)``.
        constant: See :func:`iterate`.
        rest: A square of the short side.

    Returns:
        A new tensor of the shape of ``x``, row-major.
    """
    if x.size(-2) > x.size(-1):
        return addmm(x, x, rest, beta=constant)
    return addmm(x, rest, x, beta=constant)


def polynomial(gram: S, stage: Stage, products: Multiplies[S]) -> tuple[float, S]:
    """Split ``P(R)`` into its constant, which later products add for free, and the rest."""
    # add_(alpha=...) would round the last elements of a tensor otherwise than those in full vectors
    if len(stage) == 2:
        a, b = stage
        return a, gram * b
    if len(stage) == 3:
        a, b, c = stage
        return a, products.symmetric(gram, gram, add=gram, beta=b, alpha=c)
    p, u, c, d, e = stage
    nested = products.symmetric(gram, gram, add=gram, beta=u)
    rest = products.symmetric(nested, nested, add=nested, beta=d, alpha=c)
    return p, rest if e == 0.0 else rest.add_(gram * e)
