r"""Rational functions that come near to ``R^(-1/2)``, each with its source.

With ``R = X X^T`` the polar factor is ``R^(-1/2) X``. A rational function

    f(R) = constant + linear R + sum_j weight_j (R + shift_j)^(-1)

comes as near with two inverses as fourteen matrix products do with polynomials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rational:
    """``f(R) = constant + linear R + sum_j weight_j (R + shift_j)^(-1)``, for ``R`` with eigenvalues in [0, 1].

    Attributes:
        constant: Multiplies the identity.
        linear: Multiplies ``R``.
        poles: Pairs ``(weight, shift)``; shifts are positive, so that every ``R + shift`` has a Cholesky factor.

    Raises:
        ValueError: for numbers that are not finite, no pole, or a shift that is not positive.
    """

    constant: float
    linear: float
    poles: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        numbers = (self.constant, self.linear, *(number for pole in self.poles for number in pole))
        if not self.poles or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"{self}: give finite numbers and at least one pole (weight, shift).")
        if min(shift for _, shift in self.poles) <= 0.0:
            raise ValueError(f"{self}: shifts must be positive, or R + shift may be singular.")


# so that torch.load reads optimizer state in which a group names one
torch.serialization.add_safe_globals([Rational])

# Minimax of |sigma f(sigma^2) - 1| on [1.5e-3, 1]: benchmarks/derive_coefficients.py, docs/orthogonalization.md
RATIONALS: dict[str, Rational] = {
    "rational2": Rational(
        constant=1.9963232135669902,
        linear=-1.2256117599459101,
        poles=((0.0059745136455021714, 8.6582311842375738e-6), (0.098345593878429966, 0.0029370273931384111)),
    ),
    "rational3": Rational(
        constant=1.3635822973815262,
        linear=-0.59678368837706781,
        poles=(
            (0.0031269264965527109, 3.3947109738975321e-6),
            (0.022005221344891911, 0.0002771761688083435),
            (0.17732877794505244, 0.017647884106646346),
        ),
    ),
}
