"""Best approximations of the sign function by ``sigma f(sigma^2)``: Remez exchange in 40-digit arithmetic.

On ``[l, u]`` each function here minimizes ``max |sigma f(sigma^2) - 1|``; what ``f`` ranges over differs:
polynomials (:func:`odd_polynomial`), degree-9 polynomials that need no term in ``R`` when nested
(:func:`nested_polynomial`), rational functions (:func:`odd_rational`). Each reaches its largest error at one point
more than ``f`` has numbers; why no other ``f`` does better is in docs/orthogonalization.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mpmath.ctx_mp import MPContext  # type: ignore[import-untyped]

# a context of its own, so that the precision of others stays as it is
mp = MPContext()
mp.dps = 40

Real: TypeAlias = Any  # mpf: mpmath has no types
_LEVEL = 1e-14  # errors at the extremes agree to this share of the largest; exchange converges quadratically


@dataclass(frozen=True)
class Best:
    """A best approximation.

    Attributes:
        numbers: Coefficients of ``f``: ``(a, b)``, ``(a, b, c)`` or ``(p, u, c, d, e)`` as in
            distmuon/numerics/coefficients.py.
        error: The largest ``|sigma f(sigma^2) - 1|`` on the interval.
        extremes: Where it is reached, ascending; one more than there are numbers to choose.
    """

    numbers: tuple[Real, ...]
    error: Real
    extremes: tuple[Real, ...]


def powers(numbers: Sequence[Real]) -> list[Real]:
    """Coefficients of 1, R, R^2, ... of a stage of 2, 3 or 5 numbers."""
    if len(numbers) < 5:
        return list(numbers)
    p, u, c, d, e = numbers
    return [p, d * u + e, d + c * u * u, 2 * c * u, c]


def nest(coefficients: Sequence[Real]) -> tuple[Real, ...]:
    """``(p, u, c, d, e)`` of a polynomial of degree 4 in R: ``p + d M + c M^2 + e R`` with ``M = R^2 + u R``."""
    p, c1, c2, c3, c4 = coefficients
    u = c3 / (2 * c4)
    d = c2 - c4 * u * u
    return p, u, c4, d, c1 - d * u


def value(coefficients: Sequence[Real], sigma: Real) -> Real:
    """``sigma P(sigma^2)`` of coefficients of 1, R, R^2, ..."""
    return sigma * mp.polyval(list(coefficients)[::-1], sigma * sigma)


def extremes(coefficients: Sequence[Real], lower: Real, upper: Real) -> list[Real]:
    """The ends of the interval and the extremes of ``sigma P(sigma^2)`` between them, ascending."""
    slope = [(2 * power + 1) * number for power, number in enumerate(coefficients)]
    return [lower, *_square_roots(slope, lower, upper), upper]


def _square_roots(polynomial: Sequence[Real], lower: Real, upper: Real) -> list[Real]:
    """Square roots in (lower, upper) of the real zeros of a polynomial, ascending."""
    zeros = mp.polyroots(list(polynomial)[::-1], maxsteps=500, extraprec=200)
    real = (mp.re(zero) for zero in zeros if abs(mp.im(zero)) <= mp.mpf(10) ** -25 * abs(zero))
    return sorted(root for root in (mp.sqrt(zero) for zero in real if zero > 0) if lower < root < upper)


def _exchange(
    solve: Callable[[Sequence[Real]], Any], turns: Callable[[Any], list[Real]], error: Callable[[Any, Real], Real],
    points: list[Real],
) -> tuple[Any, list[Real]]:  # fmt: skip
    """Remez: level the error at ``points``, move them to the extremes of the result, until they are the same."""
    for _ in range(100):
        found = solve(points)
        moved = turns(found)
        if len(moved) != len(points):
            raise ArithmeticError(f"{len(moved)} extremes instead of {len(points)}: no alternation on this interval.")
        points = moved
        sizes = [abs(error(found, point)) for point in points]
        if max(sizes) - min(sizes) <= _LEVEL * max(sizes):
            return found, points
    raise ArithmeticError("The exchange did not settle in 100 rounds.")


def odd_polynomial(lower: Real, upper: Real, terms: int) -> Best:
    """Best ``P`` of ``terms`` coefficients: odd polynomials of degree ``2 terms - 1``.

    A linear problem: ``sigma, sigma^3, ...`` is a Chebyshev system on ``(0, u]``, so ``terms + 1`` alternating
    points prove the one best polynomial.

    Args:
        lower: ``l``, positive.
        upper: ``u``.
        terms: 2, 3 or 5.

    Returns:
        A stage of ``terms`` numbers; five come in nested form.

    Raises:
        ArithmeticError: if the exchange does not settle.
    """
    lower, upper = mp.mpf(lower), mp.mpf(upper)

    def solve(points: Sequence[Real]) -> list[Real]:
        rows = [[s ** (2 * j + 1) for j in range(terms)] + [(-1) ** i] for i, s in enumerate(points)]
        return list(mp.lu_solve(mp.matrix(rows), mp.ones(terms + 1, 1)))[:terms]

    middle, half = (lower + upper) / 2, (upper - lower) / 2
    start = [middle - half * mp.cos(mp.pi * i / terms) for i in range(terms + 1)]
    found, points = _exchange(
        solve, lambda p: extremes(p, lower, upper), lambda p, s: value(p, s) - 1, start
    )  # fmt: skip
    return Best(nest(found) if terms == 5 else tuple(found), abs(value(found, points[0]) - 1), tuple(points))


def nested_polynomial(lower: Real, upper: Real, steps: int = 5) -> Best:
    """Best ``P = p + d M + c M^2`` with ``M = R^2 + u R``: degree 9 without the term ``e R``.

    Not linear in ``u``. The best polynomial with ``e`` is the start, and ``e`` goes to zero in ``steps`` steps.
    At each, Newton's method levels the error at five of the extremes. Which five, and with which signs, follows
    from the multipliers of the linearized problem: of all fives the one whose levelled error is largest. At the
    end no small change of the four numbers lowers the error at all five (:func:`multipliers`), and the best
    polynomial with ``e`` bounds what any other could gain.

    Args:
        lower: ``l``, positive.
        upper: ``u``.
        steps: More are slower and safer.

    Returns:
        A stage of five numbers, the last one zero.

    Raises:
        ArithmeticError: if Newton's method does not settle.
    """
    lower, upper = mp.mpf(lower), mp.mpf(upper)
    numbers = list(odd_polynomial(lower, upper, 5).numbers)
    first = numbers[4]
    for step in range(1, steps + 1):
        numbers[4] = first * (steps - step) / steps
        for _ in range(50):
            five, weights = _active(numbers, extremes(powers(numbers), lower, upper))
            rows = [[*_tangent(numbers, s), -mp.sign(w)] for s, w in zip(five, weights, strict=True)]
            misses = [1 - value(powers(numbers), s) for s in five]
            change = mp.lu_solve(mp.matrix(rows), mp.matrix(misses))
            for index in range(4):
                numbers[index] += change[index]
            moved = max(abs(change[index] / numbers[index]) for index in range(4))
            if moved < (mp.mpf(10) ** -20 if step == steps else mp.mpf("1e-3")):
                break
        else:
            raise ArithmeticError("Newton's method did not settle in 50 rounds.")
    five, _ = _active(numbers, extremes(powers(numbers), lower, upper))
    worst = max(abs(value(powers(numbers), s) - 1) for s in extremes(powers(numbers), lower, upper))
    return Best(tuple(numbers), worst, tuple(five))


def multipliers(best: Best) -> list[Real]:
    """Weights, of the signs of the error, with which the gradients at the extremes of a nested polynomial sum to 0.

    All of them positive times the sign of the error: no change of ``p, u, c, d`` lowers all five errors.
    """
    return _active(best.numbers, list(best.extremes))[1]


def _tangent(numbers: Sequence[Real], sigma: Real) -> list[Real]:
    """Derivatives of ``sigma P(sigma^2)`` with respect to ``p, u, c, d``."""
    _, u, c, d, _ = numbers
    x = sigma * sigma
    m = x * x + u * x
    return [sigma, sigma * x * (d + 2 * c * m), sigma * m * m, sigma * m]


def _active(numbers: Sequence[Real], points: Sequence[Real]) -> tuple[list[Real], list[Real]]:
    """The five points whose levelled error is the largest, and their multipliers (the larger error positive)."""
    best: tuple[Real, list[Real], list[Real]] | None = None
    errors = {point: value(powers(numbers), point) - 1 for point in points}
    for five in itertools.combinations(points, 5):
        rows = mp.matrix([_tangent(numbers, point) for point in five])
        try:
            weights = [*mp.lu_solve(rows[:4, :].T, -rows[4, :].T), mp.mpf(1)]
        except ZeroDivisionError:  # four of the five alone are dependent: no weight on the fifth
            continue
        level = mp.fsum(w * errors[s] for w, s in zip(weights, five, strict=True)) / mp.fsum(map(abs, weights))
        if best is None or abs(level) > best[0]:
            best = abs(level), list(five), [weight * mp.sign(level) for weight in weights]
    if best is None:
        raise ArithmeticError("Fewer than five extremes on this interval.")
    return best[1], best[2]


@dataclass(frozen=True)
class BestRational:
    """``f(R) = constant + linear R + sum_j weight_j (R + shift_j)^-1``.

    Attributes:
        constant: Multiplies the identity.
        linear: Multiplies ``R``.
        poles: Pairs ``(weight, shift)``, shifts ascending.
        error: The largest ``|sigma f(sigma^2) - 1|`` on ``[l, 1]``.
        extremes: Where it is reached: ``2 poles + 3`` points.
    """

    constant: Real
    linear: Real
    poles: tuple[tuple[Real, Real], ...]
    error: Real
    extremes: tuple[Real, ...]

    def value(self, sigma: Real) -> Real:
        """``sigma f(sigma^2)``."""
        x = sigma * sigma
        return sigma * (self.constant + self.linear * x + sum(weight / (x + shift) for weight, shift in self.poles))

    @property
    def gain(self) -> Real:
        """``f(0)``, by which the smallest singular values grow."""
        return self.constant + sum(weight / shift for weight, shift in self.poles)


def rational_minimax(l: float, poles: int) -> tuple[float, float, tuple[tuple[float, float], ...], float]:  # noqa: E741
    """``(a0, b, ((w, c), ...), error)`` of ``f(R) = a0 + b R + sum_j w_j (R + c_j)^-1``, minimax on ``[l, 1]``.

    Args:
        l: Lower end of the interval, between 0 and 1.
        poles: Number of poles.

    Returns:
        The numbers as float64.
    """
    best = odd_rational(l, poles)
    pairs = tuple((float(weight), float(shift)) for weight, shift in best.poles)
    return float(best.constant), float(best.linear), pairs, float(best.error)


def odd_rational(lower: Real, poles: int) -> BestRational:
    """Best ``f = N / D`` with ``D`` of degree ``poles`` and ``N`` of degree ``poles + 1``, on ``[l, 1]``.

    With the error levelled at given points, ``s N(s^2) = (1 + (-1)^(i+1) E) D(s^2)`` is linear in the
    coefficients, and ``E`` an eigenvalue: no start values. The first points are the extremes of Zolotarev's
    function (Jacobi's dn), which has no linear term and one point less.

    Args:
        lower: ``l``, between 0 and 1.
        poles: Number of poles, 1 or more.

    Returns:
        The best function; its partial fractions.

    Raises:
        ArithmeticError: if the exchange does not settle or a pole is not negative.
    """
    lower = mp.mpf(lower)
    count = 2 * poles + 3
    modulus = 1 - lower * lower
    quarter = mp.ellipk(modulus)
    start = [mp.ellipfun("dn", quarter * i / (count - 1), m=modulus) for i in reversed(range(count))]

    def turns(fraction: tuple[list[Real], list[Real]]) -> list[Real]:
        top, bottom = fraction
        # d/ds (s N / D) = (N D + 2 x (N' D - N D')) / D^2 at x = s^2
        slope = _add(_times(top, bottom), [0, *_add(_times(_prime(top), bottom), _times(top, _prime(bottom)), -1)], 2)
        return [lower, *_square_roots(slope, lower, mp.one), mp.one]

    def error(fraction: tuple[list[Real], list[Real]], s: Real) -> Real:
        top, bottom = (mp.polyval(part[::-1], s * s) for part in fraction)
        return s * top / bottom - 1

    (top, bottom), points = _exchange(lambda points: _levelled(points, poles), turns, error, start)
    shifts = sorted(-mp.re(zero) for zero in mp.polyroots(bottom[::-1], maxsteps=500, extraprec=200))
    # N = (linear x + constant) D + rest
    linear = top[-1]
    rest = _add(top, [0, *(linear * number for number in bottom)], -1)[:-1]
    constant = rest[-1]
    rest = _add(rest, [constant * number for number in bottom], -1)[:-1]
    weights = [
        mp.polyval(rest[::-1], -shift) / mp.fprod(other - shift for other in shifts if other != shift)
        for shift in shifts
    ]
    pairs = tuple(zip(weights, shifts, strict=True))
    return BestRational(constant, linear, pairs, abs(error((top, bottom), points[0])), tuple(points))


def _levelled(points: Sequence[Real], poles: int) -> tuple[list[Real], list[Real]]:
    """``N`` and ``D`` (monic) whose errors at ``2 poles + 3`` points are equal in size and alternate."""
    squares = [s * s for s in points]
    # these weights are orthogonal to all s N(s^2) at the points (divided differences), which takes N away
    lines = [
        1 / (s * mp.fprod(x - other for other in squares if other != x)) for s, x in zip(points, squares, strict=True)
    ]
    size = poles + 1

    def moments(signs: Callable[[int], int]) -> Any:
        table = [
            [mp.fsum(signs(i) * lines[i] * x ** (j + k) for i, x in enumerate(squares)) for j in range(size)]
            for k in range(size)
        ]
        return mp.matrix(table)

    # sum_i lines_i x_i^k (1 + sign_i E) D(x_i) = 0 for k = 0..poles
    values, vectors = mp.eig(mp.inverse(moments(lambda i: (-1) ** (i + 1))) * -moments(lambda i: 1))
    for column, level in enumerate(values):
        bottom = [mp.re(vectors[row, column]) / mp.re(vectors[size - 1, column]) for row in range(size)]
        zeros = mp.polyroots(bottom[::-1], maxsteps=500, extraprec=200)
        real = all(abs(mp.im(z)) <= mp.mpf(10) ** -25 * abs(z) for z in [level, *zeros])
        if real and all(mp.re(zero) < 0 for zero in zeros):
            some = range(poles + 2)
            rows = [[points[i] * squares[i] ** j for j in some] for i in some]
            sides = [(1 + (-1) ** (i + 1) * mp.re(level)) * mp.polyval(bottom[::-1], squares[i]) for i in some]
            return list(mp.lu_solve(mp.matrix(rows), mp.matrix(sides))), bottom
    raise ArithmeticError("No levelled function without poles on the interval.")


def _times(a: Sequence[Real], b: Sequence[Real]) -> list[Real]:
    product = [mp.zero] * (len(a) + len(b) - 1)
    for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)):
        product[i + j] += x * y
    return product


def _add(a: Sequence[Real], b: Sequence[Real], factor: int = 1) -> list[Real]:
    return [x + factor * y for x, y in itertools.zip_longest(a, b, fillvalue=mp.zero)]


def _prime(a: Sequence[Real]) -> list[Real]:
    return [power * number for power, number in enumerate(a)][1:]
