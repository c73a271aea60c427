"""Matrices that accuracy is measured on, and how near a result is to the polar factor."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Family = Callable[[int, int, torch.Generator], Tensor]


def gauss(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Independent normal entries."""
    return torch.randn(m, n, generator=generator)


def log_spaced(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Singular values from 1 to 1e-6, evenly on a logarithmic scale."""
    return _with_spectrum(m, n, torch.logspace(0, -6, min(m, n)), generator)


def low_rank(m: int, n: int, generator: torch.Generator) -> Tensor:
    """A sixteenth of the full rank."""
    rank = max(1, min(m, n) // 16)
    return torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)


def lognormal(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Normal entries, rows and columns scaled by lognormal factors."""
    rows = torch.randn(m, 1, generator=generator).exp()
    cols = torch.randn(1, n, generator=generator).exp()
    return gauss(m, n, generator) * rows * cols


def power_law(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Singular values ``k^-1.5``."""
    return _with_spectrum(m, n, torch.arange(1, min(m, n) + 1).float() ** -1.5, generator)


FAMILIES: tuple[Family, ...] = (gauss, log_spaced, low_rank, lognormal, power_law)


def ill_conditioned(
    count: int, generator: torch.Generator, *, decades: float = 30.0, stack: int = 50
) -> Iterator[Tensor]:
    """Random stacks ``(stack, m, n)`` of small matrices with conditions up to 1e12, at random scales.

    Sides are 1 to 48, small ones more often: there a few directions hold the norm, which is where rounding can leave
    the interval of a polynomial. Singular values are spread evenly over some of twelve decades, or lognormal; an eighth
    of the matrices have zeros among them, and a quarter of the stacks have lognormal rows, equal rows, rows of zeros
    (nothing else if there is one row), or one entry that is not zero.

    Args:
        count: Matrices in all; a multiple of ``stack``, else rounded up.
        generator: Of the random numbers.
        decades: Scales lie between ten to the power of minus this and ten to the power of this.
        stack: Matrices of one shape.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for _ in range(-(-count // stack)):
        m, n = (int(side) for side in 49.0 ** uniform(2))
        k = min(m, n)
        u, _ = torch.linalg.qr(normal(stack, m, k))
        v, _ = torch.linalg.qr(normal(stack, n, k))
        width = uniform(stack, 1)
        sigma = torch.where(
            uniform(stack, 1) < 0.5, 10.0 ** (-12.0 * width * uniform(stack, k)), (3.0 * width * normal(stack, k)).exp()
        )
        rank = 1 + (uniform(stack, 1) * k).long()
        sigma[(uniform(stack, 1) < 0.125) & (torch.arange(k) >= rank)] = 0.0
        x = (u * sigma[:, None]) @ v.mT
        kind = int(uniform(1) * 16)
        if kind == 0:
            x = normal(stack, m, n) * (3.0 * width[:, None] * normal(stack, m, 1)).exp()
        elif kind == 1:
            x[:, m // 2 :] = x[:, :1]
        elif kind == 2:
            x[:, m // 2 :] = 0.0
        elif kind == 3:
            x.flatten(1)[:, 1:] = 0.0
        largest = x.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
        yield (x / largest * 10.0 ** (decades * (2.0 * uniform(stack, 1, 1) - 1.0))).float()


def load_momenta(path: pathlib.Path) -> dict[str, Tensor]:
    """The matrices in a file of ``benchmarks/momenta.py`` by name, ``(m, n)``.

    Stacks are taken apart, and zero matrices, which have no polar factor, left out.

    Raises:
        ValueError: if the file is not there or holds no matrix.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"--momenta {path}: there is no such file, make one with benchmarks/momenta.py.")
    found: dict[str, Tensor] = {}
    for name, value in load_file(path).items():
        matrices = value.reshape(-1, *value.shape[-2:])
        for index, matrix in enumerate(matrices):
            if matrix.any():
                found[name if len(matrices) == 1 else f"{name}[{index}]"] = matrix
    if not found:
        raise ValueError(f"--momenta {path} holds no matrix: make one with benchmarks/momenta.py.")
    return found


def _with_spectrum(m: int, n: int, sigma: Tensor, generator: torch.Generator) -> Tensor:
    k = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return ((u * sigma.double()) @ v.T).float()


@dataclass(frozen=True)
class Closeness:
    """How a result ``y`` compares with the polar factor ``U V^T`` of ``x`` on directions with sigma >= 1e-3 ||x||_F.

    Attributes:
        error: ``||U^T y V - I||_F / sqrt(k)`` over the ``k`` directions.
        off: The off-diagonal part of the same.
        low: Smallest entry of the diagonal of ``U^T y V``.
        high: Largest.
    """

    error: float
    off: float
    low: float
    high: float


class Directions:
    """The singular directions of ``x`` that count, by SVD in float64; made once for several results."""

    def __init__(self, x: Tensor) -> None:
        u, sigma, vh = torch.linalg.svd(x.double(), full_matrices=False)
        keep = sigma >= 1e-3 * sigma.norm()
        self._left, self._right = u[:, keep].T, vh[keep].T

    def closeness(self, y: Tensor) -> Closeness:
        """Of one result, ``(m, n)`` of any dtype."""
        core = self._left @ y.double() @ self._right
        diagonal = core.diagonal()
        k = diagonal.numel()
        error = (core - torch.eye(k, dtype=core.dtype, device=core.device)).norm() / k**0.5
        off = (core - torch.diag(diagonal)).norm() / k**0.5
        return Closeness(error.item(), off.item(), diagonal.min().item(), diagonal.max().item())


def closeness(x: Tensor, y: Tensor) -> Closeness:
    """Of one result ``y`` for ``x``, both ``(m, n)``; ``x`` is not zero."""
    return Directions(x).closeness(y)
