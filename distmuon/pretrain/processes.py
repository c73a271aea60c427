"""The processes of a run: their group, and small values and errors that all of them agree on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.pretrain.errors import AgreedError, RankLost, UserError
from distmuon.pretrain.meeting import launcher_store
from distmuon.pretrain.phase import lost_others, phase, short_reason

T = TypeVar("T")


def world_size() -> int:
    """Processes of this run: of the process group, else as torchrun says; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else _number("RANK", 0)


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return _number("LOCAL_RANK", rank())


@contextlib.contextmanager
def process_group(timeout_seconds: float | None = None) -> Iterator[None]:
    """The default process group for the while of a ``with`` block.

    Gloo for CPU tensors, and NCCL for CUDA ones where torch has it. A single process needs none and gets none, and
    a group that is there already is used and left alone.

    Args:
        timeout_seconds: How long a collective may wait for another rank; None: torch's defaults.

    Raises:
        UserError: If several processes were started without saying where they meet.
        RankLost: If a collective in the block fails because another rank ended or stalled.
    """
    if dist.is_initialized() or world_size() == 1:
        with phase("set-up or the end of the run"):
            yield
        return
    _meet(timeout_seconds)
    try:
        with phase("set-up or the end of the run"):
            yield
    except RankLost:
        # an orderly end would wait for the one that is lost
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meet(timeout_seconds: float | None) -> None:
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store = launcher_store()
        place: dict[str, Any] = {} if store is None else {"store": store, "rank": rank(), "world_size": world_size()}
        dist.init_process_group(backend, timeout=timeout, **place)
    except RankLost:
        raise
    except ValueError as error:  # torch's for environment variables that are missing
        reason = " ".join(str(error).split())
        raise UserError(
            f"WORLD_SIZE is {world_size()}, and the processes cannot meet ({reason}): start them with torchrun, or "
            "unset WORLD_SIZE to train with one."
        ) from error
    except RuntimeError as error:
        if not lost_others(error):
            raise
        raise RankLost(
            f"rank {rank()}: the {world_size()} processes of this run did not all meet ({short_reason(error)}): see "
            "what the others said, and start them all again."
        ) from error


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block that ends on all ranks at once: with a `UserError` on all if it raised one on any.

    The block may hold collectives only where an error on one rank makes them fail on all.

    Raises:
        AgreedError: If there are several ranks and the block raised a `UserError` on some; the message is the
            first one's.
    """
    if world_size() == 1 or not dist.is_initialized():
        yield
        return
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    messages = [message for message in gather(None if own is None else str(own)) if message is not None]
    if messages:
        raise AgreedError(messages[0]) from own


def on_first(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and give its result, or the `UserError` that it raised, to all ranks.

    Args:
        function: Its result is pickled.

    Raises:
        AgreedError: If there are several ranks and the function raised a `UserError`.
    """
    if world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    cause: UserError | None = None
    if rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            cause, box[1] = error, str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise AgreedError(box[1]) from cause
    return box[0]


def gather(value: T) -> list[T]:
    """The picklable values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_same(values: dict[str, Any]) -> None:
    """Check that all ranks run with the same values.

    Args:
        values: By the name that an error should use.

    Raises:
        AgreedError: For the first name whose value differs, with two of the values.
    """
    everyone = gather(values)
    for name, value in everyone[0].items():
        for other, found in enumerate(everyone):
            if found.get(name) != value:
                raise AgreedError(
                    f"{name} is {value} on rank 0 and {found.get(name)} on rank {other}, and all processes of a run "
                    "need the same: start them all with the same config, command line and data."
                )


def average_(tensor: Tensor) -> Tensor:
    """Replace a tensor by its mean over the ranks, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
    return tensor


def total(values: list[float]) -> list[float]:
    """Sums over the ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


def largest(value: int) -> int:
    """The largest value of any rank; does not wait for an accelerator."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))


def leave(code: int) -> int:
    """The last thing that a process does: with several processes it ends here, else the code is handed back.

    All is written and the group is left, but its threads live on and may just be letting go of a tensor. One that
    wants the interpreter's lock for it aborts the process if the interpreter is ending, so it does not end.
    """
    if world_size() == 1:
        return code
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
