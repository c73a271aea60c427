"""One operator in a graph: what :func:`distmuon.orthogonalize` becomes in a function that torch.compile traces.

It chooses by the machine, looks at numbers and starts threads, none of which can be traced. As an operator it leaves
the graph whole, and computes the bits that it computes outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distmuon.numerics.coefficients import Stage

# Stages in numbers: of one that is repeated there are no lengths
_SCHEMA = (
    "(Tensor x, str engine, str? name, float[] stages, int[] lengths, int? steps, float eps, ScalarType dtype, "
    "float? safety, int[]? restarts) -> Tensor"
)


def as_operator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make an operator of a function.

    Args:
        function: Of a tensor, and of engine, coefficients, steps, eps, dtype, safety and restarts by keyword.

    Returns:
        The same, for coefficients that are a name, a stage or stages.
    """

    @torch.library.custom_op("distmuon::orthogonalize", mutates_args=(), schema=_SCHEMA)
    def operator(
        x: Tensor,
        engine: str,
        name: str | None,
        stages: Sequence[float],
        lengths: Sequence[int],
        steps: int | None,
        eps: float,
        dtype: torch.dtype,
        safety: float | None,
        restarts: Sequence[int] | None,
    ) -> Tensor:
        coefficients: Any = _regrouped(stages, lengths) if name is None else name
        return function(
            x,
            engine=engine,
            coefficients=coefficients,
            steps=steps,
            eps=eps,
            dtype=dtype,
            safety=safety,
            restarts=restarts,
        )

    @operator.register_fake
    def _(x: Tensor, *args: Any) -> Tensor:
        return x.new_empty(x.shape, dtype=args[6])

    def call(
        x: Tensor,
        *,
        engine: str,
        coefficients: str | Sequence[Any],
        steps: int | None,
        eps: float,
        dtype: torch.dtype,
        safety: float | None,
        restarts: Sequence[int] | None,
    ) -> Tensor:
        name, stages, lengths = _flattened(coefficients)
        begins = None if restarts is None else list(restarts)
        result: Tensor = operator(x, engine, name, stages, lengths, steps, eps, dtype, safety, begins)
        return result

    return call


def _flattened(coefficients: str | Sequence[Any]) -> tuple[str | None, list[float], list[int]]:
    if isinstance(coefficients, str):
        return coefficients, [], []
    if all(isinstance(number, int | float) for number in coefficients):
        return None, [float(number) for number in coefficients], []
    return None, [float(n) for stage in coefficients for n in stage], [len(stage) for stage in coefficients]


def _regrouped(stages: Sequence[float], lengths: Sequence[int]) -> Stage | tuple[Stage, ...]:
    if not lengths:
        return tuple(stages)
    found, start = [], 0
    for length in lengths:
        found.append(tuple(stages[start : start + length]))
        start += length
    return tuple(found)
