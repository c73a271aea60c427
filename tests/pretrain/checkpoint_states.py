"""A run of a few kilobytes for tests of checkpoints, on one process or several, and what checkpoints hold."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

import distmuon
from distmuon.pretrain.checkpoint import AppState, Saver
from distmuon.pretrain.checkpoint.writer import Writer
from distmuon.pretrain.config import CheckpointConfig
from distmuon.pretrain.errors import AgreedError, UserError
from distmuon.pretrain.processes import rank


class Position:
    """A loader whose state is one number."""

    def __init__(self) -> None:
        self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "workers": None, "order": [1, 2, (3, 4)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class TinyRun:
    """A model of 7 x 5 and 5 x 7 under Muon and a vector under AdamW; sharded where there is a process group."""

    def __init__(self, seed: int = 0, adamw_names: tuple[str, ...] = ()) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5, bias=False))
        if dist.is_initialized():
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = distmuon.Muon(
            self.model.named_parameters(), lr=0.02, adjust_lr_fn="match_rms_adamw", adamw_names=adamw_names
        )
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0 / (1 + step))
        self.loader = Position()
        self.state = AppState(self.model, self.optimizer, self.scheduler, self.loader, torch.device("cpu"))

    def train(self, steps: int) -> TinyRun:
        for _ in range(steps):
            self.model(torch.randn(3, 5)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.loader.batches += 1
            step = int(self.state.progress["step"]) + 1
            self.state.progress.update(step=step, tokens=3 * step, seconds=0.5 * step)
        return self

    def values(self) -> dict[str, Any]:
        """Copies of everything that a checkpoint restores, this rank's part of it."""
        found: dict[str, Any] = dict(self.state.progress)
        found["batches"], found["rates"] = self.loader.batches, self.scheduler.get_last_lr()
        found["random"] = torch.get_rng_state()
        for name, param in self.model.named_parameters():
            found[name] = local(param)
            for key, value in self.optimizer.state[param].items():
                found[f"{name}.{key}"] = local(value) if isinstance(value, Tensor) else value
        return found

    @contextlib.contextmanager
    def saver(self, folder: Path, **settings: Any) -> Iterator[Saver]:
        config = CheckpointConfig(**settings)
        with Saver(folder, self.state, config, layout="a test") as saver:
            yield saver


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two of `TinyRun.values` are the same, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a
    )


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, by dotted name, whole tensors; read by torch's own tool."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, Path(folder) / "state.pt")
        tree = torch.load(Path(folder) / "state.pt", weights_only=False)
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            for index, inner in enumerate(value):
                walk(f"{prefix}.{index}", inner)
        else:
            flat[prefix.removeprefix(".")] = value

    walk("", tree)
    return flat


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of values of two of `saved_state` that are not the same, bit for bit; times may differ."""
    names = [name for name in {**a, **b} if not name.endswith(".seconds")]
    return [
        name
        for name in names
        if name not in a
        or name not in b
        or not (torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name])
    ]


@contextlib.contextmanager
def held_back(saver: Saver) -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    go, original = threading.Event(), Writer.write_data

    def write_data(self: Writer, *arguments: Any) -> Any:
        assert go.wait(60), "the test does not let go"
        return original(self, *arguments)

    with mock.patch.object(Writer, "write_data", write_data):
        try:
            yield go
        finally:
            go.set()
            # the patch must not end before the write
            if saver._pending is not None:
                saver._pending.future.exception(60)


def copy_of(checkpoint: Path, name: str) -> Path:
    """A copy of a ``step-N`` folder in a folder of its own, under the same name."""
    return Path(shutil.copytree(checkpoint, checkpoint.parent.parent / name / checkpoint.name))


def message_of(call: Any, *arguments: Any) -> str:
    """The sentence that a call fails with, of which all ranks know; empty if it does not fail."""
    try:
        call(*arguments)
    except UserError as error:
        assert isinstance(error, AgreedError) or not dist.is_initialized(), f"rank {rank()} keeps it for itself"
        return str(error)
    return ""
