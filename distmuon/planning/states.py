"""What a rank has to hold through training: weights, gradients and optimizer states, float32 all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from distmuon.planning.layouts import Layout, holder
from distmuon.planning.models import Model

_FLOAT32 = 4
# Weight and gradient, and two averages of AdamW or the momentum of Muon
_COPIES_ADAMW, _COPIES_MUON = 4, 3


class InfeasibleError(ValueError):
    """A plan that does not fit the machine, told in one sentence that says what would."""


@dataclass(frozen=True)
class States:
    """Bytes that one rank holds.

    Attributes:
        momentum: Of Muon's momentum.
        total: Of weights, gradients and the states of both algorithms.
    """

    momentum: int
    total: int


def states_of(model: Model, layout: Layout) -> list[States]:
    """By rank."""
    hold = holder(layout)
    alike = Counter((p.shape, p.stacked, p.on_muon) for p in model.parameters)
    muon, adamw = [0] * layout.world, [0] * layout.world
    for (shape, stacked, on_muon), count in alike.items():
        kept = muon if on_muon else adamw
        for place, holding in enumerate(hold(shape, stacked)):
            kept[place] += count * holding.box.numel
    return [
        States(_FLOAT32 * m, _FLOAT32 * (_COPIES_MUON * m + _COPIES_ADAMW * a))
        for m, a in zip(muon, adamw, strict=True)
    ]
