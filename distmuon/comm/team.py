"""The ranks that own a matrix together, and how they talk."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.comm.group import all_gather, own_rank, prefers_all_gather, team_group
from distmuon.comm.waiting import waiting


class GroupTeam:
    """A process group as a :class:`distmuon.numerics.rows.Team`; a rank's place in it is that of its slab.

    Args:
        ranks: Global ranks, ascending.
        group: Of exactly these.
    """

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup) -> None:
        self.size = len(ranks)
        self.index = ranks.index(own_rank())
        self._group = group

    def add_up(self, tensor: Tensor) -> None:
        """Replace a contiguous ``tensor`` by its sum over the ranks; all get the same bits."""
        with waiting(self._group, "a sum of Gram matrices over a team"):
            dist.all_reduce(tensor, group=self._group)

    def put_together(self, rows: Tensor, count: int) -> Tensor:
        """The ``(count, n)`` of which every rank has ``rows``, cut as :func:`torch.chunk` does."""
        step = -(-count // self.size)
        whole = rows.new_empty(self.size * step, rows.size(1))
        part = whole[self.index * step : (self.index + 1) * step]
        part[: rows.size(0)] = rows
        part[rows.size(0) :] = 0
        with waiting(self._group, "rows of a product of a team"):
            if prefers_all_gather(self._group, rows.device):
                work = all_gather(whole.view(-1), part.clone().view(-1), self._group)
                if work is not None:
                    work.wait()
            else:
                # every rank the same to every other: gloo's all-gather takes several times as long
                others = part.expand(self.size, *part.shape).contiguous()
                dist.all_to_all_single(whole, others.view_as(whole), group=self._group)
        return whole[:count]


def form_teams(
    teams: Sequence[tuple[int, ...]], group: dist.ProcessGroup, device: torch.device
) -> Mapping[int, GroupTeam]:
    """Process groups of the teams that this rank is in, by size.

    Args:
        teams: The ranks of each, by ascending size; those of one size have no rank in common.
        group: Of all ranks of the plan, who call this together with the same teams.
        device: Where tensors of the group live.
    """
    rank = own_rank()
    found = {}
    for size, alike in itertools.groupby(teams, key=len):
        together = list(alike)
        made = team_group(together, group)
        if made is not None:
            mine = next(ranks for ranks in together if rank in ranks)
            found[size] = GroupTeam(mine, made)
            # connections are made now, at a known place, rather than inside the first step
            found[size].add_up(torch.zeros(1, device=device))
    return found
