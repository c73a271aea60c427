"""Which parameters take part in a step: those with a gradient on any rank, agreed by all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distmuon.binding import Part
from distmuon.comm.agree import Agreement, agree, check_replicas
from distmuon.comm.layout import check_gradient, local_tensor
from distmuon.groups import Group
from distmuon.numerics.update import all_zero


def agree_on_part(part: Part, parts: Sequence[Part], *, stale: bool, rates_are_zero: bool) -> Agreement:
    """Learn from all ranks of a part who has gradients.

    Args:
        part: Some parameters; without a process group there is nobody to ask.
        parts: All parts of the optimizer: a step is idle only if it is for all of them.
        stale: Whether this rank's parameters are no longer those of ``part``.
        rates_are_zero: Whether every learning rate is zero.

    Raises:
        Exception: on every rank, what any rank found wrong with a gradient.
    """
    error: Exception | None = None
    present, unreduced, idle = [False] * len(part.keys), [False] * len(part.keys), False
    if not stale:
        try:
            for number, entry in part.entries.items():
                grad = entry.param.grad
                if grad is not None:
                    unreduced[number] = check_gradient(entry.fact.name, entry.param, grad)
                    present[number] = True
            idle = rates_are_zero and all(_gradients_are_zero(each) for each in parts)
        except (TypeError, ValueError) as raised:
            error = raised
    if part.group is None:
        if error is not None:
            raise error
        return Agreement(stale, idle, tuple(map(int, present)), tuple(map(int, unreduced)))
    agreement = agree(
        part.group,
        part.pipeline.device,
        replan=stale,
        idle=idle,
        gradients=present,
        unreduced=unreduced,
        error=error,
    )
    if not agreement.replan:
        _check_presence(part, agreement, present)
    return agreement


def _check_presence(part: Part, agreement: Agreement, present: Sequence[bool]) -> None:
    """Refuse what would let replicas drift apart; decided by what all ranks know."""
    assert part.group is not None
    doubtful = []
    for number, shards in enumerate(part.shards):
        count = agreement.gradients[number]
        if not 0 < count < len(shards):
            continue
        if agreement.unreduced[number]:
            raise ValueError(
                f"parameter {part.keys[number][0]!r} has a gradient that is still to be reduced over its mesh on "
                f"{count} of {len(shards)} ranks and None on the others: set it to zeros where it is None."
            )
        if len(set(shards.values())) < len(shards):
            doubtful.append(number)
    if doubtful:
        check_replicas(
            part.group,
            [part.keys[number][0] for number in doubtful],
            [part.shards[number] for number in doubtful],
            [present[number] for number in doubtful],
        )


def check_promise(part: Part) -> None:
    """Refuse a gradient that ``static_grads=True`` promised there would never be.

    Raises:
        ValueError: naming the parameter.
    """
    assert part.active is not None
    for number, entry in part.entries.items():
        if entry.param.grad is not None and not part.active[number]:
            raise ValueError(
                f"parameter {entry.fact.name!r} has a gradient now and had none in the first step, though "
                "static_grads=True promises that this never changes: build the optimizer with static_grads=False."
            )


def _gradients_are_zero(part: Part) -> bool:
    grads: list[Tensor] = [
        local_tensor(entry.param.grad) for entry in part.entries.values() if entry.param.grad is not None
    ]
    return all_zero(grads)


def rates_are_zero(groups: Sequence[Group], *, read: bool) -> bool:
    """Whether every learning rate is zero.

    Args:
        groups: The parameter groups.
        read: Whether to look at rates on an accelerator too, which waits for it.
    """
    return all(_is_zero(group["lr"], read=read) for group in groups)


def _is_zero(lr: float | Tensor, *, read: bool) -> bool:
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and not read:
        return False
    return float(lr) == 0.0
