"""Second moments of matrices as optimizer state: made like their parameter, so that checkpoints hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distmuon.comm.layout import laid_out_beside, local_tensor
from distmuon.numerics.variants import by_rows, has_moments
from distmuon.plan.companions import Moments
from distmuon.plan.reading import Reading

STATE_KEY = "second_momentum_buffer"


def moments_in(group: Mapping[str, Any], param: Tensor) -> Moments | None:
    """What second moments a parameter of a group has; None: none."""
    if not group["use_muon"] or not has_moments(group["variant"]):
        return None
    return Moments.of(param.shape, Reading.of(group), rows=by_rows(group["variant"]))


def moments_dtype(travels: torch.dtype) -> torch.dtype:
    """What they are kept in where ``travels`` is what ranks exchange, of which a number takes one word or two."""
    return torch.promote_types(travels, torch.float32)


def words(travels: torch.dtype) -> int:
    """How many numbers of what ranks exchange one second moment takes, bit by bit."""
    return moments_dtype(travels).itemsize // travels.itemsize


@torch.no_grad()
def blank_moments(param: Tensor, moments: Moments, dtype: torch.dtype) -> Tensor:
    """Zeros, on the mesh of the parameter and in its placements; what axes of input features shard is replicated."""
    sizes = moments.stored(local_tensor(param).shape)
    local = torch.zeros(sizes, dtype=dtype, device=param.device)
    return laid_out_beside(param, local, moments.shape, whole_axes=moments.reduced)


def has_these(state: Mapping[str, Any], moments: Moments | None) -> bool:
    """Whether the state of a parameter has the second moments that are wanted, and not those of another variant."""
    kept = state.get(STATE_KEY)
    return kept is not None and moments is not None and tuple(kept.shape) == moments.shape
