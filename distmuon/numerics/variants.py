"""What members of the Muon family do with an orthogonalized matrix before it is an update."""

from __future__ import annotations

VARIANTS = ("muon", "normuon", "adamuon")


def resolve_variant(name: str) -> str:
    """The name of a variant.

    Raises:
        ValueError: for one that is not in :data:`VARIANTS`.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant={name!r} is unknown; known: {', '.join(VARIANTS)}.")
    return name
