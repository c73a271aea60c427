"""Sums of what all ranks have, in one all-reduce."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from distmuon.comm.group import ProcessGroup
from distmuon.comm.waiting import waiting


def add_over_ranks_(values: Tensor, group: ProcessGroup, what: str) -> None:
    """Replace numbers by their sums over the ranks, of the same bits on all of them.

    Args:
        values: Contiguous, as many on every rank; where the group talks.
        group: The ranks.
        what: What they are, in the words of an error.

    Raises:
        RuntimeError: if the ranks do not come together.
    """
    with waiting(group, what):
        dist.all_reduce(values, group=group)
