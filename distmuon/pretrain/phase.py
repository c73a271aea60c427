"""What a rank says when a collective cannot go on because another rank ended or stalled."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

import torch.distributed as dist

from distmuon.comm.waiting import Wait, in_vain
from distmuon.pretrain.errors import RankLost

# gloo raises plain RuntimeErrors; NCCL and the store have classes of their own
_LOST = re.compile(
    r"gloo/transport/|gloo/rendezvous/|Connection (closed|reset) by peer|Broken pipe|Timed out waiting|"
    r"Application timeout caused pair closure"
)
# Errors that have asked the other ranks already
_IN_VAIN = " in vain for "
# Characters of a message of torch, and of who is missing, which is said last
_REASON, _REPORT = 600, 3000
# Of an exception: the phase that it ended
_ATTRIBUTE = "_distmuon_phase"


@contextlib.contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """A part of a run; a collective that fails in it because of another rank becomes a sentence.

    The innermost phase names itself, to `failed_in` too, and asks the other ranks through the store who is still
    there. With one process what is raised passes unchanged.

    Args:
        name: As it follows "in the".
        step: Number of the step that it belongs to, where it belongs to one.

    Raises:
        RankLost: If another rank ended or stalled. What is raised for other reasons passes unchanged.
    """
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        if failed_in(error) == (None, None):
            setattr(error, _ATTRIBUTE, (name, step))
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if isinstance(error, RankLost) or alone or not lost_others(error):
            raise
        where = name if step is None else f"{name} of step {step}"
        raise RankLost(
            f"rank {dist.get_rank()}: in the {where} another rank has probably ended or stalled "
            f"({_who_is_missing(error, where, began)}): see what that rank said, and go on from the last checkpoint "
            "with --resume auto."
        ) from error


def _who_is_missing(error: Exception, where: str, began: float) -> str:
    """What an exchange of distmuon says of itself; torch's own are asked about here."""
    world = dist.group.WORLD
    if _IN_VAIN in str(error):
        return _one_line(str(error), _REPORT)
    if world is None:
        return short_reason(error)
    return _one_line(in_vain(Wait(world, f"others in the {where}", began=began), error), _REPORT)


def failed_in(error: BaseException) -> tuple[str | None, int | None]:
    """Name and step of the innermost phase that an exception, or the one that it comes from, has ended."""
    chain: BaseException | None = error
    while chain is not None:
        if hasattr(chain, _ATTRIBUTE):
            name, step = getattr(chain, _ATTRIBUTE)
            return name, step
        chain = chain.__cause__ or chain.__context__
    return None, None


def lost_others(error: BaseException) -> bool:
    """Whether an exception comes from a connection to another rank that broke or waited too long."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, dist.DistError) or (isinstance(chain, RuntimeError) and _LOST.search(str(chain))):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def short_reason(error: BaseException) -> str:
    """A message of torch or gloo in one line, without places in their sources and advice."""
    return _one_line(str(error), _REASON)


def _one_line(text: str, most: int) -> str:
    text = re.sub(r"\[\S*\.(?:cc|cpp|h|hpp):\d+\]\s*", "", " ".join(text.split()))
    text = re.sub(r"^rank \d+: ", "", text)
    text = re.sub(r"\. This is typically caused by[^)]*", "", text)
    return text.rstrip(".: ")[:most]
