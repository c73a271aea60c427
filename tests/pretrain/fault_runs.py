"""Faults that tests play into ranks of a training run, and the program that torchrun starts to play them.

`python fault_runs.py ARGUMENTS` is `python -m distmuon.pretrain ARGUMENTS` with the faults of the environment variable
FAULTS, a JSON list of `Fault`s. A new kind of fault is one function with `@kind(...)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from distmuon.comm.exchange import GroupExchange, Transfer
from distmuon.pretrain import loop
from distmuon.pretrain.command import run_command
from distmuon.pretrain.processes import leave

WRITES = "torch.distributed.checkpoint.filesystem.FileSystem.create_stream"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens, on which rank, and when.

    Attributes:
        kind: A name of `KINDS`.
        rank: Where; None: on every rank.
        step: In the first step, or at the first checkpoint or validation, that is not before this one.
        attempt: In which start of the processes by torchrun.
        seconds: How long a stall is.
    """

    kind: str
    rank: int | None = 0
    step: int = 0
    attempt: int = 0
    seconds: float = 0.0


Player = Callable[[Fault], contextlib.AbstractContextManager[Any]]
KINDS: dict[str, Player] = {}


def kind(name: str) -> Callable[[Callable[[Fault], Iterator[None]]], Player]:
    def register(function: Callable[[Fault], Iterator[None]]) -> Player:
        KINDS[name] = contextlib.contextmanager(function)
        return KINDS[name]

    return register


class _Clock:
    """The step that this process is in."""

    step = 0


def _send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def _kill() -> None:
    _send(signal.SIGKILL)
    time.sleep(60)


@contextlib.contextmanager
def _instead(target: str, act: Callable[..., Any], fault: Fault, *, before: bool = True) -> Iterator[None]:
    """Call `act` before or after the first call of a function from the fault's step on; it gets the same arguments."""
    module, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(module)
    original, played = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        due = not played and _Clock.step >= fault.step
        if due:
            played.append(True)
        if due and before:
            act(*args, **kwargs)
        result = original(*args, **kwargs)
        if due and not before:
            act(*args, **kwargs)
        return result

    with mock.patch.object(owner, name, call):
        yield


@kind("killed in the backward pass")
def _(fault: Fault) -> Iterator[None]:
    def arm(model: torch.nn.Module, *_: Any) -> None:
        # of the last block: its gradients have been reduced, those of the others have not
        names = [name for name, _ in model.named_parameters() if "layers" in name]
        last = dict(model.named_parameters())[names[-1]]
        last.register_post_accumulate_grad_hook(lambda param: _kill())

    with _instead("distmuon.pretrain.loop.language_model_loss", arm, fault):
        yield


@kind("killed in the gather of matrices")
def _(fault: Fault) -> Iterator[None]:
    with _instead("distmuon.comm.exchange.GroupExchange.start", lambda *_: _kill(), fault, before=False):
        yield


@kind("killed in Newton-Schulz")
def _(fault: Fault) -> Iterator[None]:
    with _instead("distmuon.orthogonalizing.orthogonalize_", lambda *_, **__: _kill(), fault):
        yield


@kind("killed in a checkpoint write")
def _(fault: Fault) -> Iterator[None]:
    def half(self: Any, path: Any, mode: str, *_: Any) -> None:
        with open(path, "wb") as stream:
            stream.write(b"half of it")
        _kill()

    with _instead(WRITES, half, fault):
        yield


@kind("killed in the set-up")
def _(fault: Fault) -> Iterator[None]:
    with _instead("distmuon.pretrain.run.build_model", lambda *_, **__: _kill(), fault):
        yield


@kind("killed in a validation")
def _(fault: Fault) -> Iterator[None]:
    with _instead("distmuon.pretrain.evaluate.language_model_loss", lambda *_: _kill(), fault):
        yield


@kind("disk full in a checkpoint write")
def _(fault: Fault) -> Iterator[None]:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with _instead(WRITES, full, fault):
        yield


@kind("stalled in the forward pass")
def _(fault: Fault) -> Iterator[None]:
    with _instead("distmuon.pretrain.loop.language_model_loss", lambda *_: time.sleep(fault.seconds), fault):
        yield


@kind("stopped in the optimizer step")
def _(fault: Fault) -> Iterator[None]:
    with _instead("distmuon.pretrain.loop.Loop._update", lambda *_, **__: _send(signal.SIGSTOP), fault):
        yield


@kind("NaN in a gradient")
def _(fault: Fault) -> Iterator[None]:
    def stain(parameters: list[torch.Tensor]) -> None:
        grads = [param.grad for param in parameters if param.grad is not None]
        for grad in grads:
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            if local.numel():
                local.view(-1)[-1] = float("nan")
                return

    with _instead("distmuon.pretrain.loop.settle_gradients", stain, fault, before=False):
        yield


class _Flips(Transfer):
    """A transfer after which one bit of what arrived is another one."""

    def wait(self, *args: Any) -> None:
        super().wait(*args)
        if self.receive.numel():
            self.receive.view(torch.uint8)[0] ^= 1


@kind("bit flipped on the wire")
def _(fault: Fault) -> Iterator[None]:
    original, played = GroupExchange.start, []

    def start(*args: Any) -> Transfer:
        transfer = original(*args)
        if played or _Clock.step < fault.step or not transfer.receive.numel():
            return transfer
        played.append(True)
        return _Flips(**vars(transfer))

    with mock.patch.object(GroupExchange, "start", start):
        yield


def _signalled(where: str, signum: int, target: str) -> None:
    @kind(f"{signal.Signals(signum).name} in {where}")
    def _(fault: Fault) -> Iterator[None]:
        with _instead(target, lambda *_, **__: _send(signum), fault):
            yield


for _signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    _signalled("a step", _signum, "distmuon.pretrain.loop.Loop._forward_backward")
    _signalled("a validation", _signum, "distmuon.pretrain.evaluate.language_model_loss")
    _signalled("a checkpoint write", _signum, WRITES)
    _signalled("the set-up", _signum, "distmuon.pretrain.run.build_model")
    _signalled("the report", _signum, "distmuon.pretrain.run._report")


@kind("SIGINT twice")
def _(fault: Fault) -> Iterator[None]:
    """Ctrl-C, and again when nothing happens."""

    def press(*_: Any, **__: Any) -> None:
        threading.Thread(target=_later, args=([0.5, 1.5], signal.SIGINT), daemon=True).start()

    with _instead("distmuon.pretrain.loop.Loop._update", press, fault):
        yield


@kind("SIGTERM a second after the start")
def _(fault: Fault) -> Iterator[None]:
    threading.Thread(target=_later, args=([1.0], signal.SIGTERM), daemon=True).start()
    yield


@kind("stopped before it meets the others")
def _(fault: Fault) -> Iterator[None]:
    _send(signal.SIGSTOP)
    yield


def _later(pauses: list[float], signum: int) -> None:
    for pause in pauses:
        time.sleep(pause)
        _send(signum)


@contextlib.contextmanager
def playing(faults: list[Fault]) -> Iterator[None]:
    """Run a block of one rank with the faults that are meant for it."""
    rank, attempt = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    original_step = loop.Loop._step

    def step(self: loop.Loop, number: int) -> None:
        _Clock.step = number
        original_step(self, number)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop.Loop, "_step", step))
        for fault in faults:
            if fault.rank in (None, rank) and fault.attempt == attempt:
                stack.enter_context(KINDS[fault.kind](fault))
        yield


def main() -> int:
    faults = [Fault(**fields) for fields in json.loads(os.environ.get("FAULTS", "[]"))]
    with playing(faults):
        return run_command(sys.argv[1:], prog="python -m distmuon.pretrain")


if __name__ == "__main__":
    sys.exit(leave(main()))
