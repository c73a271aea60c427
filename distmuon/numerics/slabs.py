r"""The orthogonalization of matrices that a team holds in slabs along their long side.

With ``X = [X_1 ... X_t]`` (wide; tall ones are taken transposed) the Gram matrix ``R = X X^T`` is the sum of the
slabs' own. It is added up in float32, and what an engine makes of it, ``Q``, multiplies each slab where it lies::

    R = sum_k X_k X_k^T        Q = f(R)        X_k <- Q X_k

``Q`` is made by every rank, or its products are split over the ranks by rows (:mod:`distmuon.numerics.rows`). Of a
rational function each rank makes some of the inverses. (The sum over ranks is that of the distributed Newton-Schulz of
NVIDIA's Emerging-Optimizers.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.numerics.coefficients import Stage, resolve_stages
from distmuon.numerics.engines import gram, rational
from distmuon.numerics.normalize import normalize
from distmuon.numerics.products import Products, addmm, mirror, strips
from distmuon.numerics.rationals import Rational
from distmuon.numerics.rows import ByRows, Shared, Team
from distmuon.numerics.teams import TeamRecipe


@torch.no_grad()
def orthogonalize_slabs_(
    slabs: Tensor, way: TeamRecipe, team: Team, *, tall: bool, eps: float, dtype: torch.dtype
) -> Tensor:
    """Replace this rank's slab of each matrix by that of its approximate polar factor.

    Args:
        slabs: ``(b, rows, cols)``, contiguous; written. Of wide matrices some columns, of tall ones some rows; there
            may be none.
        way: How.
        team: Holds the other slabs.
        tall: Whether the matrices have more rows than columns.
        eps: Smallest Frobenius norm of a whole matrix to divide by.
        dtype: Dtype that matrices are rounded to first.

    Returns:
        ``slabs``.
    """
    # products keep their precision wherever this is called from
    with torch.autocast(slabs.device.type, enabled=False):
        for slab in slabs:
            normal = normalize(slab[None].to(dtype), eps, team.add_up)[0]
            slab.copy_(_iterate(normal.to(way.recipe.dtype), way, team, tall=tall))
    return slabs


def _iterate(x: Tensor, way: TeamRecipe, team: Team, *, tall: bool) -> Tensor:
    recipe = way.recipe
    if not isinstance(recipe.formula, Rational):
        return _polynomials(x, recipe.formula, recipe.restarts, recipe.products, team, tall=tall, split=way.split)
    rest = _inverses(_gram(x, recipe.products, team, tall=tall), recipe.formula, team, split=way.split)
    if rest is None:  # not finite, or rounding beyond the shift: polynomials need no factorization
        stages = resolve_stages("nested14")
        return _polynomials(x, stages, range(len(stages)), recipe.products, team, tall=tall, split=way.split)
    return _apply(x, recipe.formula.constant, rest, tall=tall)


def _polynomials(
    x: Tensor,
    stages: Sequence[Stage],
    restarts: Sequence[int],
    products: Products,
    team: Team,
    *,
    tall: bool,
    split: bool,
) -> Tensor:
    """The segments of :func:`distmuon.numerics.engines.gram.run`."""
    for first, end in zip(restarts, [*restarts[1:], len(stages)], strict=True):
        r, segment = _gram(x, products, team, tall=tall), stages[first:end]
        if split:
            constant, share = gram.iterate(Shared.of(r, team), segment, ByRows())
            rest = share.whole()
        else:
            constant, rest = gram.iterate(r, segment, products)
        x = _apply(x, constant, rest, tall=tall)
    return x


def _apply(x: Tensor, constant: float, rest: Tensor, *, tall: bool) -> Tensor:
    """``(constant I + rest) X``, on the right of tall ``X``; the slab itself may be of any proportion."""
    return addmm(x, x, rest, beta=constant) if tall else addmm(x, rest, x, beta=constant)


def _gram(x: Tensor, products: Products, team: Team, *, tall: bool) -> Tensor:
    """``R`` of the whole matrix, in the dtype of ``x``."""
    own = products.gram(x.mT if tall else x)
    return _summed(own.float() if x.dtype.itemsize < 4 else own, team).to(x.dtype)


def _summed(symmetric: Tensor, team: Team) -> Tensor:
    """The sum of symmetric matrices over the team; only strips from the diagonal to the right travel."""
    cuts = strips(symmetric.size(0))
    packed = torch.cat([symmetric[top:bottom, top:].flatten() for top, bottom in cuts])
    team.add_up(packed)
    start = 0
    for top, bottom in cuts:
        strip = symmetric[top:bottom, top:]
        strip.copy_(packed[start : start + strip.numel()].view_as(strip))
        start += strip.numel()
        mirror(symmetric, top, bottom)
    return symmetric


def _inverses(r: Tensor, formula: Rational, team: Team, *, split: bool) -> Tensor | None:
    """``f(R)`` without its constant; None, on all ranks alike, if a factorization failed on any."""
    if not split:
        rest, failed = rational.evaluate(r, formula)
        # rounding may differ between unlike ranks, and all have to go the same way
        verdict = failed.to(r.dtype)[None]
        team.add_up(verdict)
        return None if verdict.any() else rest
    rest = r * formula.linear if team.index == 0 else torch.zeros_like(r)
    for pole in formula.poles[team.index :: team.size]:
        if rational.add_inverse(rest, r, *pole).any():
            rest.fill_(torch.nan)
    rest = _summed(rest, team)
    return None if rest[0, 0].isnan().any() else rest
