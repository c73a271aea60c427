"""Which parameters take part in a step: those with a gradient on any rank, agreed by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distmuon.binding import Binding, Entry, Part
from distmuon.comm.agree import Agreement, agree, check_replicas
from distmuon.comm.layout import check_gradient, local_tensor
from distmuon.groups import Group
from distmuon.numerics.update import all_zero
from distmuon.options import Options


@dataclass(frozen=True)
class Turn:
    """What one part does in a step.

    Attributes:
        part: Some of the optimizer's parameters.
        active: Which of its parameters take part, the same on every rank.
        idle: Only create state. That is so in the dummy step of DCP and TorchTitan, rates and gradients of
            zero: they take it to make lazy state exist, and counted as a step it would change AdamW's bias
            correction.
    """

    part: Part
    active: tuple[bool, ...]
    idle: bool

    @property
    def entries(self) -> list[Entry]:
        """This rank's parameters that take part."""
        return [entry for number, entry in self.part.entries.items() if self.active[number]]


def agree_on_turns(binding: Binding, groups: Sequence[Group], options: Options, *, fresh: bool) -> list[Turn] | None:
    """Decide with all ranks what this step is.

    Args:
        binding: The parameters.
        groups: The parameter groups.
        options: The settings of the optimizer.
        fresh: Whether there is no state yet.

    Returns:
        A turn for each part; None if parameters changed on any rank, so that all have to bind them again.

    Raises:
        Exception: on every rank, what any rank found wrong with a gradient.
    """
    stale = not binding.fits(groups)
    if stale and (options.static_grads or all(part.group is None for part in binding.parts)):
        return None
    zero_rates = all(_is_zero(group["lr"], read=fresh) for group in groups)
    turns: list[Turn] = []
    for part in binding.parts:
        if part.active is not None and not zero_rates:
            _check_promise(part)
            turns.append(Turn(part, part.active, False))
            continue
        agreement = _agree_on_part(part, binding.parts, stale=stale, zero_rates=zero_rates)
        if agreement.replan:
            return None
        active = tuple(count > 0 for count in agreement.gradients)
        # what several ranks agreed on, the first part, holds for what this rank has alone
        idle = turns[0].idle if turns else agreement.idle
        if options.static_grads and not idle and part.group is not None:
            part.active = active
        turns.append(Turn(part, active, idle))
    return turns


def _agree_on_part(part: Part, parts: Sequence[Part], *, stale: bool, zero_rates: bool) -> Agreement:
    """Learn from all ranks of a part who has gradients.

    Args:
        part: Some parameters; without a process group there is nobody to ask.
        parts: All parts of the optimizer: a step is idle only if it is for all of them.
        stale: Whether this rank's parameters are no longer those of ``part``.
        zero_rates: Whether every learning rate is zero.

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
            idle = zero_rates and all(_gradients_are_zero(each) for each in parts)
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


def _check_promise(part: Part) -> None:
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


def _is_zero(lr: float | Tensor, *, read: bool) -> bool:
    """Whether a rate is 0; one on an accelerator is only looked at if ``read``, since that waits for it."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and not read:
        return False
    return float(lr) == 0.0
