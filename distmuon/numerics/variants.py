"""What members of the Muon family do with an orthogonalized matrix before it is an update."""

from __future__ import annotations

import torch
from torch import Tensor

VARIANTS = ("muon", "normuon", "adamuon")
# Added to the root of second moments; one for all, as they are of order 1/n with NorMuon and AdaMuon alike
EPS = 1e-8


def resolve_variant(name: str) -> str:
    """The name of a variant.

    Raises:
        ValueError: for one that is not in :data:`VARIANTS`.
    """
    if name not in VARIANTS:
        raise ValueError(
            f"variant={name!r} is unknown; known: {', '.join(VARIANTS)}. MuonBP is block_period and blocks, Scion is "
            "distmuon.Scion, and MuonClip distmuon.MuonClip."
        )
    return name


def has_moments(variant: str) -> bool:
    """Whether a variant keeps second moments."""
    return variant != "muon"


def by_rows(variant: str) -> bool:
    """Whether it keeps one second moment for each row of output features, instead of each element."""
    return variant == "normuon"


def takes_signs(variant: str) -> bool:
    """Whether signs of the blended momentum are orthogonalized in place of itself."""
    return variant == "adamuon"


@torch.no_grad()
def divide_by_moments_(directions: Tensor, moments: Tensor, *, beta2: float, eps: float = EPS) -> None:
    r"""Divide orthogonalized matrices by the root of their second moments, and bring them back to their size.

    NorMuon (arXiv 2510.05491, algorithm 1) averages over each row, AdaMuon (arXiv 2507.11005, algorithm 1) takes each
    element by itself::

        v <- beta2 * v + (1 - beta2) * mean(O * O)        over what ``moments`` has one number for
        D <- O / (sqrt(v) + eps)
        O <- D * sqrt(min(m, n)) / ||D||_F

    The Frobenius norm is then that of an orthogonal matrix, so that ``adjust_lr_fn="match_rms_adamw"`` gives the
    ``0.2 sqrt(m n) / ||D||_F * D`` of both papers, and other scales mean what they mean for Muon.

    Args:
        directions: ``(b, m, n)``; written. Zero stays zero.
        moments: ``(b, m, n)``, or ``(b, m, 1)`` or ``(b, 1, n)`` for averages over what has length 1; float32 or wider;
            written.
        beta2: Weight of the past.
        eps: Added to the root.
    """
    axes = [axis for axis in (-2, -1) if moments.size(axis) != directions.size(axis)]
    # one matrix at a time, so that no result depends on its neighbours and one wide copy is held at once
    for direction, moment in zip(directions, moments, strict=True):
        wide = direction.to(moment.dtype, copy=True)
        squares = wide.square()
        moment.lerp_(squares.mean(axes, keepdim=True) if axes else squares, 1 - beta2)
        wide.div_(moment.sqrt().add_(eps))
        norm = _norm(wide)
        size = min(direction.shape) ** 0.5
        wide.mul_(torch.where(norm > 0, size / norm, torch.zeros_like(norm)))
        direction.copy_(wide)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm, row by row, which gives the same bits for any number of threads."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1))
