"""How a team orthogonalizes a matrix of which each rank holds a slab, and what that takes.

The long side is cut, so ``R = X X^T`` is the sum of the slabs' own Gram matrices, everything between is of the short
side alone, and the last product ``Q X`` is made slab by slab. What happens on the small side is either repeated by
every rank, or split over them (:class:`TeamRecipe`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmuon.numerics.costs import CostTable
from distmuon.numerics.engines import gram
from distmuon.numerics.rationals import Rational
from distmuon.numerics.recipe import Recipe, Request, choose
from distmuon.numerics.rows import ByRows, Shared
from distmuon.speeds import Link

# Gram matrices are added up in float32, as bfloat16 sums degrade with every rank, and as strips of the upper triangle
_SUMMED_BYTES = 4
_TRIANGLE = 0.625


@dataclass(frozen=True)
class TeamRecipe:
    """How a team orthogonalizes matrices of one shape.

    Attributes:
        recipe: Of the coefficients that a single owner takes.
        split: Whether each rank makes a share of the products of the short side (of a rational function: some of its
            inverses) and the shares are put together, or every rank makes all of them.
        seconds: Predicted time of a matrix on each rank.
    """

    recipe: Recipe
    split: bool
    seconds: float


def team_recipe(
    rows: int, cols: int, device: torch.device, request: Request, size: int, table: CostTable, link: Link
) -> TeamRecipe:
    """The fastest way for a team.

    The coefficients are those of a single owner. Where the engine is left to us, a team may take the Gram form of the
    same polynomials where one rank would not: its Gram matrices are fewer, and these are what a team has to add up.

    Args:
        rows: Of a whole matrix.
        cols: Of a whole matrix.
        device: Where it lies.
        request: What was asked for.
        size: Ranks of the team, 2 or more.
        table: Speed of the engines.
        link: Between the ranks of the team.
    """
    alone = choose(rows, cols, device, request, table)
    recipes = [alone]
    if request.engine == "auto" and alone.engine == "composed" and "gram" in dict(table.engines):
        other = choose(rows, cols, device, replace(request, engine="gram"), table)
        recipes += [other] if other.formula == alone.formula else []
    ways = [
        TeamRecipe(recipe, split, _seconds(rows, cols, recipe, size, table, link, split))
        for recipe in recipes
        for split in (False, True)
    ]
    return min(ways, key=lambda way: way.seconds)


def _seconds(rows: int, cols: int, recipe: Recipe, size: int, table: CostTable, link: Link, split: bool) -> float:
    short, long = sorted((rows, cols))
    slab = -(-long // size)
    rates = table.rates(recipe.engine)
    square = short * short
    # not Rates.seconds, for which a slab longer than the short side would be a matrix of another short side
    seconds = rates.fixed + square * recipe.big * slab * rates.big + short * slab * rates.entries
    # norms, and Gram matrices
    summed = link.all_reduce(_SUMMED_BYTES * _TRIANGLE * square, size)
    seconds += link.all_reduce(8.0, size) + recipe.big // 2 * summed
    small = recipe.small * square * short * rates.small + square * rates.square
    if isinstance(recipe.formula, Rational):
        if not split:  # the ranks agree that no factorization failed
            return seconds + small + link.all_reduce(4.0, size)
        return seconds + small * -(-recipe.small // size) / recipe.small + summed
    if not split:
        return seconds + small
    # of the four squares that a product reads and writes, a rank needs one whole
    seconds += square * (recipe.small * short * rates.small / size + rates.square * (1 + 3 / size) / 4)
    return seconds + gathers(recipe) * link.all_gather(recipe.dtype.itemsize * square, size)


@functools.lru_cache(maxsize=64)
def gathers(recipe: Recipe) -> int:
    """How many squares the ranks put together when they split the products: counted on a 1 x 1 matrix."""
    assert not isinstance(recipe.formula, Rational)
    count = 0

    class Counted:
        size, index = 1, 0

        def add_up(self, tensor: Tensor) -> None:
            pass

        def put_together(self, rows: Tensor, _: int) -> Tensor:
            nonlocal count
            count += 1
            return rows

    for first, end in zip(recipe.restarts, [*recipe.restarts[1:], len(recipe.formula)], strict=True):
        gram.iterate(Shared.of(torch.zeros(1, 1), Counted()), recipe.formula[first:end], ByRows())[1].whole()
    return count
