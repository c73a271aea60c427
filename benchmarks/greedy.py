"""Greedy sequences of minimax stages: each is a best approximation on the image of the stages before it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remez import Best, Real, extremes, mp, nested_polynomial, odd_polynomial, powers, value


@dataclass(frozen=True)
class Greedy:
    """How a table of polynomial stages follows from a few numbers.

    Stage ``k`` is the best odd polynomial of its degree on ``[max(l_k, cushion u_k), u_k]``, where ``[l_k, u_k]``
    is the image of ``[lower, upper]`` under the stages before it.

    Attributes:
        degrees: Degree in ``X`` of each stage: 3, 5 or 9.
        lower: Singular values of the input from here on.
        upper: And to here.
        cushions: One a stage, 0 where there is none left: keeps the polynomial away from 0 inside the interval.
        margin: ``u_{k+1} = margin (1 + error of stage k)``.
        roundoff: Unit roundoff of the dtype (``2^-9`` for bfloat16) whose worst case widens each image, see
            :func:`rounding`; it also sets the cushions: the lowest value inside the interval, less rounding,
            is no lower than what becomes of ``l_k``.
        recentred: Each stage is scaled so that the ends of its image are as far from 1 (Polar Express).
        peak: Each stage is scaled so that its largest value is this; 0 leaves it.
        shrink: In the end every stage runs at ``X / shrink``.
        with_e: Numbers of the stages of degree 9 that have the term ``e R``.
    """

    degrees: tuple[int, ...]
    lower: float
    upper: float = 1.0
    cushions: tuple[float, ...] = ()
    margin: float = 1.0
    roundoff: float = 0.0
    recentred: bool = False
    peak: float = 0.0
    shrink: float = 1.0
    with_e: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """One stage of a greedy sequence.

    Attributes:
        best: The best approximation, before it is scaled.
        stage: Its numbers after that, as in distmuon/numerics/coefficients.py.
        interval: ``[l_k, u_k]``.
        image: What the stage makes of it, rounding included where the definition has a ``roundoff``.
    """

    best: Best
    stage: tuple[Real, ...]
    interval: tuple[Real, Real]
    image: tuple[Real, Real]


@functools.cache
def derive(definition: Greedy) -> tuple[Step, ...]:
    """All stages of a definition."""
    lower, upper = mp.mpf(definition.lower), mp.mpf(definition.upper)
    steps = []
    for number, degree in enumerate(definition.degrees):
        fit = functools.partial(_fit, degree, number in definition.with_e, upper)
        if definition.roundoff:
            best = _balanced(fit, lower, upper, definition.roundoff)
            low, inside, high = _image(best.numbers, lower, upper, definition.roundoff)
            image, stage = (min(low, inside), high), best.numbers
        else:
            cushion = definition.cushions[number] if number < len(definition.cushions) else 0.0
            best = fit(max(lower, mp.mpf(cushion) * upper))
            image, stage = _scale(best, lower, upper, definition)
        steps.append(Step(best, shrink(stage, definition.shrink), (lower, upper), image))
        lower, upper = image
    return tuple(steps)


def shrink(stage: Sequence[Real], by: float) -> tuple[Real, ...]:
    """The stage that does to ``X`` what ``stage`` does to ``X / by``."""
    s = mp.mpf(by)
    if len(stage) == 5:
        p, u, c, d, e = stage
        return p / s, u * s**2, c / s**9, d / s**5, e / s**3
    return tuple(number / s ** (2 * power + 1) for power, number in enumerate(stage))


def rounding(stage: Sequence[Real], sigma: Real, roundoff: float) -> Real:
    """Worst-case rounding of one stage at one singular value, to first order, where ``X`` is diagonal.

    Products add up in float32 and are rounded when stored: ``R``, ``M``, the polynomial without its constant
    (twice where there is a term ``e R``) and the new ``X``. Each may be off by ``roundoff`` of its size.
    ``X`` diagonal, or of orthogonal rows, is the worst case: in a dense matrix the errors of the entries differ.

    Args:
        stage: 2, 3 or 5 numbers.
        sigma: Where.
        roundoff: Largest relative error of one rounding.
    """
    coefficients = powers(stage)
    x = sigma * sigma
    rest = mp.polyval(coefficients[::-1], x) - coefficients[0]
    slope = mp.fsum(power * number * x ** (power - 1) for power, number in enumerate(coefficients) if power)
    sizes = [x * slope, rest]
    if len(stage) == 5:
        _, u, c, d, e = stage
        m = x * x + u * x
        sizes += [m * (d + 2 * c * m), rest - e * x if e else 0]
    return mp.mpf(roundoff) * (sigma * mp.fsum(map(abs, sizes)) + abs(value(coefficients, sigma)))


def _fit(degree: int, with_e: bool, upper: Real, lower: Real) -> Best:
    if degree == 9 and not with_e:
        return nested_polynomial(lower, upper)
    return odd_polynomial(lower, upper, (degree + 1) // 2)


def _scale(best: Best, lower: Real, upper: Real, definition: Greedy) -> tuple[tuple[Real, Real], tuple[Real, ...]]:
    """Image and numbers of a stage without rounding; the image is scaled as the definition says."""
    ends = [value(powers(best.numbers), end) for end in (lower, upper)]
    top = 1 + best.error
    if definition.recentred:
        factor = 2 / (ends[0] + ends[1])
        image = factor * ends[0], 2 - factor * ends[0]
    else:
        factor = mp.mpf(definition.peak) / top if definition.peak else mp.one
        image = factor * ends[0], factor * top * definition.margin
    if len(best.numbers) < 5:
        return image, tuple(factor * number for number in best.numbers)
    p, u, c, d, e = best.numbers
    return image, (factor * p, u, factor * c, factor * d, factor * e)


def _image(stage: Sequence[Real], lower: Real, upper: Real, roundoff: float) -> tuple[Real, Real, Real]:
    """Least value at ``lower``, least value elsewhere, largest value, all with rounding at its worst."""
    coefficients = powers(stage)
    points = extremes(coefficients, lower, upper)
    values = [(value(coefficients, s), rounding(stage, s, roundoff)) for s in points]
    lows = [level - error for level, error in values]
    return lows[0], min(lows[1:]), max(level + error for level, error in values)


def _balanced(fit: Callable[[Real], Best], lower: Real, upper: Real, roundoff: float) -> Best:
    """Fit on ``[d, u]`` with the least ``d >= l`` that leaves nothing inside below what becomes of ``l``."""

    def excess(logarithm: Real) -> tuple[Real, Best]:
        best = fit(mp.exp(logarithm))
        low, inside, _ = _image(best.numbers, lower, upper, roundoff)
        return inside - low, best

    left = right = mp.log(lower)
    at_left, best = at_right, _ = excess(left)
    while at_right < 0:
        left, at_left = right, at_right
        right += mp.log(2)
        at_right, best = excess(right)
    kept = 0
    while left < right and at_left < 0:  # regula falsi, halving the end that stays (Illinois)
        middle = (left * at_right - right * at_left) / (at_right - at_left)
        at_middle, best = excess(middle)
        if abs(at_middle) < mp.mpf(10) ** -20:
            break
        if at_middle < 0:
            left, at_left = middle, at_middle
            at_right /= 2 if kept == -1 else 1
            kept = -1
        else:
            right, at_right = middle, at_middle
            at_left /= 2 if kept == 1 else 1
            kept = 1
    return best
