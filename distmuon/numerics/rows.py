"""Squares of which each rank of a team makes some rows.

Polynomials of one symmetric matrix commute: of two factors either may be the one that is needed whole. So a product is
``(rows of A) B`` with whichever of the two all ranks have whole already, and rows travel only where neither is.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from distmuon.numerics.products import addmm


class Team(Protocol):
    """The ranks that hold the slabs of a matrix. All of them call the same at the same point."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def index(self) -> int:
        """Which of the slabs this rank holds."""

    def add_up(self, tensor: Tensor) -> None:
        """Replace a contiguous ``tensor`` by its sum over the ranks; all get the same bits."""

    def put_together(self, rows: Tensor, count: int) -> Tensor:
        """The ``(count, n)`` of which every rank has ``rows``, cut as :func:`torch.chunk` does."""


class Shared:
    """A symmetric matrix of which each rank of a team has some rows, and all of them once it was asked.

    Args:
        rows: This rank's, cut as :func:`torch.chunk` does.
        team: Holds the others.
        count: Of all rows.
        whole: All of it, where this rank has it.
    """

    def __init__(self, rows: Tensor, team: Team, count: int, whole: Tensor | None = None) -> None:
        self.rows, self._team, self._count, self._whole = rows, team, count, whole
        self._multiple: tuple[Shared, float] | None = None

    @classmethod
    def of(cls, whole: Tensor, team: Team) -> Shared:
        """A matrix that every rank has whole."""
        step = -(-whole.size(0) // team.size)
        return cls(whole[team.index * step : (team.index + 1) * step], team, whole.size(0), whole)

    @property
    def known(self) -> bool:
        """Whether every rank has it whole."""
        return self._whole is not None or (self._multiple is not None and self._multiple[0].known)

    def whole(self) -> Tensor:
        """All of it; the first time all ranks send each other their rows."""
        if self._whole is None and self._multiple is not None and self.known:
            other, factor = self._multiple
            self._whole = other.whole() * factor
        if self._whole is None:
            self._whole = self._team.put_together(self.rows, self._count)
        return self._whole

    def with_rows(self, rows: Tensor) -> Shared:
        """Another one over the same ranks."""
        return Shared(rows, self._team, self._count)

    def __mul__(self, factor: float) -> Shared:
        product = self.with_rows(self.rows * factor)
        product._multiple = self, factor
        return product

    def add_(self, other: Shared) -> Shared:
        """Add another one to this."""
        self.rows, self._whole, self._multiple = self.rows + other.rows, None, None
        return self


class ByRows:
    """Products of which each rank makes its rows."""

    def symmetric(self, a: Shared, b: Shared, *, add: Shared, beta: float, alpha: float = 1.0) -> Shared:
        """See :class:`distmuon.numerics.products.Multiplies`."""
        # a is what other products take too
        left, right = (a, b) if b.known else (b, a)
        return a.with_rows(addmm(add.rows, left.rows, right.whole(), beta=beta, alpha=alpha))
