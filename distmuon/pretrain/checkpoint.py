"""Checkpoints: ``step-N`` folders of ``torch.distributed.checkpoint``, whole or not there."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmuon.pretrain.errors import UserError
from distmuon.pretrain.processes import agreed, gather, rank, world_size

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)")
_TEMPORARY = ".writing-"


class AppState(Stateful):
    """All that a run needs to go on: model, optimizer, schedule, position and random numbers.

    Names and values do not depend on how many ranks there are, but for the random numbers, which are those of each.

    Args:
        model: The model in its layout, not its DDP wrapper.
        optimizer: Its optimizer.
        scheduler: Its learning rate schedule.
        loader: The training data; anything with ``state_dict`` and ``load_state_dict``.
        device: The model's device.

    Attributes:
        progress: Numbers of the run by name (``step``, ``tokens``, ``seconds``), saved and restored.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, loader: Any, device: torch.device
    ) -> None:
        self.progress: dict[str, float] = {"step": 0, "tokens": 0, "seconds": 0.0}
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._loader, self._device = loader, device

    def state_dict(self) -> dict[str, Any]:
        """The state by part; called by ``dcp.save`` and, for its shapes, by ``dcp.load``."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "lr_scheduler": {"last_epoch": self._scheduler.last_epoch},
            # one value each, as their keys are not those of another layout
            "train_state": {**self.progress, "rng": pickle.dumps(gather(_random_state(self._device)))},
            "dataloader": pickle.dumps(self._loader.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; learning rates and other settings stay those of the present config."""
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups]
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        for group, setting in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(setting)
        step = state_dict["lr_scheduler"]["last_epoch"]
        self._scheduler.load_state_dict(
            {**self._scheduler.state_dict(), "last_epoch": step - 1, "_step_count": step + 1}
        )
        # this step computes the learning rates of the schedule at `step`
        self._scheduler.step()
        train_state = dict(state_dict["train_state"])
        states = pickle.loads(train_state.pop("rng"))
        # another number of ranks has no random numbers to go on with, and keeps those it was seeded with
        if len(states) == world_size():
            _set_random_state(states[rank()], self._device)
        self.progress.update(train_state)
        self._loader.load_state_dict(pickle.loads(state_dict["dataloader"]))


def save_checkpoint(folder: pathlib.Path, step: int, state: AppState, keep: int) -> pathlib.Path:
    """Write ``folder/step-N`` under a temporary name, rename it, and drop all but the newest ``keep``.

    All ranks have to call it; each writes its part, and rank 0 does the rest.

    Raises:
        UserError: On all ranks if the disk refuses it on one; older checkpoints are still there then.
    """
    final, temporary = folder / f"step-{step}", folder / f"{_TEMPORARY}step-{step}"
    with _writes(final, temporary):
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
    with _writes(final, temporary), _quiet():
        dcp_save({"app": state}, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    with _writes(final, temporary):
        if rank() == 0:
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _sync(folder)
    if rank() == 0:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: pathlib.Path, state: AppState) -> None:
    """Load a ``step-N`` folder, of this layout or another, into the run; all ranks have to call it.

    Raises:
        UserError: On all ranks, if it cannot be read or does not fit the model and optimizer.
    """
    with agreed():
        try:
            with _quiet():
                dcp_load({"app": state}, checkpoint_id=path, no_dist=not dist.is_initialized())
        except UserError:
            raise
        except (Exception, CheckpointException) as error:  # the latter is no Exception; a misfit raises plain ones
            raise UserError(
                f"the checkpoint {path} could not be loaded ({_reason(error)}): resume from an older one with "
                "--resume FOLDER, or start a new run."
            ) from error


def list_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The whole checkpoints of a folder, oldest step first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and is_whole(path)]
    return sorted(found, key=step_of)


def newest_checkpoint(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest whole checkpoint of a folder; broken newer ones are named in the log."""
    whole = list_checkpoints(folder)
    newest = whole[-1] if whole else None
    for path in sorted(folder.glob("*step-*")):
        match = _NAME.fullmatch(path.name.removeprefix(_TEMPORARY))
        if match and not (is_whole(path) and _NAME.fullmatch(path.name)):
            if newest is None or int(match[1]) > step_of(newest):
                logger.warning("skipping %s: it was not written to its end", path)
    return newest


def is_whole(path: pathlib.Path) -> bool:
    """Whether a checkpoint was written to its end: its index is there."""
    return (path / ".metadata").is_file()


def step_of(path: pathlib.Path) -> int:
    """The step of a ``step-N`` folder."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named step-N")
    return int(match[1])


def set_aside_newer(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """Rename the checkpoints past the one that a run resumes from, so that ``auto`` cannot find them."""
    moved = []
    for path in list_checkpoints(checkpoint.parent):
        if step_of(path) > step_of(checkpoint):
            aside = path.with_name(f"{path.name}.superseded")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


@contextlib.contextmanager
def _writes(final: pathlib.Path, temporary: pathlib.Path) -> Iterator[None]:
    """A part of writing a checkpoint, which fails on all ranks or on none."""
    try:
        with agreed():
            try:
                yield
            except (OSError, CheckpointException) as error:  # DCP wraps what its writers raise in the latter
                raise UserError(
                    f"the checkpoint {final} could not be written ({_reason(error)}): free space or point "
                    "log.dir at another disk, and go on from the one before with --resume."
                ) from error
    except UserError:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _reason(error: BaseException) -> str:
    """The last line of a message: DCP's begin with a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns whenever there is one process, which is on purpose here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _sync(folder: pathlib.Path) -> None:
    """Make the rename survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
