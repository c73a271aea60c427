"""Products whose result is symmetric: up to half of their multiply-adds can be left out.

``X X^T`` is symmetric, and so is ``A B`` for polynomials ``A`` and ``B`` of one symmetric matrix. All take
``(m, n)`` or batches ``(b, m, n)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

# A strip has at least so many rows, as products of fewer run below a core's full speed
_STRIP_ROWS = 128
_MOST_STRIPS = 4


class Square(Protocol):
    """A symmetric matrix: a tensor, or what stands for one (:class:`distmuon.numerics.rows.Shared`)."""

    def __mul__(self, factor: Any, /) -> Any:
        """Times a number."""

    def add_(self, other: Any, /) -> Any:
        """Add another one to this."""


S = TypeVar("S", bound=Square)


class Multiplies(Protocol[S]):
    """A way to multiply polynomials of one symmetric matrix."""

    def symmetric(self, a: S, b: S, *, add: S, beta: float, alpha: float = 1.0) -> S:
        """``beta add + alpha A B``, where the three are symmetric and commute."""


class Products(Multiplies[Tensor], Protocol):
    """A way to make symmetric products of tensors."""

    def gram(self, x: Tensor) -> Tensor:
        """``X X^T``; of tall matrices :func:`as_wide` takes the smaller square."""


@dataclass(frozen=True)
class Whole:
    """All entries are computed: no overhead, for small matrices and for devices without better."""

    def gram(self, x: Tensor) -> Tensor:
        """See :class:`Products`."""
        return x @ x.mT

    def symmetric(self, a: Tensor, b: Tensor, *, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        """See :class:`Products`."""
        return addmm(add, a, b, beta=beta, alpha=alpha)


@dataclass(frozen=True)
class Strips:
    """Rows in strips, each from its diagonal block to the right; what lies below is mirrored.

    ``k`` strips need ``(k + 1) / 2k`` of the multiply-adds. For CPUs, one matrix ``(m, n)`` at a time.
    """

    def gram(self, x: Tensor) -> Tensor:
        """See :class:`Products`."""
        out = x.new_empty(x.size(0), x.size(0))
        for top, bottom in strips(x.size(0)):
            torch.mm(x[top:bottom], x[top:].mT, out=out[top:bottom, top:])
            mirror(out, top, bottom)
        return out

    def symmetric(self, a: Tensor, b: Tensor, *, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        """See :class:`Products`."""
        out = torch.empty_like(a)
        for top, bottom in strips(a.size(0)):
            place = out[top:bottom, top:]
            torch.addmm(add[top:bottom, top:], a[top:bottom], b[:, top:], beta=beta, alpha=alpha, out=place)
            mirror(out, top, bottom)
        return out


@dataclass(frozen=True)
class Kernels:
    """Triton kernels that store each block twice; for GPUs (:mod:`distmuon.numerics.kernels`)."""

    def gram(self, x: Tensor) -> Tensor:
        """See :class:`Products`."""
        from distmuon.numerics.kernels import symmetric

        return symmetric.gram(x)

    def symmetric(self, a: Tensor, b: Tensor, *, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        """See :class:`Products`."""
        from distmuon.numerics.kernels import symmetric

        return symmetric.symmetric_product(a, b, c=add, beta=beta, alpha=alpha)


def as_wide(x: Tensor) -> Tensor:
    """``X``, or a view of ``X^T`` where ``X`` is tall."""
    return x.mT if x.size(-2) > x.size(-1) else x


def addmm(add: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """``beta add + alpha A B`` of matrices or batches of them."""
    function = torch.addmm if a.ndim == 2 else torch.baddbmm
    return function(add, a, b, beta=beta, alpha=alpha)


def strips(rows: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each strip, by the number of rows alone."""
    count = max(1, min(_MOST_STRIPS, rows // _STRIP_ROWS))
    return [(rows * k // count, rows * (k + 1) // count) for k in range(count)]


def mirror(out: Tensor, top: int, bottom: int) -> None:
    """Copy what lies right of a strip's diagonal block to below it."""
    out[bottom:, top:bottom] = out[top:bottom, bottom:].mT
