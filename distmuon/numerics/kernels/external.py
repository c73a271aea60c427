"""The package gram-newton-schulz as an engine: Gram Newton-Schulz in float16 with CuTeDSL kernels.

Source: https://github.com/Dao-AILab/gram-newton-schulz (MIT), by Zhang, Amsel, Chen and Dao; it brings quack-kernels,
whose ``gemm_symmetric`` does what ``symmetric`` does here. Its page asks for a Hopper or Blackwell GPU and CUDA 12.9.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_PACKAGE = "gram_newton_schulz"
Stages = tuple[tuple[float, ...], ...]


def installed() -> bool:
    """Whether `gram_newton_schulz` can use its kernels: gram-newton-schulz and quack-kernels are there."""
    return all(importlib.util.find_spec(name) is not None for name in (_PACKAGE, "quack"))


def gram_newton_schulz(
    x: Tensor,
    coefficients: Sequence[Sequence[float]] | None = None,
    *,
    restarts: Sequence[int] = (2,),
    eps: float = 1e-7,
) -> Tensor:
    """Orthogonalizes with the package's ``GramNewtonSchulz``.

    The package normalizes each matrix by its Frobenius norm in float32, iterates in float16, and uses its kernels
    on a GPU where the short side has 256 or more; it iterates on X itself where X is square.

    Args:
        x: (..., m, n) of a floating dtype; not written to.
        coefficients: three numbers (a, b, c) a stage, for a X + b (X X^T) X + c (X X^T)^2 X; by default the
            package's table, Polar Express divided by a safety factor of 1.05.
        restarts: before which stages, counted from 0, Q X replaces X.
        eps: added to the norm.

    Returns:
        A new tensor of ``x``'s shape and dtype.

    Raises:
        ImportError: gram-newton-schulz, or quack-kernels for a tensor on a GPU, is not installed.
        ValueError: ``x`` has no rows and columns, or a stage has other than three numbers.
    """
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass matrices (..., m, n).")
    stages = None if coefficients is None else tuple(tuple(map(float, stage)) for stage in coefficients)
    if stages is not None and not (stages and all(len(stage) == 3 for stage in stages)):
        raise ValueError(f"coefficients is {coefficients}: gram-newton-schulz takes three numbers a stage.")
    if x.numel() == 0:
        return x.clone()
    engine = _engine(stages, tuple(restarts), eps, x.is_cuda)
    # versions before 0.1.6 divide a float32 argument by its norm in place
    matrices = x.reshape(-1, *x.shape[-2:]).clone() if x.dtype is torch.float32 else x.reshape(-1, *x.shape[-2:])
    return engine(matrices).reshape(x.shape)


@functools.cache
def _engine(stages: Stages | None, restarts: tuple[int, ...], eps: float, kernels: bool) -> Callable[[Tensor], Tensor]:
    try:
        package = importlib.import_module(_PACKAGE)
        # the package would compile for each shape and keep its results in a CUDA graph's memory
        return package.GramNewtonSchulz(
            ns_epsilon=eps,
            ns_use_kernels=kernels,
            ns_coefficients=None if stages is None else [list(stage) for stage in stages],
            gram_newton_schulz_reset_iterations=list(restarts),
            compile_kwargs=None,
        )
    except ImportError as error:
        raise ImportError(
            f"the package gram-newton-schulz cannot be used ({error}): install it with `pip install "
            "gram-newton-schulz --no-build-isolation`, or choose another engine."
        ) from error
