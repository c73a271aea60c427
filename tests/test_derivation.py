"""Coefficients follow from their definitions, and what is called a best approximation is one."""

import itertools
import pathlib
import sys

import pytest
import torch

from distmuon.numerics.coefficients import TABLES
from distmuon.numerics.rationals import RATIONALS

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"

if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import derive_coefficients as tool  # noqa: E402
import remez  # noqa: E402
from greedy import Greedy, derive  # noqa: E402

NAMES = [*TABLES, *RATIONALS]
EXACT = [name for name in NAMES if tool.DEFINITIONS[name].exact]
# float64 evaluates a polynomial of 40-digit coefficients to about this
EVALUATION = 1e-12


def grid(lower, upper, points=20001):
    return torch.logspace(0, 1, points, dtype=torch.float64).sub_(1).div_(9) * float(upper - lower) + float(lower)


def largest_error(formula, lower, upper):
    """On points dense everywhere and denser at the lower end."""
    sigma = torch.cat([grid(lower, upper), torch.logspace(0, 1, 20001, dtype=torch.float64).log10()])
    sigma[20001:] = float(lower) * (float(upper) / float(lower)) ** sigma[20001:]
    return (tool.evaluate(formula, sigma) - 1).abs().max().item()


def floats(numbers):
    return (tuple(float(number) for number in numbers),)


@pytest.mark.parametrize("name", EXACT)
def test_digits_follow_from_the_definition(name):
    definition = tool.DEFINITIONS[name]
    found, known = tool.derived(definition), tool.tabulated(name)
    assert tool.difference(found, known, definition.decimals) <= definition.tolerance
    for ours, theirs in zip(tool.range_and_gain(found), tool.range_and_gain(known), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_all_tables_but_two_have_a_definition():
    assert set(NAMES) - set(EXACT) == {"quintic", "quintic5"}


def test_difference_sees_one_digit():
    formula = ((2.0, -1.0), (3.0, -4.0, 5.0))
    assert tool.difference(formula, ((2.0, -1.0), (3.0, -4.0, 5.0005))) == pytest.approx(1e-4, rel=1e-3)
    assert tool.difference(formula, ((2.0, -1.0), (3.0, -4.0, 5.0005)), decimals=True) == pytest.approx(5e-4)
    assert tool.difference(((1.0, 0.0),), ((1.0, 0.1),)) == 1.0
    assert tool.difference(((1.0, 0.1),), ((1.0, 0.0),)) > 1.0
    with pytest.raises(ValueError, match=r"shorter|longer"):
        tool.difference(formula, formula[:1])


@pytest.mark.parametrize("terms", [2, 3, 5])
@pytest.mark.parametrize("interval", [(1e-3, 1.0), (0.02, 1.7), (0.3, 1.5), (0.98, 1.01)])
def test_odd_polynomials_equioscillate(terms, interval):
    best = remez.odd_polynomial(*interval, terms)
    coefficients = remez.powers(best.numbers)
    errors = [remez.value(coefficients, point) - 1 for point in best.extremes]
    assert len(errors) == terms + 1
    assert (best.extremes[0], best.extremes[-1]) == tuple(remez.mp.mpf(end) for end in interval)
    assert all(float(abs(error) / best.error) == pytest.approx(1, abs=1e-13) for error in errors)
    assert all(a * b < 0 for a, b in itertools.pairwise(errors))
    assert largest_error(floats(best.numbers), *interval) <= float(best.error) + EVALUATION


def test_cubic_is_the_closed_form():
    # level at both ends: a / -b = l^2 + l u + u^2
    lower, upper = 0.05, 1.3
    a, b = remez.odd_polynomial(lower, upper, 2).numbers
    assert float(-a / b) == pytest.approx(lower**2 + lower * upper + upper**2, rel=1e-14)
    peak = remez.mp.sqrt(-a / (3 * b))
    assert float(remez.value((a, b), peak) + remez.value((a, b), upper)) == pytest.approx(2, rel=1e-14)


@pytest.mark.parametrize("interval", [(0.0202, 1.01), (0.0166, 1.764), (0.006, 1.9)])
def test_nested_polynomials_without_e_are_best(interval):
    best = remez.nested_polynomial(*interval)
    coefficients = remez.powers(best.numbers)
    errors = [remez.value(coefficients, point) - 1 for point in best.extremes]
    assert best.numbers[4] == 0
    assert all(float(abs(error) / best.error) == pytest.approx(1, abs=1e-13) for error in errors)
    assert largest_error(floats(best.numbers), *interval) <= float(best.error) + EVALUATION
    # no direction lowers all five errors: positive weights of their signed gradients sum to zero
    weights = remez.multipliers(best)
    assert len(weights) == 5
    assert all(weight * error > 0 for weight, error in zip(weights, errors, strict=True))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        change = 1 + 1e-3 * torch.randn(5, generator=generator, dtype=torch.float64)
        nearby = (torch.tensor(floats(best.numbers)[0], dtype=torch.float64) * change).tolist()
        assert largest_error((nearby,), *interval) > float(best.error)
    # the term e R can only help, and helps little
    assert 0.97 < float(remez.odd_polynomial(*interval, 5).error / best.error) < 1


def test_nesting_is_the_same_polynomial():
    coefficients = [1.5, -2.0, 3.0, -0.5, 0.25]
    assert remez.powers(remez.nest(coefficients)) == pytest.approx(coefficients, rel=1e-14)


@pytest.mark.parametrize("poles", [1, 2, 3])
@pytest.mark.parametrize("lower", [1e-3, 2e-3, 0.1])
def test_rational_functions_equioscillate(lower, poles):
    best = remez.odd_rational(lower, poles)
    errors = [best.value(point) - 1 for point in best.extremes]
    # 2 poles + 2 numbers, and one point more: none is better
    assert len(errors) == 2 * poles + 3
    assert all(float(abs(error) / best.error) == pytest.approx(1, abs=1e-13) for error in errors)
    assert all(a * b < 0 for a, b in itertools.pairwise(errors))
    assert all(shift > 0 for _, shift in best.poles)
    constant, linear, pairs, error = remez.rational_minimax(lower, poles)
    assert largest_error(tool.Rational(constant, linear, pairs), lower, 1.0) <= error + EVALUATION
    assert (constant, error, pairs[-1][1]) == tuple(map(float, (best.constant, best.error, best.poles[-1][1])))
    # ends and 2 poles + 1 points inside
    assert float(best.extremes[0]) == lower
    assert float(best.extremes[-1]) == 1.0


def test_no_rational_function_nearby_is_better():
    constant, linear, pairs, error = remez.rational_minimax(1.5e-3, 2)
    numbers = torch.tensor([constant, linear, *itertools.chain(*pairs)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        near = (numbers * (1 + 1e-3 * torch.randn(6, generator=generator, dtype=torch.float64))).tolist()
        rational = tool.Rational(near[0], near[1], ((near[2], near[3]), (near[4], near[5])))
        assert largest_error(rational, 1.5e-3, 1.0) > error


def test_a_linear_term_lowers_the_error():
    # Zolotarev's function with two poles on [2e-3, 1], scaled to be centred: (1 - k) / (1 + k)
    from remez import mp

    lower, poles = mp.mpf("2e-3"), 2
    modulus = 1 - lower * lower
    quarter = mp.ellipk(modulus)
    shifts = []
    for j in range(1, 2 * poles + 1):
        sn, cn = (mp.ellipfun(kind, j * quarter / (2 * poles + 1), m=modulus) for kind in ("sn", "cn"))
        shifts.append(lower**2 * (sn / cn) ** 2)

    def zolotarev(s):
        odd, even = shifts[0::2], shifts[1::2]
        return s * mp.fprod((s * s + e) / (s * s + o) for e, o in zip(even, odd, strict=True))

    values = [zolotarev(lower * (1 / lower) ** (mp.mpf(i) / 2000)) for i in range(2001)]
    without = (max(values) - min(values)) / (max(values) + min(values))
    assert float(without) > 1.3 * float(remez.odd_rational(lower, poles).error)


def rounded_stage(stage, x):
    """One stage as bfloat16 tensors go through it: products in float32, rounded when stored."""

    def store(t):
        return t.bfloat16().float()

    gram = store(x * x)
    if len(stage) == 2:
        rest = store(stage[1] * gram)
    elif len(stage) == 3:
        rest = store(stage[2] * (gram * gram) + stage[1] * gram)
    else:
        _, u, c, d, e = stage
        nested = store(gram * gram + u * gram)
        rest = store(c * (nested * nested) + d * nested)
        rest = store(rest + e * gram) if e else rest
    return store(rest * x + stage[0] * x)


def all_bfloat16(lower, upper):
    numbers = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return numbers[(numbers >= float(lower)) & (numbers <= float(upper))]


@pytest.mark.parametrize("name", ["nested14", "nested13"])
def test_stages_made_for_bfloat16_stay_in_their_intervals_in_bfloat16(name):
    steps = derive(tool.DEFINITIONS[name].greedy)
    for step in steps:
        x = all_bfloat16(*step.interval)
        assert len(x) > 300
        y = rounded_stage(tuple(map(float, step.stage)), x)
        # the bound is of first order: one more rounding is what it may miss
        assert y.max().item() <= float(step.image[1]) * (1 + 2**-9)
        assert y.min().item() >= float(step.image[0]) * (1 - 2**-9) > 0
    y = all_bfloat16(steps[0].interval[0], 1.0)
    for step in steps:
        y = rounded_stage(tuple(map(float, step.stage)), y)
    assert float(steps[-1].image[0]) <= y.min() <= y.max() <= float(steps[-1].image[1])


def test_one_percent_of_room_is_too_little_for_bfloat16():
    # what roundoff is for: the second stage sends what the first rounds past its interval far away
    greedy = Greedy((9, 9, 3, 9), 1.315e-3, 1.01, cushions=(0.02,), margin=1.01, with_e=(3,))
    y = all_bfloat16(3e-3, 1.0)
    for step in derive(greedy):
        y = rounded_stage(tuple(map(float, step.stage)), y)
    assert y.abs().max() > 10


def test_definition_of_rounding_counts_what_is_stored():
    # a cubic at sigma = 1 has R = 1, rest = b and X = a + b, each rounded once
    from greedy import rounding

    assert float(rounding((2.0, -1.0), 1.0, 0.5)) == 0.5 * (1 + 1 + 1)
    # p + d M + c M^2 + e R with M = 0 at sigma = 1: rest = e R is stored twice, the first time as 0
    assert float(rounding((1.0, -1.0, 3.0, 2.0, 0.5), 1.0, 1.0)) == pytest.approx(abs(2 + 0.5) + 0.5 + 0 + 0 + 1.5)


def test_command_prints_a_table(capsys):
    assert tool.main(["--table", "cubic"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cubic\n")
    assert "(3.36566, -3.3421)" in printed
    assert "range 0.1191 to 1.3000, gain 119.32" in printed
    tool.main(["--table", "quintic"])
    assert "nothing to derive" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool.main(["--table", "keller"])
