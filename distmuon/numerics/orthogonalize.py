"""From a matrix towards its polar factor U V^T: the public function, and the one that the optimizer calls."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distmuon.numerics.costs import CostTable
from distmuon.numerics.engines import gram, rational
from distmuon.numerics.engines.standard import orthogonalize_alone
from distmuon.numerics.hardware import cpu_cache_bytes
from distmuon.numerics.kernels.external import gram_newton_schulz
from distmuon.numerics.normalize import normalize
from distmuon.numerics.opaque import as_operator
from distmuon.numerics.rationals import Rational
from distmuon.numerics.recipe import EXTERNAL, NOT_COMPILED, Coefficients, Recipe, Request, choose
from distmuon.numerics.workers import spread

logger = logging.getLogger("distmuon")

# On an accelerator a batch is bounded for memory only: a float32 copy and Gram matrices are held beside it
_DEVICE_BATCH_ELEMENTS = 1 << 28


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    engine: str = "auto",
    coefficients: Coefficients = "auto",
    steps: int | None = None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    safety: float | None = None,
    restarts: Sequence[int] | None = None,
    compile: bool | str = False,
    table: CostTable | None = None,
) -> Tensor:
    r"""Approximate the polar factor ``U V^T`` of each matrix ``U S V^T`` in ``x``.

    Singular values down to 2e-3 of the Frobenius norm come out near 1, smaller ones grow 500-fold or more, and zero
    stays zero; how near is a matter of the coefficients (docs/orthogonalization.md has the table). A matrix that
    holds NaN or Inf becomes NaN. ``x`` is never written, no gradient flows through, and autocast does not act.

    The way is chosen by the shape, dtype and device of a matrix alone, so that it does not matter which others it is
    in a batch with.

    In a function that :func:`torch.compile` traces it is one operator, with or without ``fullgraph=True``, and computes
    the same bits. Only a ``table``, ``compile`` and a Rational that is no name need a break in the graph.

    Args:
        x: Real floating-point matrices of shape ``(m, n)`` or ``(..., m, n)``.
        engine: ``"auto"`` takes the fastest of the three below ``"standard"`` by ``table``, and ``"composed"`` for
            polynomials that are given. ``"standard"``: the operations of
            torch.optim.Muon in their order, one matrix at a time; with ``dtype=torch.bfloat16`` the same bits, and
            its speed and range (norms over 1e19 overflow). ``"composed"``: polynomials of degree 9 that need fewer
            products. ``"gram"``: polynomials on the small Gram matrix. ``"rational"``: Cholesky factorizations in
            float32 instead of products. ``"gram_newton_schulz"``: the package of that name, on a GPU.
        coefficients: ``"auto"`` (those of the engine), a name (``"quintic"``, ``"polar_express"``, ``"rational2"``,
            ...), one stage, one stage a step (:mod:`distmuon.numerics.coefficients`), or a
            :class:`distmuon.numerics.rationals.Rational`.
        steps: Number of polynomial stages; None runs a table once, and a single stage five times. With
            ``coefficients="auto"`` it asks for so many steps of the quintic.
        eps: Frobenius norms below this count as this, so smaller matrices come out proportionally
            smaller (torch.optim.Muon has 1e-7). 0 makes the result independent of the scale of ``x``.
        dtype: Dtype that ``x`` is rounded to first and that the result has; None keeps that of ``x``.
            Iterates are held in it where the device multiplies it in hardware and the engine suits it, in float32
            elsewhere (float16 for ``"gram"`` on a GPU).
        safety: At least 1; divides the matrix in each stage of a polynomial once more than its table does, so that
            rounding cannot leave the interval.
        restarts: Stages at which ``"gram"`` makes its Gram matrix anew, ascending from 0; None: chosen with the
            coefficients, or by dtype (:func:`distmuon.numerics.coefficients.default_restarts`).
        compile: Run batches through :func:`torch.compile`; a string is its mode, ``"reduce-overhead"`` for CUDA graphs.
            Where it fails there is a warning, and batches run as they are.
        table: Speed of the engines, from ``distmuon calibrate``; None: the built-in one of the device.

    Returns:
        A new tensor of the shape of ``x``, row-major.

    Raises:
        TypeError: if ``x`` is not a dense real floating-point tensor.
        ValueError: if ``x`` has fewer than two dimensions, or engine, coefficients, steps and restarts do not go
            together.
        ImportError: if the package of the engine is not installed.
    """
    _check_input(x)
    dtype = dtype or x.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype}: the result takes a floating-point dtype.")
    asked: dict[str, Any] = {
        "engine": engine,
        "steps": steps,
        "eps": eps,
        "dtype": dtype,
        "safety": safety,
        "restarts": restarts,
    }
    if torch.compiler.is_compiling():
        if table is None and not compile and not isinstance(coefficients, Rational):
            return _operator(x, coefficients=coefficients, **asked)
        # one break in the graph here, rather than many further down
        run = torch.compiler.disable(_orthogonalize)
        return run(x, coefficients=coefficients, compile=compile, table=table, **asked)
    return _orthogonalize(x, coefficients=coefficients, compile=compile, table=table, **asked)


def _orthogonalize(
    x: Tensor,
    *,
    engine: str,
    coefficients: Coefficients,
    steps: int | None,
    eps: float,
    dtype: torch.dtype,
    safety: float | None,
    restarts: Sequence[int] | None,
    compile: bool | str = False,
    table: CostTable | None = None,
) -> Tensor:
    """:func:`orthogonalize` where nothing is traced."""
    begins = None if restarts is None else tuple(restarts)
    request = Request(dtype, engine, coefficients, steps, safety, begins, compile)
    recipe = choose(x.size(-2), x.size(-1), x.device, request, table)
    if compile and recipe.engine in NOT_COMPILED:
        raise ValueError(f"compile=True is for batches of products, and engine={engine!r} has none: drop one.")
    out = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return orthogonalize_(out, recipe, eps=eps, dtype=dtype, compile=compile)


_operator = as_operator(_orthogonalize)


@torch.no_grad()
def orthogonalize_(x: Tensor, recipe: Recipe, *, eps: float, dtype: torch.dtype, compile: bool | str = False) -> Tensor:
    """Replace each matrix of ``x`` by its approximate polar factor, with a workspace of a few matrices.

    Args:
        x: Contiguous matrices ``(..., m, n)``; written. Results are rounded to its dtype.
        recipe: How.
        eps: Smallest Frobenius norm.
        dtype: Dtype that matrices are rounded to first.
        compile: See :func:`orthogonalize`.

    Returns:
        ``x``.
    """
    if x.numel() == 0:
        return x
    # products keep their precision wherever this is called from
    with torch.autocast(x.device.type, enabled=False):
        _run(x.view(-1, *x.shape[-2:]), recipe, eps, dtype, compile)
    return x


def _run(matrices: Tensor, recipe: Recipe, eps: float, dtype: torch.dtype, compile: bool | str) -> None:
    def alone(matrix: Tensor) -> None:
        if recipe.engine == "standard":
            matrix.copy_(orthogonalize_alone(matrix.to(dtype, copy=True), _stages(recipe), eps))
        else:
            normal = normalize(matrix[None].to(dtype), eps)[0]
            matrix.copy_(iterate(normal.to(recipe.dtype), recipe))

    if recipe.batched:
        run = _compiled(compile) if compile else iterate
        for part in matrices.split(_batch_size(matrices[0], recipe.dtype)):
            part.copy_(run(normalize(part.to(dtype), eps).to(recipe.dtype), recipe))
    elif recipe.one_thread:
        spread(alone, matrices.unbind())
    else:
        for matrix in matrices:
            alone(matrix)


def iterate(x: Tensor, recipe: Recipe) -> Tensor:
    """Run a recipe on matrices whose Frobenius norm is at most 1.

    Args:
        x: ``(m, n)``, or ``(b, m, n)`` if the recipe is batched, in its dtype.
        recipe: Of an engine other than ``"standard"``.

    Returns:
        A new tensor of the same shape, row-major.
    """
    if recipe.engine == EXTERNAL:
        return gram_newton_schulz(x, _stages(recipe), restarts=recipe.restarts[1:])
    if isinstance(recipe.formula, Rational):
        return rational.run(x, recipe.formula, recipe.products)
    return gram.run(x, recipe.formula, recipe.restarts, recipe.products)


def _stages(recipe: Recipe) -> tuple[tuple[float, ...], ...]:
    assert not isinstance(recipe.formula, Rational)
    return recipe.formula


def _batch_size(matrix: Tensor, held: torch.dtype) -> int:
    """How many matrices like this one are multiplied together; results do not depend on it."""
    if matrix.device.type != "cpu":
        return max(1, _DEVICE_BATCH_ELEMENTS // matrix.numel())
    # One matrix a thread at least, and more only while each thread's share stays in its cache
    return torch.get_num_threads() * max(1, cpu_cache_bytes() // (matrix.numel() * held.itemsize))


@functools.cache
def _compiled(mode: bool | str) -> Callable[[Tensor, Recipe], Tensor]:
    # dynamic: one graph for all shapes, where one a shape would run into the recompilation limit
    compiled = torch.compile(iterate, dynamic=True, mode=mode if isinstance(mode, str) else None)
    works = True

    def run(x: Tensor, recipe: Recipe) -> Tensor:
        nonlocal works
        if works:
            try:
                return compiled(x, recipe)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                works = False
                logger.warning("compile=%r is switched off, as torch.compile failed: %s", mode, error)
        return iterate(x, recipe)

    return run


def _check_input(x: Tensor) -> None:
    if x.layout is not torch.strided or not x.dtype.is_floating_point or x.is_quantized:
        kind = x.layout if x.layout is not torch.strided else x.dtype
        raise TypeError(f"orthogonalize takes dense real floating-point matrices, got a tensor of {kind}.")
    if x.ndim < 2:
        raise ValueError(f"orthogonalize takes matrices, (m, n) or (..., m, n); got shape {tuple(x.shape)}.")
