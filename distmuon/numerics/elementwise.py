"""Elementwise operations on lists of tensors, one by one or in torch's foreach kernels.

The one place that names torch's foreach functions: they are documented, have no public alias, and turn
hundreds of kernel launches into a few on a GPU. Their last bit can differ from that of one tensor's
operation (a bfloat16 tensor times a number does), so ``foreach=False`` keeps to the plain ones. They refuse
empty lists, which a rank that owns or stores nothing of a bucket has.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from distmuon.numerics.decay import decay_

Tensors: TypeAlias = "list[Tensor] | tuple[Tensor, ...]"


def lerp_(tensors: Tensors, ends: Tensors, weight: float) -> None:
    """``t <- t + weight * (end - t)`` in place, in foreach kernels; dtypes of the two lists agree."""
    if tensors:
        torch._foreach_lerp_(tensors, ends, weight)


def lerp(tensors: Tensors, ends: Tensors, weight: float) -> Tensors:
    """``t + weight * (end - t)`` as new tensors, in foreach kernels; dtypes of the two lists agree."""
    return torch._foreach_lerp(tensors, ends, weight) if tensors else []


def sign(tensors: Tensors) -> Tensors:
    """-1, 0 or 1 for each element as new tensors, in foreach kernels."""
    return torch._foreach_sign(tensors) if tensors else []


def copy_(targets: Tensors, sources: Tensors) -> None:
    """Copy each source into its target, cast to the target's dtype, in foreach kernels."""
    if targets:
        torch._foreach_copy_(targets, sources)


def decay_and_add_(
    tensors: Tensors, factor: float, others: Tensors, alpha: float, *, foreach: bool, cautious: bool = False
) -> None:
    """``t <- factor * t + alpha * other`` in place; ``cautious``: see :func:`distmuon.numerics.decay.decay_`."""
    if foreach and tensors:
        if cautious:
            for tensor, other in zip(tensors, others, strict=True):
                decay_(tensor, other, factor, cautious=True)
        else:
            torch._foreach_mul_(tensors, factor)
        torch._foreach_add_(tensors, others, alpha=alpha)
        return
    for tensor, other in zip(tensors, others, strict=True):
        decay_(tensor, other, factor, cautious=cautious)
        tensor.add_(other, alpha=alpha)


def add_as_torch_(tensor: Tensor, other: Tensor, alpha: float, *, tall: bool) -> None:
    """``t <- t + alpha * other`` of 16-bit tensors on a CPU, each element rounded as in a large whole matrix.

    torch's kernel takes ``alpha`` in 16 bits and rounds once in its vector loop, but twice in its scalar loop,
    which takes the last few elements of a tensor and all of one that is laid out differently from ``other``.
    torch.optim.Muon adds a transposed view where a matrix is tall, so these are rounded twice. A shard has its
    last elements elsewhere than the whole matrix, and has to round like it.
    """
    rounded = torch.tensor(alpha, dtype=tensor.dtype).item()
    if tall:
        tensor.add_(other.to(tensor.dtype) * rounded)
    else:
        tensor.copy_(tensor.float().add_(other.to(tensor.dtype).float(), alpha=rounded))
