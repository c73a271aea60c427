"""How a team orthogonalizes a matrix of which each rank holds a slab, and what that takes.

The long side is cut, so ``R = X X^T`` is the sum of the slabs' own Gram matrices, everything between is of the short
side alone, and the last product ``Q X`` is made slab by slab. What happens on the small side is either repeated by
every rank, or split over them (:class:`TeamRecipe`).
"""

from __future__ import annotations

from dataclasses import dataclass

from distmuon.numerics.costs import CostTable
from distmuon.numerics.rationals import Rational
from distmuon.numerics.recipe import Recipe
from distmuon.speeds import Link

# Gram matrices are added up in float32, as bfloat16 sums degrade with every rank, and as strips of the upper triangle
_SUMMED_BYTES = 4
TRIANGLE = 0.625


@dataclass(frozen=True)
class TeamRecipe:
    """How a team orthogonalizes matrices of one shape.

    Attributes:
        recipe: Of a single owner: the same engine, coefficients, and dtype.
        split: Whether each rank makes a share of the products of the short side (of a rational function: some of its
            inverses) and the shares are put together, or every rank makes all of them.
        seconds: Predicted time of a matrix on each rank.
    """

    recipe: Recipe
    split: bool
    seconds: float


def team_recipe(rows: int, cols: int, recipe: Recipe, size: int, table: CostTable, link: Link) -> TeamRecipe:
    """The faster of the two ways.

    Args:
        rows: Of a whole matrix.
        cols: Of a whole matrix.
        recipe: Of a single owner.
        size: Ranks of the team, 2 or more.
        table: Speed of the engines.
        link: Between the ranks of the team.
    """
    ways = (
        TeamRecipe(recipe, split, _seconds(rows, cols, recipe, size, table, link, split)) for split in (False, True)
    )
    return min(ways, key=lambda way: way.seconds)


def _seconds(rows: int, cols: int, recipe: Recipe, size: int, table: CostTable, link: Link, split: bool) -> float:
    short, long = sorted((rows, cols))
    slab = -(-long // size)
    rates = table.rates(recipe.engine)
    square = short * short
    # not Rates.seconds, for which a slab longer than the short side would be a matrix of another short side
    seconds = rates.batched if recipe.batched and rates.batched is not None else rates.fixed
    seconds += square * (recipe.big * slab * rates.big + rates.square) + short * slab * rates.entries
    grams = recipe.big // 2
    seconds += grams * link.all_reduce(_SUMMED_BYTES * TRIANGLE * square, size) + link.all_reduce(8.0, size)
    small, share, talk = square * short * rates.small, recipe.small, 0.0
    if split and isinstance(recipe.formula, Rational):
        share = -(-recipe.small // size)
        talk = link.all_reduce(_SUMMED_BYTES * TRIANGLE * square, size)
    elif split:
        talk = recipe.small * link.all_gather(recipe.dtype.itemsize * square, size)
        small /= size
    return seconds + share * small + talk
