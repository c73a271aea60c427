"""From timings to rates: of engines, links and passes; and how well these predict what was not fitted."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distmuon.calibrating.links import LinkTiming
from distmuon.calibrating.measure import Timing
from distmuon.calibrating.passes import PassTiming
from distmuon.numerics.costs import Rates
from distmuon.speeds import Link

_TERMS = tuple(field.name for field in fields(Rates))
# Terms that take away less than this share of what is left are not worth a number
_WORTH = 1e-9


@dataclass(frozen=True)
class Errors:
    """How far predictions are from timings, as fractions of the timings.

    Attributes:
        median: Of their absolute values.
        worst: The largest absolute value.
        shapes: How many were compared: shapes, or sizes of what travels.
    """

    median: float
    worst: float
    shapes: int


def fit(timings: Sequence[Timing]) -> Rates:
    """The rates of an engine, none negative, with the least sum of squared relative errors.

    Args:
        timings: Of one engine, one at least.
    """
    _check(timings)
    # either kind alone tells one fixed time
    both = len({timing.batched for timing in timings}) == 2
    terms = [term for term in _TERMS if both or term != "batched"]
    nothing = dict.fromkeys(terms, 0.0)
    units = [Rates(**{**nothing, term: 1.0}) for term in terms]
    found = _solve([[predicted(timing, unit) / timing.seconds for unit in units] for timing in timings])
    return Rates(**{**nothing, **dict(zip(terms, found, strict=True))})


def fit_link(timings: Sequence[LinkTiming]) -> Link:
    """The latencies and the rates of a class of links, none negative, with the least sum of squared relative errors.

    Args:
        timings: Of one class, one at least.
    """
    _check(timings)
    nothing = dict.fromkeys((field.name for field in fields(Link)), 0.0)
    units = [Link(**{**nothing, name: 1.0}) for name in nothing]
    return Link(*_solve([[link_seconds(timing, unit) / timing.seconds for unit in units] for timing in timings]))


def fit_pass(timings: Sequence[PassTiming]) -> float:
    """Seconds an element of one pass, with the least sum of squared relative errors.

    Args:
        timings: Of one pass, one at least.
    """
    _check(timings)
    return _solve([[1.0 / timing.seconds] for timing in timings])[0]


def errors(timings: Sequence[Timing], rates: Rates) -> Errors:
    """How well ``rates`` predict ``timings``, one at least."""
    return _errors([predicted(timing, rates) / timing.seconds for timing in timings])


def link_errors(timings: Sequence[LinkTiming], link: Link) -> Errors:
    """How well ``link`` predicts ``timings``, one at least."""
    return _errors([link_seconds(timing, link) / timing.seconds for timing in timings])


def pass_errors(timings: Sequence[PassTiming], seconds: float) -> Errors:
    """How well so many seconds an element predict ``timings``, one at least."""
    return _errors([seconds / timing.seconds for timing in timings])


def predicted(timing: Timing, rates: Rates) -> float:
    """Seconds that ``rates`` give the case of ``timing``."""
    return rates.seconds(timing.rows, timing.cols, big=timing.big, small=timing.small, batched=timing.batched)


def link_seconds(timing: LinkTiming, link: Link) -> float:
    """Seconds that ``link`` gives the case of ``timing``."""
    nbytes, ranks = timing.nbytes, timing.ranks
    if timing.collective == "exchange":
        return link.all_to_all(nbytes, nbytes)
    # of the whole, of which so much leaves a rank
    whole = nbytes * ranks / (ranks - 1)
    return link.all_reduce(whole / 2, ranks) if timing.collective == "reduce" else link.all_gather(whole, ranks)


def _check(timings: Sequence[object]) -> None:
    if not timings:
        raise ValueError("timings is empty: give one at least.")


def _errors(ratios: Sequence[float]) -> Errors:
    found = [abs(ratio - 1.0) for ratio in ratios]
    return Errors(statistics.median(found), max(found), len(found))


def _solve(rows: Sequence[Sequence[float]]) -> list[float]:
    """The ``x >= 0`` with the least ``|rows x - 1|``, for columns of any units."""
    relative = torch.tensor(rows, dtype=torch.float64)
    # units of 1 s a multiply-add and 1 s a matrix are far apart
    sizes = relative.amax(0)
    # a column of zeros, of what was not measured, gets nothing
    sizes[sizes == 0.0] = 1.0
    found: list[float] = (_non_negative(relative / sizes) / sizes).tolist()
    return found


def _non_negative(columns: Tensor) -> Tensor:
    """The ``x >= 0`` with the least ``|columns x - 1|``, float64.

    Of every choice of columns the best numbers of either sign are taken, and of those without a negative one the best:
    that is the solution, since the columns that it has solve their own problem without the constraint.
    """
    ones = torch.ones(len(columns), 1, dtype=torch.float64)
    best, least = torch.zeros(columns.size(1), dtype=torch.float64), float(len(columns))
    for count in range(1, min(columns.shape) + 1):
        for chosen in itertools.combinations(range(columns.size(1)), count):
            part = columns[:, chosen]
            # gelsd bears columns that depend on each other
            x = torch.linalg.lstsq(part, ones, driver="gelsd").solution
            left = (part @ x - ones).square().sum().item()
            if (x >= 0.0).all() and left < least * (1.0 - _WORTH):
                best, least = torch.zeros_like(best), left
                best[list(chosen)] = x[:, 0]
    return best
