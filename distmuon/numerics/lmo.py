"""Steps of unit size in a norm, for what is no hidden matrix: the linear minimization oracles of Scion.

Formulas are those of Pethick et al., arXiv 2502.07529, tables 2 and 3, with the factors of
https://github.com/LIONS-EPFL/scion/blob/main/scion.py. ``W`` is ``(m, n)``, output x input features, ``D`` the momentum
average, and a step is ``W <- (1 - lr * weight_decay) * W - lr * U`` with

==========  ==============================  ===================================================================
name        U                               for
==========  ==============================  ===================================================================
sign        ``sign(D) / n``                 output heads, and embeddings that share their weight with one
col_norm    ``sqrt(m) * D[:, j] / |D[:, j]|``  embeddings: one-hot inputs, of which a column is one's vector
row_norm    ``D[i, :] / (sqrt(n) |D[i, :]|)``  heads in another norm, and matrices of a single row
bias_rms    ``D / rms(D)``                  biases, gains of norms: each vector by itself
==========  ==============================  ===================================================================

``eps`` is added to what is divided by, so that zero stays zero. A parameter that is stored as ``(in, out)``, as that of
torch.nn.Embedding is with a row for each token, has ``transposed=True``, as Scion's ``transpose=True``; with
``flatten=True`` all axes after the first are inputs; axes before the last two count matrices, or vectors before the
last one. The sign of a vector or scalar is not divided: it scales features one by one, each of which is an input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LMOS = ("sign", "col_norm", "row_norm", "bias_rms")


def resolve_lmo(name: str | None) -> str | None:
    """The name of an oracle; None is AdamW.

    Raises:
        ValueError: for one that is not in :data:`LMOS`.
    """
    if name is not None and name not in LMOS:
        raise ValueError(f"lmo={name!r} is unknown; known: {', '.join(LMOS)}, or None for AdamW.")
    return name


def norm_axes(name: str, ndim: int, *, flatten: bool = False, transposed: bool = False) -> tuple[int, ...]:
    """The axes that the norm of an oracle runs over; none for ``sign``, and for a scalar.

    Raises:
        ValueError: for an oracle of matrices and fewer than two axes, in words that a caller begins with whose they
            are.
    """
    if name == "sign":
        return ()
    if name == "bias_rms":
        return (ndim - 1,) if ndim else ()
    if ndim < 2:
        raise ValueError(f"has {ndim} axes, and lmo={name!r} is of matrices: take 'bias_rms' or 'sign'.")
    outputs, inputs = _sides(ndim, flatten=flatten, transposed=transposed)
    return outputs if name == "col_norm" else inputs


def squares_along(average: Tensor, axes: Sequence[int]) -> Tensor:
    """Sums of squares of what is stored here, to be added up where an axis is cut.

    Args:
        average: The momentum average, or a part of it that may be empty.
        axes: See :func:`norm_axes`.

    Returns:
        Of length 1 on ``axes``. float64, so that sums in another order round alike in float32; float32 on accelerators
        that lack it.
    """
    dtype = wide_dtype(average.device)
    if not axes:
        return average.to(dtype).square()
    return torch.linalg.vector_norm(average, dim=tuple(axes), keepdim=True, dtype=dtype).square_()


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums of squares are kept in."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def unit_step(
    name: str,
    average: Tensor,
    squares: Tensor | None,
    shape: Sequence[int],
    *,
    flatten: bool,
    transposed: bool,
    eps: float,
) -> Tensor:
    """What is subtracted from the weights, times ``lr``.

    Args:
        name: Of :data:`LMOS`.
        average: The momentum average, or a part of it.
        squares: See :func:`squares_along`, of the whole axes; None for ``sign``.
        shape: Of the whole parameter.
        flatten: All axes after the first are inputs.
        transposed: Stored as ``(in, out)``.
        eps: Added to what is divided by.

    Returns:
        A new tensor like ``average``, float32 or wider.
    """
    wide = torch.promote_types(average.dtype, torch.float32)
    if name == "sign":
        inputs = _sides(len(shape), flatten=flatten, transposed=transposed)[1] if len(shape) > 1 else ()
        return average.sign().to(wide).div_(math.prod(shape[axis] for axis in inputs))
    assert squares is not None
    length = math.prod(shape[axis] for axis in norm_axes(name, len(shape), flatten=flatten, transposed=transposed))
    norms = (squares * length if name == "row_norm" else squares / max(length, 1)).sqrt_().add_(eps)
    return average.to(wide) / norms.to(wide)


def _sides(ndim: int, *, flatten: bool, transposed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of output and of input features."""
    if flatten:
        return (0,), tuple(range(1, ndim))
    sides = (ndim - 2,), (ndim - 1,)
    return sides[::-1] if transposed else sides
