"""Steps of unit size in a norm, for what is no hidden matrix: the linear minimization oracles of Scion."""

from __future__ import annotations

LMOS = ("sign", "col_norm", "row_norm", "bias_rms")


def resolve_lmo(name: str | None) -> str | None:
    """The name of an oracle; None is AdamW.

    Raises:
        ValueError: for one that is not in :data:`LMOS`.
    """
    if name is not None and name not in LMOS:
        raise ValueError(f"lmo={name!r} is unknown; known: {', '.join(LMOS)}, or None for AdamW.")
    return name
