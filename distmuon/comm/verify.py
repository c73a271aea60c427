"""Whether what arrives is what was sent: checksums that travel beside the data, for debugging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.comm.exchange import Exchange, Transfer
from distmuon.comm.group import from_every_rank
from distmuon.comm.waiting import waiting
from distmuon.plan.routes import Leg

# Words that are widened to 64 bits at a time
_BLOCK = 1 << 20
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class VerifiedExchange:
    """An exchange that compares checksums; each leg waits for all ranks.

    Args:
        inner: Moves the data.
        group: Its ranks.
    """

    def __init__(self, inner: Exchange, group: dist.ProcessGroup) -> None:
        self._inner, self._group = inner, group

    def start(self, leg: Leg, send: Tensor, receive: Tensor) -> Transfer:
        """Begin to move ``send``, and the checksums of what each rank is to receive."""
        count = len(leg.receive_splits)
        if leg.gathered is None:
            splits, sums = leg.receive_splits, checksums(send, leg.send_splits)
        else:
            splits, sums = (leg.gathered,) * count, checksums(send, (leg.gathered,)).expand(count).contiguous()
        transfer = self._inner.start(leg, send, receive)
        expected = torch.empty_like(sums)
        with waiting(self._group, "checksums of an exchange"):
            dist.all_to_all_single(expected, sums, group=self._group)
        return _Verified(
            send=send, receive=receive, group=self._group, inner=transfer, expected=expected, splits=splits
        )


@dataclass(kw_only=True)
class _Verified(Transfer):
    """An exchange under way, and the checksums of what it should bring."""

    inner: Transfer
    expected: Tensor
    splits: Sequence[int]

    def wait(self, what: str | Callable[[], str]) -> None:
        """Until all has arrived, here and on all other ranks.

        Args:
            what: What is moved, for an error.

        Raises:
            RuntimeError: on all ranks, if something arrived changed on any.
        """
        assert self.group is not None
        self.inner.wait(what)
        wrong = (checksums(self.receive, self.splits) != self.expected).nonzero().flatten().tolist()
        ranks = dist.get_process_group_ranks(self.group)
        told = from_every_rank([ranks[place] for place in wrong], self.group)
        found = [f"what rank {a} sent to rank {b}" for b, sources in zip(ranks, told, strict=True) for a in sources]
        if found:
            first = ", ".join(found[:3]) + (" and more" if len(found) > 3 else "")
            raise RuntimeError(
                f"{what if isinstance(what, str) else what()}: {first} arrived changed, by the checksums of "
                "verify_exchange: look at memory and network of these ranks, and go on from a checkpoint"
            )


def checksums(buffer: Tensor, splits: Sequence[int]) -> Tensor:
    """One int64 for each piece of a 1-D buffer; a single wrong word always changes it, as weights are odd."""
    words = buffer.view(_WORDS[buffer.dtype.itemsize])
    sums = []
    for piece in words.split(list(splits)):
        total = torch.zeros((), dtype=torch.int64, device=piece.device)
        for start in range(0, piece.numel(), _BLOCK):
            block = piece[start : start + _BLOCK]
            places = torch.arange(start, start + block.numel(), device=piece.device)
            total += (block.to(torch.int64) * (2 * places + 1)).sum()
        sums.append(total)
    return torch.stack(sums)
