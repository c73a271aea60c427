"""The last step of a wave: weights decay and step along the directions that came home."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from distmuon.flight import Flight, LocalParameter, at, write_words
from distmuon.groups import Group
from distmuon.numerics.update import apply_direction, lr_scale
from distmuon.plan.matrices import MatrixSpec
from distmuon.plan.routes import Part


def apply_parts(
    flight: Flight,
    parts: Sequence[Part],
    directions: Sequence[Tensor],
    groups: Sequence[Group],
    local: Mapping[int, LocalParameter],
    *,
    ratios: Mapping[int, float],
    foreach: bool,
    exact: bool,
) -> None:
    """Update what this rank stores of some parts of a wave, and take back their second moments.

    Args:
        flight: The wave.
        parts: What came home, or was here.
        directions: Of each part.
        groups: All parameter groups of the optimizer.
        local: What this rank stores, by place in the plan; written.
        ratios: Factors on the rates of groups that have one, by index.
        foreach: See :mod:`distmuon.numerics.elementwise`.
        exact: Round as torch.optim.Muon does.
    """
    direction_of, matrices = {}, []
    for part, direction in zip(parts, directions, strict=True):
        mine = local[flight.parameter(part)]
        if part.moments:
            write_words(mine, part.box, direction.to(mine.param.device))
        else:
            # some parameters of a wave may be on the host, others on the device
            direction_of[part.slot] = direction.to(mine.param.device)
            matrices.append(part)
    for (index, matrix), members in _by_scale(flight, matrices).items():
        group = groups[index]
        holders = [local[flight.parameter(part)] for part in members]
        apply_direction(
            [at(mine.param, part.box, mine.box) for mine, part in zip(holders, members, strict=True)],
            [direction_of[part.slot] for part in members],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            scale=lr_scale(group["adjust_lr_fn"], *matrix.logical) * ratios.get(index, 1.0),
            foreach=foreach,
            cautious_wd=group["cautious_wd"],
            exact=exact,
            tall=matrix.rows > matrix.cols,
        )


def _by_scale(flight: Flight, parts: Sequence[Part]) -> dict[tuple[int, MatrixSpec], list[Part]]:
    """Parts by the index of their parameter group and the shape of their matrix, which have their learning rate."""
    found: dict[tuple[int, MatrixSpec], list[Part]] = {}
    for part in parts:
        spec = flight.plan.parameters[flight.parameter(part)]
        found.setdefault((spec.group, spec.matrices.alike), []).append(part)
    return found
