"""What a check found: fine, a warning or a failure, and the way out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

OK, WARNING, FAILURE = "ok", "warning", "failure"
_ORDER = (OK, WARNING, FAILURE)
# Ranks that a sentence names, and sentences that a finding has
_TOLD, _SHOWN = 8, 5

Facts = dict[str, Any]
"""What a rank saw, as JSON can hold it."""

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Finding:
    """The result of one check over all ranks.

    Attributes:
        check: Its name.
        status: :data:`OK`, :data:`WARNING` or :data:`FAILURE`.
        found: What was seen.
        todo: What to do; empty where all is well.
    """

    check: str
    status: str
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be; attributes as of :class:`Finding`."""

    status: str
    found: str
    todo: str


def conclude(check: str, fine: str, problems: Sequence[Problem], *, measured: str = "") -> Finding:
    """One finding of a check: ``fine`` if there are no problems, else all of them, as bad as the worst.

    Args:
        check: Its name.
        fine: What was found if there are no problems.
        problems: What was found else.
        measured: What is told in both cases, before it.
    """
    if not problems:
        return Finding(check, OK, some([measured, fine]))
    status = max((problem.status for problem in problems), key=_ORDER.index)
    return Finding(check, status, some([measured, *(p.found for p in problems)]), some(p.todo for p in problems))


def by_value(values: Mapping[int, T]) -> dict[T, list[int]]:
    """The ranks of each value, in the order of the first rank that has it."""
    found: dict[T, list[int]] = {}
    for rank, value in values.items():
        found.setdefault(value, []).append(rank)
    return found


def ranks_text(ranks: Iterable[int]) -> str:
    """Such as ``rank 3`` or ``ranks 0, 1``; of many the first ones."""
    named = list(ranks)
    text = ", ".join(map(str, named[:_TOLD]))
    if len(named) > _TOLD:
        text += f" and {len(named) - _TOLD} more"
    return f"rank{'s' * (len(named) > 1)} {text}"


def size_text(nbytes: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


def some(texts: Iterable[str]) -> str:
    """Texts, each once; of many the first ones."""
    named = list(dict.fromkeys(text for text in texts if text))
    more = [f"and {len(named) - _SHOWN} more"] if len(named) > _SHOWN else []
    return "; ".join(named[:_SHOWN] + more)
