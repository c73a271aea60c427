"""Gradients of DDP to owners: the reduction of a bucket in which most ranks want most sums not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_to_owners(
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch's stubs leave it out
    owners: Mapping[Tensor, int],
    group: dist.ProcessGroup,
) -> torch.futures.Future[Tensor]:
    """Average each gradient of a DDP bucket over the ranks, on its owner alone where it has one.

    Every rank sends each owner what that owns, and owners add up in the order of the ranks: an all-to-all of
    ``(p - 1) / p`` of the bucket, half of what an all-reduce moves. Gradients without an owner are
    all-reduced. On ranks that do not own them gradients become NaN, so that whoever reads them will notice.

    Args:
        bucket: What DDP hands to a communication hook.
        owners: Parameter to owning global rank, the same on every rank.
        group: The ranks of DDP.

    Returns:
        The bucket's buffer, once it is filled.
    """
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    if len(ranks) == 1:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done
    pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    common = [grad for param, grad in pairs if param not in owners]
    by_owner = {rank: [grad for param, grad in pairs if owners.get(param) == rank] for rank in ranks}
    buffer, own = bucket.buffer(), by_owner[me]
    own_numel = sum(grad.numel() for grad in own)
    splits = [0 if rank == me else sum(grad.numel() for grad in by_owner[rank]) for rank in ranks]
    send = _flat([grad for rank in ranks if rank != me for grad in by_owner[rank]], buffer)
    receive = buffer.new_empty((len(ranks) - 1) * own_numel)
    summed = _flat(common, buffer).div_(len(ranks))
    receive_splits = [0 if rank == me else own_numel for rank in ranks]
    exchanged = dist.all_to_all_single(receive, send, receive_splits, splits, group=group, async_op=True).get_future()
    reduced = dist.all_reduce(summed, group=group, async_op=True).get_future()

    def finish(_: object) -> Tensor:
        # on CUDA this makes the callback's stream wait for the first transfer, as `then` does for the second
        exchanged.wait()
        with torch.no_grad():
            _add_up(own, receive, ranks.index(me), len(ranks))
            for rank in ranks:
                if rank != me:
                    for grad in by_owner[rank]:
                        grad.fill_(torch.nan)
            start = 0
            for grad in common:
                grad.copy_(summed[start : start + grad.numel()].view_as(grad))
                start += grad.numel()
        # held until here, since the transfers read it
        send.numel()
        return buffer

    return reduced.then(finish)


def _flat(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]) if tensors else like.new_empty(0)


def _add_up(own: list[Tensor], receive: Tensor, place: int, size: int) -> None:
    """Average in the order of the ranks, so that the result does not depend on who owns."""
    others = receive.view(size - 1, -1)
    start = 0
    for grad in own:
        numel = grad.numel()
        parts = [part[start : start + numel].view_as(grad) for part in others]
        parts.insert(place, grad.clone())
        grad.copy_(parts[0])
        for part in parts[1:]:
            grad.add_(part)
        grad.div_(size)
        start += numel
