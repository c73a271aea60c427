"""What all ranks have to know alike before a step: who has gradients, and whether anybody has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distmuon.comm.group import device_of, from_every_rank, own_rank, sum_over_ranks

# Parameters of a rank, and ranks, that a message names
_TOLD = 3

# Bits of a count of ranks, of which the 63 of a sum hold two
_HALF = 31

# Errors that keep their type when another rank raises them too
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (TypeError, ValueError, RuntimeError)}


@dataclass(frozen=True)
class Agreement:
    """The same on every rank.

    Attributes:
        replan: Whether parameters changed on any rank.
        idle: Whether every rank sees rates of zero and gradients of zero.
        nonfinite: Whether a gradient on any rank holds NaN or an infinity.
        gradients: For each parameter, how many ranks have a gradient.
        unreduced: For each parameter, how many ranks have one that must be redistributed first.
    """

    replan: bool
    idle: bool
    nonfinite: bool
    gradients: tuple[int, ...]
    unreduced: tuple[int, ...]


def agree(
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    replan: bool,
    idle: bool,
    nonfinite: bool,
    gradients: Sequence[bool],
    unreduced: Sequence[bool],
    error: Exception | None,
    step: int,
) -> Agreement:
    """One small all-reduce; every rank of the group takes part in every step.

    Args:
        group: The ranks.
        device: Where tensors of the group live.
        replan: Whether this rank's parameters changed since the plan was made.
        idle: Whether this rank sees rates and gradients of zero.
        nonfinite: Whether this rank sees NaN or an infinity.
        gradients: Whether this rank has a gradient, by parameter in the order of the plan.
        unreduced: Whether that gradient must be redistributed first.
        error: What this rank could not do.
        step: Which one it is since the optimizer was made, for messages.

    Raises:
        Exception: the error of the lowest rank that has one, on every rank.
    """
    flags = [int(error is not None), int(replan), int(idle), int(nonfinite)]
    # two counts in one number: a parameter that must be redistributed counts once in the upper half too
    marks = [int(has) + (int(late) << _HALF) for has, late in zip(gradients, unreduced, strict=True)]
    failed, replans, idles, stained, *counts = sum_over_ranks(
        [*flags, *marks], group, device, f"the agreement on the gradients of step {step}"
    )
    if failed:
        raise_on_all(group, error)
    return Agreement(
        replans > 0,
        idles == dist.get_world_size(group),
        stained > 0,
        tuple(count & ((1 << _HALF) - 1) for count in counts),
        tuple(count >> _HALF for count in counts),
    )


def raise_on_all(group: dist.ProcessGroup, error: Exception | None) -> None:
    """Raise on every rank what went wrong on the lowest one that has an error; nothing if none has.

    Raises:
        Exception: of the same kind and text on every rank, with the rank's number in front.
    """
    told = None if error is None else (type(error).__name__, str(error))
    for rank, found in zip(dist.get_process_group_ranks(group), from_every_rank(told, group), strict=True):
        if found is not None:
            kind, text = found
            # a stage of a pipeline that tells others has agreed among its own ranks before
            said = text if text.startswith("rank ") else f"rank {rank}: {text}"
            raise _KINDS.get(kind, RuntimeError)(said) from error


@contextlib.contextmanager
def across_stages(stages: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise on all stages of a pipeline what any of them raises inside, and nothing before all have ended it.

    Args:
        stages: One rank of each stage; None: there are no others.

    Raises:
        NonfiniteError: on all of them, with the same text, if gradients of some hold NaN or an infinity.
        Exception: on all of them, that of the lowest rank that has another error.
    """
    if stages is None:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # whatever it is, the other stages wait to hear of it
        error = raised
    stain = error.found if isinstance(error, NonfiniteError) else ""
    flags = [int(error is not None and not stain), int(bool(stain))]
    failed, stained = sum_over_ranks(flags, stages, device_of(stages), "the agreement of the stages of the pipeline")
    if failed:
        raise_on_all(stages, None if stain else error)
    if stained:
        found = list(dict.fromkeys(filter(None, from_every_rank(stain, stages))))
        raise NonfiniteError("; ".join(found)) from error


def check_replicas(
    group: dist.ProcessGroup, names: Sequence[str], replicas: Sequence[dict[int, int]], present: Sequence[bool]
) -> None:
    """Refuse gradients that some ranks of a replicated shard have and others have not.

    Args:
        group: The ranks.
        names: Of the parameters in question.
        replicas: For each, by global rank: a number that is equal for ranks that store the same elements.
        present: Whether this rank has a gradient of each.

    Raises:
        ValueError: naming the parameter and the ranks, on every rank.
    """
    ranks = dist.get_process_group_ranks(group)
    everywhere = from_every_rank(list(present), group)
    for number, name in enumerate(names):
        found: dict[int, dict[bool, list[int]]] = {}
        for rank, flags in zip(ranks, everywhere, strict=True):
            if rank in replicas[number]:
                shard = found.setdefault(replicas[number][rank], {})
                shard.setdefault(flags[number], []).append(rank)
        for by_presence in found.values():
            if len(by_presence) == 2:
                raise ValueError(
                    f"parameter {name!r} is replicated, and ranks {by_presence[True]} have its gradient where ranks "
                    f"{by_presence[False]} have None: average gradients over the replicas first (DDP with "
                    "find_unused_parameters=True does), or set it to zeros where it is None."
                )


class NonfiniteError(FloatingPointError):
    """Gradients that hold NaN or an infinity.

    Attributes:
        found: Which, on which ranks.
    """

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(
            f"NaN or an infinity in the gradient of {found}: nothing was updated. Lower the learning rate or clip "
            "gradients, and look at what the loss was made of; on_nonfinite='skip' leaves such steps out."
        )

    def __reduce__(self) -> tuple[type[NonfiniteError], tuple[str]]:
        return type(self), (self.found,)


def raise_nonfinite(group: dist.ProcessGroup | None, names: Sequence[str]) -> None:
    """Name the gradients that hold NaN or an infinity; all ranks of the group call this together.

    Args:
        group: The ranks; None where this rank is alone.
        names: Of the parameters whose gradient on this rank is such.

    Raises:
        NonfiniteError: on every rank, with the same text.
    """
    ranks = [own_rank()] if group is None else dist.get_process_group_ranks(group)
    told = [list(names)] if group is None else from_every_rank(list(names), group)
    found = [f"{_listed(theirs)} on rank {rank}" for rank, theirs in zip(ranks, told, strict=True) if theirs]
    more = f"; and on {len(found) - _TOLD} more ranks" if len(found) > _TOLD else ""
    raise NonfiniteError("; ".join(found[:_TOLD]) + more)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(map(repr, names[:_TOLD])) + more
