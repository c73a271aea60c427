"""What tests of faults compare: losses by step, and weights and optimizer state of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from soak_ranks import Ended, attempt, told
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from distmuon.pretrain.metrics import read_metrics

LOSS = "loss_metrics/global_avg_loss"


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of the steps in a run folder."""
    return {record["step"]: (record[LOSS], record["grad_norm"]) for record in read_metrics(folder / "metrics.jsonl")}


def state(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """All tensors of model and optimizer in a checkpoint, by name."""
    whole = scratch / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, whole)
    app = torch.load(whole, weights_only=False)["app"]
    return {**_tensors(app["model"], "model"), **_tensors(app["optimizer"], "optimizer")}


def _tensors(tree: Any, name: str) -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    if not isinstance(tree, dict):
        return {}
    return {key: value for part, inner in tree.items() for key, value in _tensors(inner, f"{name}.{part}").items()}


def assert_same_run(one: Path, other: Path, step: int, scratch: Path) -> None:
    """Two run folders have the same losses in all steps, and the same weights and state in the end, bit for bit."""
    assert losses(one) == losses(other)
    first, second = (state(folder / "checkpoints" / f"step-{step}", scratch) for folder in (one, other))
    assert first.keys() == second.keys()
    assert any("momentum_buffer" in name for name in first)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def codes(ended: Sequence[Ended]) -> list[int]:
    return [end.code for end in ended]


def said(end: Ended) -> str:
    """What a rank wrote to standard error, without warnings of torch."""
    lines = [line for line in end.err.splitlines() if not re.match(r"\[[WE]\d+ ", line)]
    return "\n".join(lines).strip()


def resumed_from(ended: Sequence[Ended]) -> int:
    """The step after which rank 0 said that it goes on; 0 for a new run."""
    found = re.search(r"^resumed .* after step ([\d,]+)$", ended[0].out, re.MULTILINE)
    return int(found[1].replace(",", "")) if found else 0


def assert_codes(ended: Sequence[Ended], expected: Sequence[int]) -> None:
    assert codes(ended) == list(expected), told(ended)


def undisturbed(
    tiny: Callable[..., Path], folder: Path, changes: dict[str, Any], flags: Sequence[str], world: int = 2
) -> Path:
    """The run folder of a run to compare with, which is made at the first call for a folder."""
    if not (folder / "whole" / "summary.json").exists():
        ended = attempt([f"--config={tiny('whole', **changes)}", f"--log.dir={folder}", *flags], world, folder)
        assert_codes(ended, [0] * world)
    return folder / "whole"
