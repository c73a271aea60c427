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


def lacks_moments(state: Mapping[str, Any], group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether a group wants second moments that the state of a parameter has not, or of another shape."""
    moments = moments_in(group, param)
    return moments is not None and (STATE_KEY not in state or tuple(state[STATE_KEY].shape) != moments.shape)


def without_stale_moments(state: Mapping[str, Any], group: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """The state of a parameter but for second moments of another variant than its group has."""
    wanted = moments_in(group, param)
    stale = STATE_KEY in state and (wanted is None or tuple(state[STATE_KEY].shape) != wanted.shape)
    return {key: value for key, value in state.items() if not (stale and key == STATE_KEY)}
