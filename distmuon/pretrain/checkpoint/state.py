"""What a checkpoint holds: names and values that do not depend on how many ranks there are."""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmuon.checkpoint import routing_table
from distmuon.pretrain.checkpoint.metadata import BrokenCheckpoint
from distmuon.pretrain.processes import agreed, gather, rank, world_size

# Beside the random numbers of a rank
_COUNTS = "block_steps"


class AppState:
    """All that a run needs to go on: model, optimizer, schedule, position and random numbers.

    Args:
        model: The model in its layout, not its DDP wrapper.
        optimizer: Its optimizer.
        scheduler: Its learning rate schedule.
        loader: The training data; anything with ``state_dict`` and ``load_state_dict``, made of plain values.
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

    def routing(self) -> dict[str, dict[str, Any]]:
        """Which algorithm updates which parameter, see `distmuon.checkpoint.routing_table`."""
        return routing_table(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The state by part, its tensors those of the run; all ranks have to call it."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "lr_scheduler": {"last_epoch": self._scheduler.last_epoch},
            # one value each, as their keys are not those of another layout
            "train_state": {
                **self.progress,
                "rng": _pack(gather({**_random_state(self._device), _COUNTS: self._counts()})),
            },
            "dataloader": _pack(self._loader.state_dict()),
        }

    def template(self, reset: Collection[str] = ()) -> dict[str, Any]:
        """What is loaded into: `state_dict` without settings of the optimizer; all ranks have to call it.

        Args:
            reset: Parameters whose optimizer state is left out.
        """
        template = self.state_dict()
        state = template["optimizer"]["state"]
        template["optimizer"] = {"state": {name: state[name] for name in state if name not in reset}}
        return template

    def load_state_dict(self, loaded: dict[str, Any], *, same_layout: bool = True) -> None:
        """Take over a `template` that was filled; learning rates and other settings stay those of the present config.

        All ranks have to call it.

        Args:
            loaded: The template.
            same_layout: Whether ranks take over random numbers, where there are as many of them. In another layout
                ranks that share a copy of the data, and need the same numbers, may be others.

        Raises:
            BrokenCheckpoint: If values are of other kinds than those that are saved.
        """
        with agreed():
            progress = {name: _number(loaded["train_state"], name) for name in self.progress}
            step = int(_number(loaded["lr_scheduler"], "last_epoch"))
            states, position = _unpack(loaded["train_state"]["rng"], list), _unpack(loaded["dataloader"], dict)
            counts = _counted(states, step)
        set_model_state_dict(self._model, loaded["model"])
        self._load_optimizer(loaded["optimizer"]["state"])
        self._count_from(counts, step)
        self._scheduler.load_state_dict(
            {**self._scheduler.state_dict(), "last_epoch": step - 1, "_step_count": step + 1}
        )
        # this step computes the learning rates of the schedule at `step`
        self._scheduler.step()
        # another layout has no random numbers to go on with, and keeps those it was seeded with
        if same_layout and len(states) == world_size():
            _set_random_state(states[rank()], self._device)
        self.progress.update(progress)
        self._loader.load_state_dict(position)

    def _counts(self) -> list[int]:
        """Steps that the groups have counted, by which MuonBP knows whole ones."""
        return [group.get("block_step", 0) for group in self._optimizer.param_groups]

    def _count_from(self, counts: list[int], step: int) -> None:
        groups = self._optimizer.param_groups
        for number, group in enumerate(groups):
            if "block_step" in group:
                group["block_step"] = counts[number] if len(counts) == len(groups) else step

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        present = get_optimizer_state_dict(self._model, self._optimizer)
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups]
        set_optimizer_state_dict(
            self._model,
            self._optimizer,
            {"state": state, "param_groups": present["param_groups"]},
            # what was reset is missing
            options=StateDictOptions(strict=False),
        )
        for group, setting in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(setting)


def _counted(states: list[Any], step: int) -> list[int]:
    """The counts of the first rank, as those of all are equal; none in checkpoints from before there were any."""
    counts = states[0].get(_COUNTS, []) if states and isinstance(states[0], dict) else []
    if type(counts) is not list or any(type(count) is not int or not 0 <= count <= step for count in counts):
        raise BrokenCheckpoint(f"groups have counted {counts!r:.40}, and these are numbers of steps up to {step}")
    return counts


def _pack(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _unpack(packed: Any, kind: type) -> Any:
    if type(packed) is not bytes:
        raise BrokenCheckpoint(f"a {type(packed).__name__} is where packed values belong")
    try:
        value = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises all kinds for bytes that are no pickle
        raise BrokenCheckpoint(
            f"packed values are not plain ones ({type(error).__name__}), and nothing of them was run"
        ) from error
    if type(value) is not kind:
        raise BrokenCheckpoint(f"a {type(value).__name__} is packed where a {kind.__name__} belongs")
    return value


def _number(values: dict[str, Any], name: str) -> float:
    value = values[name]
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise BrokenCheckpoint(f"{name} is {value!r:.40}, and it must be a number of at least 0")
    return value


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
