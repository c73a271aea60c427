"""What this rank waits for from others; when that does not come, ranks tell each other and the user who is missing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from distmuon.comm.board import Board, Word

# Seconds after this rank gave up that make another rank a late one
_LATE = 1.0
# Seconds in which other ranks may tell where they are: after a time-out they find out one by one
_PATIENCE, _PATIENCE_AFTER_TIMEOUT = 2.0, 10.0
# After what is waited for in a group that the reader is not in, or does not wait in
_ELSEWHERE = " (in another group)"
# Seconds between two looks at the board: the first, how much longer each time, the longest
_PAUSE, _MORE, _LONGEST = 0.1, 1.3, 0.5


@dataclass(eq=False)
class Wait:
    """Something that needs other ranks.

    Attributes:
        group: The ranks.
        what: What is waited for, in words that are the same on every rank; a function is asked only if need be.
        work: What is under way, where the host does not wait for it.
        began: When, by the monotonic clock, in seconds.
        told: Whether other ranks were told of it.
        over: Whether it came.
    """

    group: dist.ProcessGroup
    what: str | Callable[[], str]
    work: dist.Work | None = None
    began: float = field(default_factory=time.monotonic)
    told: bool = False
    over: bool = False

    @property
    def text(self) -> str:
        """What is waited for."""
        return self.what if isinstance(self.what, str) else self.what()

    @property
    def came(self) -> bool:
        """Whether it has come, as far as can be told without waiting."""
        return self.over or (self.work is not None and self.work.is_completed())

    @property
    def seconds(self) -> float:
        """How long it has been waited for."""
        return time.monotonic() - self.began


# What this process waits for at present, of all threads
_OPEN: list[Wait] = []
# What came to nothing and was told of, which holds until something comes again
_LOST: list[Wait] = []


@contextlib.contextmanager
def waiting(group: dist.ProcessGroup, what: str | Callable[[], str]) -> Iterator[None]:
    """A block that waits for other ranks.

    Args:
        group: The ranks.
        what: What is waited for, in words that are the same on every rank.

    Raises:
        RuntimeError: for one of the block's (torch raises them at a time-out or a lost connection), with what was
            waited for and which ranks have said that they wait for the same.
    """
    wait = Wait(group, what)
    remember(wait)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _LOST.append(wait)
        raise RuntimeError(in_vain(wait, error)) from error
    else:
        _take_back(wait)
        while _LOST:
            _take_back(_LOST.pop())
    finally:
        _OPEN.remove(wait)


def remember(wait: Wait) -> None:
    """Count a wait among those that :func:`hang_report` tells of."""
    _OPEN.append(wait)


def forget(wait: Wait) -> None:
    """It came."""
    _take_back(wait)
    _OPEN.remove(wait)


def drop(waits: Sequence[Wait]) -> None:
    """Nobody looks after these any longer: whether they came remains unknown."""
    for wait in waits:
        forget(wait)


def _take_back(wait: Wait) -> None:
    """What was told of a wait that ended well holds no more."""
    wait.over = True
    if wait.told:
        for board in _boards(wait.group):
            with contextlib.suppress(Exception):
                board.take_back(dist.get_rank())


def hang_report(patience: float = 2.0) -> str:
    """Say what this process waits for from other ranks, for how long, and which ranks wait for the same.

    The errors of :class:`distmuon.Muon` and :func:`distmuon.clip_grad_norm_` at a time-out or a lost rank say this by
    themselves. Call it from another thread, such as a watchdog's, to ask earlier; it is no collective. What it says to
    other ranks goes through the store of the process group.

    Args:
        patience: Seconds in which other ranks may say where they are.
    """
    waits = [wait for wait in list(_OPEN) if is_up(wait.group) and not wait.came]
    if not waits:
        return f"rank {dist.get_rank() if dist.is_initialized() else 0} waits for no exchange of distmuon"
    return "\n".join(tell(wait, patience) for wait in waits)


def in_vain(wait: Wait, error: Exception) -> str:
    """Say what was waited for when torch gave up, and who is missing: for groups that are of no use after it.

    Args:
        wait: What was waited for.
        error: Torch's, at a time-out or a lost connection.
    """
    patience = _PATIENCE_AFTER_TIMEOUT if "time" in str(error).lower() else _PATIENCE
    return f"{tell(wait, patience)} ({_first_line(error)})"


def tell(wait: Wait, patience: float) -> str:
    """Publish what this rank waits for, and put what is heard of the others into a sentence."""
    me, ranks = dist.get_rank(), dist.get_process_group_ranks(wait.group)
    wait.told = True
    # of others: what they say, and how long they had waited when this rank told; below 0: they came later
    now, heard, answered = Word(wait.text, wait.seconds), dict[int, Word](), threading.Event()
    # the store may be gone with the rank that held it, and then answers late or never
    asker = threading.Thread(target=_ask, args=(wait, now, patience, heard, answered), daemon=True)
    asker.start()
    asker.join(patience + 1.0)
    others = {rank: heard[rank] for rank in ranks if rank in heard}
    alike: dict[str, list[int]] = {}
    for rank, said in others.items():
        alike.setdefault(said.what, []).append(rank)
    late = [rank for rank in alike.get(now.what, []) if others[rank].seconds < -_LATE]
    same = [rank for rank in alike.pop(now.what, []) if others[rank].seconds >= -_LATE]
    here = [said.seconds for said in others.values() if not said.what.endswith(_ELSEWHERE)]
    silent = [rank for rank in ranks if rank != me and rank not in heard]
    clauses = [f"{_ranks(same)} for the same"] if same else []
    clauses += [f"{_ranks(there)} for {what}" for what, there in alike.items()]
    found = f"; there wait {', '.join(clauses)}" if clauses else ""
    if silent and not answered.is_set():
        advice = (
            f"nothing is heard of {_ranks(silent)}, as the store of the process group does not answer: it lives on "
            "rank 0, or with torchrun's agent, so look there first"
        )
    elif silent:
        advice = f"nothing is heard of {_ranks(silent)}: ended, stalled or far behind, so look there first"
    elif late:
        advice = f"{_ranks(late)} came only after that: stalled, so look there first"
    elif here and min(here) > _LATE + 2 * now.seconds:
        advice = "this rank came only when the others had given up: it stalled, so look here first"
    elif len(same) < len(ranks) - 1:
        advice = "all ranks wait, for different things: look for the first error among them"
    else:
        advice = "all ranks wait for the same: look at the network between them"
    return f"rank {me} waited {now.seconds:.1f} s in vain for {now.what}{found}; {advice}"


def _ask(wait: Wait, now: Word, patience: float, heard: dict[int, Word], answered: threading.Event) -> None:
    with contextlib.suppress(Exception):  # whatever is wrong with the store, the first error is what counts
        me, boards = dist.get_rank(), _boards(wait.group)
        others = {*dist.get_process_group_ranks(wait.group)} - {me}
        for board, where in zip(boards, ("", _ELSEWHERE), strict=False):
            board.say(me, now.seconds, now.what + where)
        if wait.over:  # it came meanwhile, and took nothing back as nothing was said
            _take_back(wait)
        began, pause = time.monotonic(), _PAUSE
        while len(heard) < len(others) and (passed := time.monotonic() - began) < patience:
            for rank, said in _hear(boards).items():
                if rank in others and rank not in heard:
                    heard[rank] = Word(said.what, said.seconds - passed)
            time.sleep(pause)
            pause = min(_MORE * pause, _LONGEST)
        answered.set()


def _hear(boards: Sequence[Board]) -> dict[int, Word]:
    """What ranks say, of this group or, where they say nothing of that, of another one."""
    here, *elsewhere = [board.read() for board in boards]
    away = {
        rank: said if said.what.endswith(_ELSEWHERE) else Word(said.what + _ELSEWHERE, said.seconds)
        for words in elsewhere
        for rank, said in words.items()
    }
    return {**away, **here}


def _boards(group: dist.ProcessGroup) -> list[Board]:
    """Where ranks tell: the store of the group, and that of the job for those who wait in another group."""
    world = dist.group.WORLD
    groups = [group, *([world] if world is not None and world is not group else [])]
    return [Board(one.get_group_store(), one.size()) for one in groups]


def is_up(group: dist.ProcessGroup) -> bool:
    """Whether a group has not been destroyed."""
    try:
        return dist.is_initialized() and bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def _ranks(ranks: Sequence[int]) -> str:
    """As in "ranks 0, 2, 5 to 9"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    short = [f"{run[0]} to {run[-1]}" if len(run) > 3 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(short)}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
