"""From timings to the rates of an engine, and how well these predict shapes that were not fitted."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distmuon.calibrating.measure import Timing
from distmuon.numerics.costs import Rates

_TERMS = tuple(field.name for field in fields(Rates))
# Terms that take away less than this share of what is left are not worth a number
_WORTH = 1e-9


@dataclass(frozen=True)
class Errors:
    """How far predictions are from timings, as fractions of the timings.

    Attributes:
        median: Of their absolute values.
        worst: The largest absolute value.
        shapes: How many were compared.
    """

    median: float
    worst: float
    shapes: int


def fit(timings: Sequence[Timing]) -> Rates:
    """The rates, none negative, with the least sum of squared relative errors.

    Of every choice of terms the best rates of either sign are taken, and of those without a negative one the best:
    that is the solution, since the terms that it has solve their own problem without the constraint.

    Args:
        timings: Of one engine, one at least.
    """
    if not timings:
        raise ValueError("timings is empty: give one at least.")
    # either kind alone tells one fixed time
    both = len({timing.batched for timing in timings}) == 2
    terms = [term for term in _TERMS if both or term != "batched"]
    nothing = dict.fromkeys(terms, 0.0)
    units = [Rates(**{**nothing, term: 1.0}) for term in terms]
    columns = torch.tensor([[predicted(timing, unit) for unit in units] for timing in timings], dtype=torch.float64)
    relative = columns / torch.tensor([[timing.seconds] for timing in timings], dtype=torch.float64)
    # units of 1 s a multiply-add and 1 s a matrix are far apart
    sizes = relative.amax(0)
    found = _non_negative(relative / sizes) / sizes
    return Rates(**{**nothing, **dict(zip(terms, found.tolist(), strict=True))})


def errors(timings: Sequence[Timing], rates: Rates) -> Errors:
    """How well ``rates`` predict ``timings``, one at least."""
    found = [abs(predicted(timing, rates) / timing.seconds - 1.0) for timing in timings]
    return Errors(statistics.median(found), max(found), len(found))


def predicted(timing: Timing, rates: Rates) -> float:
    """Seconds that ``rates`` give the case of ``timing``."""
    return rates.seconds(timing.rows, timing.cols, big=timing.big, small=timing.small, batched=timing.batched)


def _non_negative(columns: Tensor) -> Tensor:
    """The ``x >= 0`` with the least ``|columns x - 1|``, float64."""
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
