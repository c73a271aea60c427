"""Which matrices a parameter holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixSpec:
    """A parameter as a stack of equal matrices.

    Attributes:
        parameter: Its name.
        count: Number of matrices: 1, or the experts of an ``[E, m, n]`` stack.
        rows: Rows of each as stored: the output features, unless transposed.
        cols: Columns of each as stored.
        transposed: Whether rows are the input features.
    """

    parameter: str
    count: int
    rows: int
    cols: int
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.count * self.rows * self.cols

    @property
    def degenerate(self) -> bool:
        """Whether a matrix has a single row or column, so that its polar factor is its direction only."""
        return min(self.rows, self.cols) < 2

    @property
    def logical(self) -> tuple[int, int]:
        """Output and input features, which decide the learning rate."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)

    def stacked_in(self, shape: Sequence[int]) -> bool:
        """Whether the first axis of a parameter, or block of one, of this shape counts matrices."""
        return len(shape) == 3 and tuple(shape[1:]) == (self.rows, self.cols)

    @functools.cached_property
    def alike(self) -> MatrixSpec:
        """What matrices of one shape have in common, whatever parameter they are of."""
        return MatrixSpec("", 1, self.rows, self.cols, self.transposed)

    def __str__(self) -> str:
        out, into = self.logical
        shape = f"{out} x {into}"
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
