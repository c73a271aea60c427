r"""Polynomials of the Newton-Schulz iteration, each with its source.

An iteration maps ``X`` to ``P(X X^T) X``. A stage is a tuple whose length says what ``P`` is, with
``R = X X^T``:

==========  =================================================  ===============================
length      P(R)                                               products with R beside R itself
==========  =================================================  ===============================
2           ``a + b R``                                        0
3           ``a + b R + c R^2``                                1
5           ``p + d M + c M^2 + e R`` with ``M = R^2 + u R``    2 (degree 9 in X)
==========  =================================================  ===============================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Stage: TypeAlias = tuple[float, ...]
Coefficients: TypeAlias = "str | Stage | Sequence[Stage]"


@dataclass(frozen=True)
class CoefficientTable:
    """A named sequence of stages.

    Attributes:
        stages: One tuple a step; see the module's table.
        source: Where the numbers come from.
        more_steps: What steps past the table do: ``"repeat_last"`` repeats the last stage, ``"error"``
            raises, since the stages were optimized together for exactly this length.
        prefix: Whether fewer steps than stages are allowed (each stage was optimized greedily).
        restarts: Stages at which the Gram form makes its Gram matrix anew in float16 or wider, where these were
            tested with the stages; None: see :func:`default_restarts`.
    """

    stages: tuple[Stage, ...]
    source: str
    more_steps: Literal["repeat_last", "error"]
    prefix: bool
    restarts: tuple[int, ...] | None = None


def with_safety(stages: Sequence[Stage], safety: float) -> tuple[Stage, ...]:
    """Stages evaluated at ``X / safety``, which keeps rounding from leaving the interval.

    Args:
        stages: Tuples of 2, 3 or 5 numbers.
        safety: A factor slightly over 1.
    """
    return tuple(_scaled(stage, safety) for stage in stages)


def _scaled(stage: Stage, s: float) -> Stage:
    if len(stage) == 5:
        p, u, c, d, e = stage
        return p / s, u * s**2, c / s**9, d / s**5, e / s**3
    return tuple(number / s ** (2 * power + 1) for power, number in enumerate(stage))


_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

_CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

_NESTED = (
    "this project: greedy minimax stages of degree {}, l = {}, each on an interval that allows for the rounding of the "
    "one before to bfloat16 (docs/orthogonalization.md)"
)

TABLES: dict[str, CoefficientTable] = {
    "quintic": CoefficientTable(
        stages=((3.4445, -4.7750, 2.0315),),
        source="Keller Jordan, https://kellerjordan.github.io/posts/muon; torch.optim.Muon",
        more_steps="repeat_last",
        prefix=True,
    ),
    "quintic5": CoefficientTable(
        stages=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        source="YouJiacheng, in KellerJordan/modded-nanogpt and microsoft/dion",
        more_steps="error",
        prefix=False,
    ),
    "polar_express": CoefficientTable(
        stages=(*with_safety(_POLAR_EXPRESS, 1.01), (1.875, -1.25, 0.375)),
        source="Amsel et al., The Polar Express, arXiv 2505.16932, l = 1e-3, safety 1.01",
        more_steps="repeat_last",
        prefix=True,
    ),
    "cans": CoefficientTable(
        stages=with_safety(_CANS, 1.01),
        source="Grishina et al., Chebyshev-type Newton-Schulz (CANS), arXiv 2506.10935; safety 1.01 is ours, "
        "without it bfloat16 rounding of matrices of 64 rows was seen to leave the interval and diverge",
        more_steps="error",
        prefix=False,
    ),
    "cubic": CoefficientTable(
        stages=(
            (3.36566, -3.34210),
            (2.57444, -1.49574),
            (2.53690, -1.43126),
            (2.44189, -1.27640),
            (2.22305, -0.96307),
        ),
        source="arXiv 2606.00371: five cubic stages, no product with R beside R itself; cheap and coarse, its "
        "results lie in [0.12, 1.30]",
        more_steps="error",
        prefix=False,
    ),
    "nested14": CoefficientTable(
        stages=(
            (14.751735991540153, -1.1736313037362134, 246.65048800089605, 120.38262295903928, 0.0),
            (6.679757894339768, -5.02959777825415, 0.32092871350946484, 2.9013618301387436, 0.0),
            (2.20105937192738, -0.5303558529820639),
            (3.7313434443458715, -3.659842265080706, 0.3594401725021183, 1.9546420752923812, -0.20534677456360698),
        ),
        source=_NESTED.format("9, 9, 3, 9", "1.2e-3"),
        more_steps="error",
        prefix=False,
        restarts=(0, 2),
    ),
    "nested13": CoefficientTable(
        stages=(
            (8.280135547258539, -23.95808664070708, 17.404176264776147),
            (6.968823748847387, -4.674152032256683, 0.4501722690896928, 3.5121011290914277, 0.0),
            (2.216833077212073, -0.5315212231564308),
            (3.8391629850215927, -3.7096757439427757, 0.3662803209584714, 2.0227297031103926, -0.1975217547409781),
        ),
        source=_NESTED.format("5, 9, 3, 9", "1.9e-3"),
        more_steps="error",
        prefix=False,
    ),
}

# torch.optim.Muon refuses 100 steps or more; so many never help
MAX_STEPS = 99


def default_restarts(stages: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Where the Gram form begins anew with stages that were not made for it.

    Small products square what rounding did to the smallest eigenvalues, and 16 bits do not bear that for
    polynomials that are steep beyond their interval: nearly diagonal matrices were seen to diverge.

    Args:
        stages: Their number.
        dtype: Of the iterates.
    """
    return tuple(range(stages)) if dtype.itemsize < 4 else (0,)


def resolve_stages(coefficients: Coefficients, steps: int | None = None) -> tuple[Stage, ...]:
    """The stages that ``steps`` iterations run.

    Args:
        coefficients: A name in :data:`TABLES`, one stage that every step repeats, or a sequence of
            stages, one a step.
        steps: Number of iterations; None runs a table once from end to end (five times for a single
            stage).

    Returns:
        One stage a step.

    Raises:
        ValueError: for an unknown name, a stage of another length than 2, 3 or 5, a number that is not
            finite, or a number of steps that the table was not made for.
    """
    if isinstance(coefficients, str):
        if coefficients not in TABLES:
            raise ValueError(f"ns_coefficients={coefficients!r} is unknown; known: {', '.join(TABLES)}.")
        label, table = f"ns_coefficients={coefficients!r}", TABLES[coefficients]
    else:
        label, table = "the given ns_coefficients", _user_table(coefficients)
    if steps is None:
        steps = len(table.stages) if len(table.stages) > 1 else 5
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"ns_steps={steps!r}: give a whole number from 1 to {MAX_STEPS}.")
    available = len(table.stages)
    if steps < available and not table.prefix:
        raise ValueError(
            f"{label} has {available} stages made for one another, which ns_steps={steps} would cut: "
            f"pass ns_steps={available}."
        )
    if steps > available and table.more_steps == "error":
        raise ValueError(f"{label} has {available} stages and nothing to repeat: pass ns_steps={available}.")
    return table.stages[:steps] + (table.stages[-1],) * (steps - available)


def _user_table(coefficients: Sequence) -> CoefficientTable:
    single = bool(coefficients) and not isinstance(coefficients[0], Sequence)
    stages = tuple(tuple(float(c) for c in stage) for stage in ([coefficients] if single else coefficients))
    for stage in stages:
        if len(stage) not in (2, 3, 5) or not all(math.isfinite(c) for c in stage):
            raise ValueError(f"ns_coefficients has the stage {stage}: a stage is 2, 3 or 5 finite numbers.")
    if not stages:
        raise ValueError("ns_coefficients is empty: give at least one stage.")
    return CoefficientTable(stages, "user", "repeat_last" if single else "error", prefix=False)
