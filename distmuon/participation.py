"""Which parameters take part in a step: those with a gradient on any rank, agreed by all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distmuon.binding import Binding, Part
from distmuon.comm.agree import Agreement, agree, check_replicas, raise_nonfinite
from distmuon.comm.layout import check_gradient, local_tensor
from distmuon.facts import Entry
from distmuon.groups import Group, group_names
from distmuon.numerics.finite import nonfinite
from distmuon.numerics.update import all_zero
from distmuon.options import Options

_AVERAGE_KEYS = {"momentum_buffer"}
_ADAMW_KEYS = {"step", "exp_avg", "exp_avg_sq"}


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


def agree_on_turns(
    binding: Binding,
    groups: Sequence[Group],
    options: Options,
    state: Mapping[Tensor, Mapping[str, Any]],
    beside: Sequence[Mapping[str, Any]] = (),
) -> list[Turn] | None:
    """Decide with all ranks what this step is.

    Args:
        binding: The parameters.
        groups: The parameter groups.
        options: The settings of the optimizer.
        state: Of the optimizer.
        beside: Groups that another optimizer steps with this one; their gradients are looked at as well.

    Returns:
        A turn for each part; None if parameters changed on any rank, so that all have to bind them again.

    Raises:
        NonfiniteError: on every rank, if a gradient on any rank is not finite and the options look for that.
        Exception: on every rank, what any rank found wrong with a gradient.
    """
    stale = not binding.fits(groups)
    if stale and not any(_asks(part, options) for part in binding.parts):
        return None
    looks, error = [_Look.blank(part) for part in binding.parts], None
    idle, stained = False, []
    if not stale:
        try:
            looks = [_look(part, state) for part in binding.parts]
            # a step is idle only if it is for all parts
            rates = [group["lr"] for group in (*groups, *beside) if group.get("lr") is not None]
            zero_rates = all(_is_zero(lr, read=not state) for lr in rates)
            idle = zero_rates and all(map(_gradients_are_zero, binding.parts)) and _others_are_zero(beside)
            stained = [] if options.on_nonfinite is None else [*_stained(binding.parts), *_stained_beside(beside)]
            for part in binding.parts:
                _check_promise(part)
        except Exception as raised:  # whatever it is, the other ranks wait to hear of it
            error = raised
    turns: list[Turn] = []
    for part, look in zip(binding.parts, looks, strict=True):
        # what several ranks agreed on, the first part, holds for what this rank has alone
        if part.group is None or not _asks(part, options):
            if error is not None:
                raise error
            if stained and not turns:
                raise_nonfinite(None, stained)
            alone = turns[0].idle if turns else idle
            turns.append(Turn(part, part.active or tuple(look.present), alone and part.active is None))
            continue
        agreement = agree(
            part.group,
            part.pipeline.device,
            replan=stale,
            idle=idle,
            nonfinite=bool(stained),
            gradients=look.present,
            unreduced=look.unreduced,
            error=error,
            step=part.pipeline.clock.steps,
        )
        if agreement.replan:
            return None
        if agreement.nonfinite:
            raise_nonfinite(part.group, stained)
        if part.active is not None:
            turns.append(Turn(part, part.active, idle=False))
            continue
        _check_presence(part, agreement, look.present)
        active = tuple(count > 0 for count in agreement.gradients)
        if options.static_grads and not agreement.idle:
            part.active = active
        turns.append(Turn(part, active, agreement.idle))
    return turns


@dataclass(frozen=True)
class _Look:
    """What this rank sees of a part: which parameters have a gradient, and which of these in other placements."""

    present: list[bool]
    unreduced: list[bool]

    @classmethod
    def blank(cls, part: Part) -> _Look:
        """Nothing at all."""
        return cls([False] * len(part.keys), [False] * len(part.keys))


def _look(part: Part, state: Mapping[Tensor, Mapping[str, Any]]) -> _Look:
    """Look at this rank's gradients and state without talking to others.

    Raises:
        TypeError: for a gradient that cannot be used.
        ValueError: for one of another shape, or state that is not of this optimizer.
    """
    look = _Look.blank(part)
    for number, entry in part.entries.items():
        grad = entry.param.grad
        if grad is None:
            continue
        look.unreduced[number] = check_gradient(entry.fact.name, entry.param, grad)
        look.present[number] = True
        kept = state.get(entry.param)
        wanted = _ADAMW_KEYS if not entry.fact.use_muon and entry.fact.lmo is None else _AVERAGE_KEYS
        missing = wanted.difference(kept) if kept else ()
        if missing:
            raise ValueError(
                f"the state of parameter {entry.fact.name!r} lacks {', '.join(sorted(missing))}: load a state dict of "
                "the same routing, or start without optimizer state."
            )
    return look


def _asks(part: Part, options: Options) -> bool:
    """Whether the ranks of a part talk before a step; they all know that alike."""
    return part.group is not None and (part.active is None or options.on_nonfinite is not None)


def _check_presence(part: Part, agreement: Agreement, present: Sequence[bool]) -> None:
    """Refuse what would let replicas drift apart; decided by what all ranks know."""
    assert part.group is not None
    doubtful = []
    for number, shards in enumerate(part.shards):
        count, unreduced = agreement.gradients[number], agreement.unreduced[number]
        if 0 < unreduced < len(shards):
            raise ValueError(
                f"parameter {part.keys[number][0]!r} has a gradient in other placements than its own on {unreduced} of "
                f"{len(shards)} ranks: they redistribute it together, so give each such a gradient, zeros for None."
            )
        if not 0 < count < len(shards):
            continue
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
    if part.active is None:
        return
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


def _stained(parts: Sequence[Part]) -> list[str]:
    """Names of this rank's parameters whose gradient holds NaN or an infinity."""
    names, grads = [], []
    for part in parts:
        # with ddp_hook a gradient is NaN wherever its owner is not
        elsewhere = _owned_elsewhere(part) if part.pipeline.owner_gradients else set()
        for number, entry in part.entries.items():
            if entry.param.grad is not None and number not in elsewhere:
                names.append(entry.fact.name)
                grads.append(local_tensor(entry.param.grad))
    return [name for name, bad in zip(names, nonfinite(grads), strict=True) if bad]


def _named_gradients(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """What this rank has of gradients that another optimizer takes."""
    for index, group in enumerate(groups):
        names = group_names(dict(group), f"group {index} of the other optimizer")
        for name, param in zip(names, group["params"], strict=True):
            if param.grad is not None:
                grad = local_tensor(param.grad)
                yield name, grad.coalesce().values() if grad.is_sparse else grad


def _others_are_zero(groups: Sequence[Mapping[str, Any]]) -> bool:
    return all_zero([grad for _, grad in _named_gradients(groups)])


def _stained_beside(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    named = list(_named_gradients(groups))
    return [name for (name, _), bad in zip(named, nonfinite([grad for _, grad in named]), strict=True) if bad]


def _owned_elsewhere(part: Part) -> set[int]:
    """The parameters, by place in ``keys``, that another rank owns alone."""
    pipeline = part.pipeline
    return {part.whole.planned[place] for place, owner in pipeline.plan.sole_owners.items() if owner != pipeline.rank}


def _is_zero(lr: float | Tensor, *, read: bool) -> bool:
    """Whether a rate is 0; one on an accelerator is only looked at if ``read``, since that waits for it."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and not read:
        return False
    return float(lr) == 0.0
