"""Which matrices a parameter holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixSpec:
    """A parameter as a stack of equal matrices.

    Attributes:
        parameter: Its name.
        count: Number of matrices: 1, or the experts of an ``[E, m, n]`` stack.
        rows: Rows of each, the output features.
        cols: Columns of each, the input features.
    """

    parameter: str
    count: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.count * self.rows * self.cols

    @property
    def degenerate(self) -> bool:
        """Whether a matrix has a single row or column, so that its polar factor is its direction only."""
        return min(self.rows, self.cols) < 2

    def __str__(self) -> str:
        shape = f"{self.rows} x {self.cols}"
        return shape if self.count == 1 else f"{self.count} of {shape}"


def matrix_spec(parameter: str, shape: Sequence[int], *, flatten: bool) -> MatrixSpec:
    """Read a global parameter shape as matrices.

    Args:
        parameter: Its name, for messages.
        shape: The global shape: ``(m, n)``, a stack ``(E, m, n)``, or with ``flatten`` a convolution
            ``(out, in, *kernel)`` taken as ``(out, in * kernel)``.
        flatten: Join all axes after the first.

    Raises:
        ValueError: for a shape that holds no matrix, or one whose matrix axes are not known.
    """
    dims = tuple(shape)
    if len(dims) < 2:
        raise ValueError(
            f"parameter {parameter!r} has shape {dims}, which holds no matrix: put it in a group with "
            "use_muon=False (a flattened parameter of FSDP1 or ZeRO must be sharded by fully_shard instead)."
        )
    if 0 in dims:
        raise ValueError(f"parameter {parameter!r} has shape {dims}, which holds no elements: use_muon=False takes it.")
    if flatten:
        return MatrixSpec(parameter, 1, dims[0], math.prod(dims[1:]))
    if len(dims) == 2:
        return MatrixSpec(parameter, 1, *dims)
    if len(dims) == 3:
        return MatrixSpec(parameter, *dims)
    raise ValueError(
        f"parameter {parameter!r} has shape {dims}, whose matrix axes are not known: pass flatten=True in its "
        "group to take it as a convolution (out, in * kernel), or use_muon=False for AdamW."
    )
