"""Newton-Schulz: from a matrix towards its polar factor U V^T."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distmuon.numerics.coefficients import Coefficients, Stage, resolve_stages
from distmuon.numerics.hardware import compute_dtype, cpu_cache_bytes

# On an accelerator a batch is bounded for memory only: a float32 copy and Gram matrices are held beside it
_DEVICE_BATCH_ELEMENTS = 1 << 28


def orthogonalize(
    x: Tensor,
    *,
    coefficients: Coefficients = "quintic",
    steps: int | None = None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    batched: bool = True,
    compile: bool = False,
) -> Tensor:
    r"""Approximate the polar factor ``U V^T`` of each matrix ``U S V^T`` in ``x``.

    With the default quintic the singular values of the result lie in about [0.47, 1.21] for those of
    the input down to 1e-3 of its Frobenius norm, as in torch.optim.Muon. Other coefficients come closer
    to 1 (:mod:`distmuon.numerics.coefficients`).

    Zero stays zero; a matrix that holds NaN or Inf becomes NaN. ``x`` is never written.

    Args:
        x: Real floating-point matrices of shape ``(m, n)`` or ``(..., m, n)``.
        coefficients: A name (``"quintic"``, ``"polar_express"``, ...), one stage, or one stage a step.
        steps: Number of iterations; None runs a table once, and a single stage five times.
        eps: Frobenius norms below this count as this, so smaller matrices come out proportionally
            smaller (torch.optim.Muon has 1e-7). 0 makes the result independent of the scale of ``x``.
        dtype: Dtype that ``x`` is rounded to first and that the result has; None keeps that of ``x``.
            Iterates are held in it where the device multiplies it in hardware, in float32 elsewhere
            (:func:`distmuon.numerics.hardware.compute_dtype`).
        batched: Matrices are multiplied in batches. False takes one matrix at a time through the
            operations of torch.optim.Muon in their order, so that with ``dtype=torch.bfloat16`` and the
            default quintic the result has the same bits (and its speed, and its range: norms over 1e19
            overflow).
        compile: Run the batched iteration through :func:`torch.compile`.

    Returns:
        A new tensor of the shape of ``x``.

    Raises:
        TypeError: if ``x`` is not a dense real floating-point tensor.
        ValueError: if ``x`` has fewer than two dimensions, or the coefficients do not fit the steps.
    """
    _check_input(x, batched=batched, compile=compile)
    out = x.to(dtype or x.dtype, copy=True, memory_format=torch.contiguous_format)
    return orthogonalize_(
        out, coefficients=coefficients, steps=steps, eps=eps, dtype=out.dtype, batched=batched, compile=compile
    )


def orthogonalize_(
    x: Tensor,
    *,
    coefficients: Coefficients,
    steps: int | None,
    eps: float,
    dtype: torch.dtype,
    batched: bool,
    compile: bool,
) -> Tensor:
    """Replace each matrix of ``x`` by its approximate polar factor, with a workspace of a few matrices.

    Args:
        x: Contiguous matrices ``(..., m, n)``; written. Results are rounded to its dtype.
        coefficients: See :func:`orthogonalize`, as all that follow.
        steps: Number of iterations.
        eps: Smallest Frobenius norm.
        dtype: Dtype that matrices are rounded to first.
        batched: Whether matrices are multiplied in batches.
        compile: Run the batched iteration through :func:`torch.compile`.

    Returns:
        ``x``.
    """
    stages = resolve_stages(coefficients, steps)
    if x.numel() == 0:
        return x
    matrices = x.view(-1, *x.shape[-2:])
    if not batched:
        for matrix in matrices:
            matrix.copy_(_alone(matrix.to(dtype, copy=True), stages, eps))
        return x
    iterate = _compiled_iterate() if compile else iterate_batch
    for part in matrices.split(_batch_size(matrices[0], dtype)):
        part.copy_(iterate(normalize(part.to(dtype), eps), stages))
    return x


def normalize(x: Tensor, eps: float) -> Tensor:
    """Divide each matrix by its Frobenius norm, whatever its scale.

    The largest entry is divided out first, since squares of entries past 1e19 leave float32.

    Args:
        x: ``(b, m, n)``.
        eps: Smallest norm to divide by.

    Returns:
        A new tensor of the same shape, in the dtype that iterates are held in.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    flat = wide.flatten(1)
    # the infinity norm of torch takes 20 times as long
    peak = torch.maximum(flat.amax(1), flat.amin(1).neg_())[:, None, None]
    peak = torch.where(peak == 0, torch.ones_like(peak), peak)
    wide.div_(peak)
    # A non-zero matrix now has an entry of 1, so its norm is at least 1 and the clamp is for zeros alone
    by_row = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # row by row, which takes all threads
    norm = torch.linalg.vector_norm(by_row, dim=-2, keepdim=True).clamp_(min=1.0)
    if eps > 0.0:
        norm = torch.maximum(norm, eps / peak)
    return wide.div_(norm).to(compute_dtype(x.dtype, x.device))


def iterate_batch(x: Tensor, stages: Sequence[Stage]) -> Tensor:
    """Run ``stages`` on matrices whose spectral norm is at most 1.

    Args:
        x: ``(b, m, n)``; its Gram matrix is taken on the short side, so tall ones need no transpose.
        stages: One tuple a step.

    Returns:
        ``(b, m, n)``, row-major.
    """
    tall = x.size(-2) > x.size(-1)
    for stage in stages:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        a, polynomial = _polynomial(gram, stage, torch.baddbmm)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _polynomial(gram: Tensor, stage: Stage, addmm: Callable[..., Tensor]) -> tuple[float, Tensor]:
    """Split ``P(R)`` into its constant, which later products add for free, and the rest."""
    if len(stage) == 2:
        a, b = stage
        return a, gram * b
    if len(stage) == 3:
        a, b, c = stage
        return a, addmm(gram, gram, gram, beta=b, alpha=c)
    p, u, c, d, e = stage
    nested = addmm(gram, gram, gram, beta=u)
    rest = addmm(nested, nested, nested, beta=d, alpha=c)
    return p, rest if e == 0.0 else rest.add(gram, alpha=e)


def _alone(matrix: Tensor, stages: Sequence[Stage], eps: float) -> Tensor:
    """The operations of torch.optim.Muon on one ``(m, n)`` in their order; ``matrix`` is written."""
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x.div_(x.norm().clamp(min=eps if eps > 0.0 else torch.finfo(x.dtype).tiny))
    for stage in stages:
        a, polynomial = _polynomial(x @ x.mT, stage, torch.addmm)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _batch_size(matrix: Tensor, dtype: torch.dtype) -> int:
    """How many matrices like this one are multiplied together, by its shape, dtype and device alone."""
    if matrix.device.type != "cpu":
        return max(1, _DEVICE_BATCH_ELEMENTS // matrix.numel())
    # One matrix a thread at least, and more only while each thread's share stays in its cache
    threads = torch.get_num_threads()
    matrix_bytes = matrix.numel() * compute_dtype(dtype, matrix.device).itemsize
    return threads * max(1, cpu_cache_bytes() // matrix_bytes)


@functools.cache
def _compiled_iterate() -> Callable[[Tensor, Sequence[Stage]], Tensor]:
    # dynamic: one graph for all shapes, where one a shape would run into the recompilation limit
    return torch.compile(iterate_batch, dynamic=True)


def _check_input(x: Tensor, *, batched: bool, compile: bool) -> None:
    if x.layout is not torch.strided or not x.dtype.is_floating_point or x.is_quantized:
        kind = x.layout if x.layout is not torch.strided else x.dtype
        raise TypeError(f"orthogonalize takes dense real floating-point matrices, got a tensor of {kind}.")
    if x.ndim < 2:
        raise ValueError(f"orthogonalize takes matrices, (m, n) or (..., m, n); got shape {tuple(x.shape)}.")
    if compile and not batched:
        raise ValueError("compile=True is for the batched path: drop batched=False, or compile.")
