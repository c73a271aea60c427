"""Where every coefficient of the package comes from: each table derived again from its definition.

    python benchmarks/derive_coefficients.py                     # all tables
    python benchmarks/derive_coefficients.py --table nested14

For each table: the definition, the digits that follow from it, those that the package has, the largest difference,
and range (of sigma in [1e-3, 1]) and gain (slope at 0) of both. Where no definition leads to a table, this says so and
shows the greedy sequence of the same degrees and gain instead. What the words mean: docs/orthogonalization.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from greedy import Greedy, derive
from remez import mp, odd_rational, powers

from distmuon.numerics.coefficients import TABLES, Stage, resolve_stages
from distmuon.numerics.rationals import RATIONALS, Rational

Formula: TypeAlias = "tuple[Stage, ...] | Rational"

# where minimax quintics end as their intervals shrink to 1: value 1 and two derivatives 0 there
QUINTIC_LIMIT: Stage = (15 / 8, -10 / 8, 3 / 8)

# a parameter of arXiv 2505.16932, as is its l = 1e-3
CUSHION = 0.02407327424182761


@dataclass(frozen=True)
class Definition:
    """What a table follows from.

    Attributes:
        text: In words.
        greedy: Its polynomial stages. Where ``exact`` is false, the nearest definition there is.
        rational: ``(l, poles)`` of a rational function.
        limit: Whether the limit of the quintics is the last stage.
        exact: Whether the table's digits follow from it.
        tolerance: Largest relative difference, or absolute where ``decimals`` says so.
        decimals: Whether the table is rounded to a number of decimals, rather than of digits.
    """

    text: str
    greedy: Greedy | None = None
    rational: tuple[float, int] | None = None
    limit: bool = False
    exact: bool = True
    tolerance: float = 1e-13
    decimals: bool = False


def _ours(degrees: str, lower: str) -> str:
    return (
        f"Greedy minimax, degrees {degrees}, of sigma in [{lower}, 1] and 1 % over it; upper end of each image 1 % up; "
        "stage 1 on no less than 0.02 of its upper end; no e R but in a last stage of degree 9."
    )


def _rounded(degrees: str, lower: str, roundoff: str) -> str:
    return (
        f"Greedy minimax, degrees {degrees}, of sigma in [{lower}, 1] and 1 % over it; each image is widened by the "
        f"worst rounding of its stage at unit roundoff {roundoff}; no e R but in the last stage."
    )


DEFINITIONS: dict[str, Definition] = {
    "quintic": Definition(
        "Tuned by hand by Keller Jordan for a steep slope at 0: nothing to derive.",
        Greedy((5,) * 5, 3.97e-3),
        exact=False,
    ),
    "quintic5": Definition(
        "By YouJiacheng. Not a greedy minimax sequence: the errors of its stages are not level. No definition found.",
        Greedy((5,) * 5, 3.88e-3),
        exact=False,
    ),
    "polar_express": Definition(
        "Greedy minimax quintics of sigma in [1e-3, 1], on no less than the cushion 0.02407327424182761 of each upper "
        "end, recentred, all at X / 1.01; last their limit (15, -10, 3) / 8 (arXiv 2505.16932).",
        Greedy((5,) * 7, 1e-3, cushions=(CUSHION,) * 7, recentred=True, shrink=1.01),
        limit=True,
        tolerance=1e-9,
    ),
    "cans": Definition(
        "Greedy minimax quintics of sigma in [1e-3, 1], no cushion (arXiv 2506.10935), all at X / 1.01 (ours); "
        "published to 4 decimals.",
        Greedy((5,) * 5, 1e-3, shrink=1.01),
        tolerance=6e-5,
        decimals=True,
    ),
    "cubic": Definition(
        "Greedy minimax cubics of sigma in [7e-3, 1], each scaled so that its largest value is 1.3. This definition "
        "was read off the digits of arXiv 2606.00371, rounded to 5 decimals.",
        Greedy((3,) * 5, 7e-3, peak=1.3),
        tolerance=6e-6,
        decimals=True,
    ),
    "nested14": Definition(
        _rounded("9, 9, 3, 9", "1.2e-3", "2^-9 (bfloat16)"),
        Greedy((9, 9, 3, 9), 1.2e-3, 1.01, roundoff=2.0**-9, with_e=(3,)),
    ),
    "nested13": Definition(
        _rounded("5, 9, 3, 9", "1.9e-3", "2^-9 (bfloat16)"),
        Greedy((5, 9, 3, 9), 1.9e-3, 1.01, roundoff=2.0**-9, with_e=(3,)),
    ),
    "rational2": Definition("Minimax with two poles and a linear term on [1.5e-3, 1].", rational=(1.5e-3, 2)),
    "rational3": Definition("Minimax with three poles and a linear term on [1.5e-3, 1].", rational=(1.5e-3, 3)),
}


def derived(definition: Definition) -> Formula:
    """What follows from a definition, as float64."""
    if definition.rational is not None:
        best = odd_rational(*definition.rational)
        poles = tuple((float(weight), float(shift)) for weight, shift in best.poles)
        return Rational(float(best.constant), float(best.linear), poles)
    assert definition.greedy is not None
    stages = tuple(tuple(float(number) for number in step.stage) for step in derive(definition.greedy))
    return (*stages, QUINTIC_LIMIT) if definition.limit else stages


def tabulated(name: str) -> Formula | None:
    """What the package has under a name; None if nothing."""
    if name in RATIONALS:
        return RATIONALS[name]
    return resolve_stages(name) if name in TABLES else None


def numbers(formula: Formula) -> list[list[float]]:
    """The numbers of each stage; of a rational function its constant and linear term, then each pole."""
    if isinstance(formula, Rational):
        return [[formula.constant, formula.linear], *map(list, formula.poles)]
    return [list(stage) for stage in formula]


def difference(found: Formula, known: Formula, decimals: bool = False) -> float:
    """Largest difference between two formulas of one shape: relative, or absolute in ``decimals``.

    Raises:
        ValueError: if they differ in degrees.
    """
    pairs = list(zip(numbers(found), numbers(known), strict=True))
    flat = [pair for ours, theirs in pairs for pair in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / (1.0 if decimals else max(abs(b), 1e-300)) for a, b in flat if a != b or b != 0.0)


def evaluate(formula: Formula, sigma: torch.Tensor) -> torch.Tensor:
    """What becomes of singular values, in float64."""
    if isinstance(formula, Rational):
        x = sigma * sigma
        rest = sum(weight / (x + shift) for weight, shift in formula.poles)
        return sigma * (formula.constant + formula.linear * x + rest)
    for stage in formula:
        x = sigma * sigma
        total = torch.zeros_like(x)
        for coefficient in reversed(powers(stage)):
            total = total * x + coefficient
        sigma = sigma * total
    return sigma


def range_and_gain(formula: Formula) -> tuple[float, float, float]:
    """Least and largest value of sigma in [1e-3, 1], and the slope at 0."""
    image = evaluate(formula, torch.logspace(-3, 0, 20001, dtype=torch.float64))
    if isinstance(formula, Rational):
        gain = formula.constant + sum(weight / shift for weight, shift in formula.poles)
    else:
        gain = math.prod(stage[0] for stage in formula)
    return image.min().item(), image.max().item(), gain


def describe(name: str) -> str:
    """The report on one table."""
    definition = DEFINITIONS[name]
    found, known = derived(definition), tabulated(name)
    label = "derived" if definition.exact else "nearest"
    lines = [name, f"  {definition.text}"]
    if not definition.exact and definition.greedy is not None:
        lines.append(f"  nearest: greedy minimax, degrees {definition.greedy.degrees}, l = {definition.greedy.lower}")
    lines += [f"  {label:8} ({', '.join(map(repr, row))})" for row in numbers(found)]
    if known is not None and definition.exact:
        lines += [f"  table    ({', '.join(map(repr, row))})" for row in numbers(known)]
        kind = "absolute" if definition.decimals else "relative"
        apart = difference(found, known, definition.decimals)
        lines.append(f"  largest difference {apart:.1e} {kind}, allowed {definition.tolerance:.0e}")
    if definition.rational is not None:
        best = odd_rational(*definition.rational)
        points = ", ".join(mp.nstr(point, 4) for point in best.extremes)
        lines.append(f"  error {mp.nstr(best.error, 17)} at {len(best.extremes)} points: {points}")
    elif definition.greedy is not None:
        steps = derive(definition.greedy)
        lines.append(f"  error    {', '.join(mp.nstr(step.best.error, 6) for step in steps)} (by stage)")
        lines.append(f"  points   {', '.join(str(len(step.best.extremes)) for step in steps)} (by stage)")
    for title, formula in ((label, found), ("table", known)):
        if formula is None:
            lines.append("  table    not in the package")
        else:
            low, high, gain = range_and_gain(formula)
            lines.append(f"  {title:8} range {low:.4f} to {high:.4f}, gain {gain:.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=DEFINITIONS, help="one table; all without it")
    name = parser.parse_args(arguments).table
    print("\n\n".join(describe(table) for table in ([name] if name else DEFINITIONS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
