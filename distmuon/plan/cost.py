"""How long an orthogonalization takes, up to a common factor."""

from __future__ import annotations


def orthogonalization_cost(rows: int, cols: int, steps: int) -> int:
    """Multiply-adds of ``steps`` Newton-Schulz iterations of a ``rows x cols`` matrix.

    A step multiplies the matrix with its transpose, the ``s x s`` result with itself, and that with the
    matrix: ``2 s^2 l + s^3`` with short side ``s`` and long side ``l``.
    """
    short, long = min(rows, cols), max(rows, cols)
    return steps * short * short * (2 * long + short)
