"""One training run through thirty faults: in the end it has the weights and the state of an undisturbed one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_helpers import assert_codes, assert_same_run, losses, resumed_from, said
from soak_plan import Planned, draw
from soak_ranks import attempt, told

from distmuon.pretrain.checkpoint import list_checkpoints, step_of

Tiny = Callable[..., Path]
WORLD, FAULTS, SEED = 4, 30, 2
STEPS, EVERY = 120, 2
CHANGES = {
    "train__steps": STEPS,
    "train__device_batch": 2,
    "train__eval_every": 0,
    "checkpoint__every": EVERY,
    "checkpoint__keep": 4,
    "model__num_hidden_layers": 2,
    "model__attention_dropout": 0.1,
}
FLAGS = [f"--parallel.dp_shard={WORLD}"]


@dataclasses.dataclass
class Cost:
    """What a start of the ranks and its fault cost.

    Attributes:
        planned: What was to happen.
        resumed: The step after which the ranks went on.
        reached: The last step that they did.
        seconds: From the start of the ranks to the end of the last one.
        lost: Steps that the next start has to repeat.
    """

    planned: Planned
    resumed: int
    reached: int
    seconds: float
    lost: int = 0

    def __str__(self) -> str:
        fault, damage = self.planned.fault, self.planned.damage
        before = f"{damage.kind}, then " if damage is not None else ""
        return (
            f"{self.seconds:5.1f} s  after {self.resumed:3d} to {self.reached:3d}, {self.lost} lost  "
            f"{before}{fault.kind} (rank {fault.rank})"
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_faults_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    whole = attempt([f"--config={tiny('whole', **CHANGES)}", *FLAGS], WORLD, tmp_path, timeout=180)
    assert_codes(whole, [0] * WORLD)
    path, folder = tiny("parts", **CHANGES), tmp_path / "runs" / "parts"
    costs: list[Cost] = []
    try:
        for planned in draw(SEED, FAULTS, WORLD, STEPS):
            costs.append(_play(planned, path, folder, tmp_path))
            if len(costs) > 1:
                costs[-2].lost = costs[-2].reached - costs[-1].resumed
        last = attempt([f"--config={path}", *FLAGS, "--resume=auto"], WORLD, tmp_path)
        costs[-1].lost = costs[-1].reached - resumed_from(last)
    finally:
        print(*costs, sep="\n")
    assert_codes(last, [0] * WORLD)
    assert_same_run(tmp_path / "runs" / "whole", folder, STEPS, tmp_path)


def _play(planned: Planned, path: Path, folder: Path, scratch: Path) -> Cost:
    """Damage the newest checkpoint if that is planned, start the ranks, and let one fault happen."""
    entry, fault = planned.entry, planned.fault
    reached, checkpoints = max(losses(folder), default=0), list_checkpoints(folder / "checkpoints")
    if planned.damage is not None:
        assert planned.damage.damage is not None
        planned.damage.damage(checkpoints.pop())
    began = time.monotonic()
    arguments = [f"--config={path}", *FLAGS, "--resume=auto", *entry.flags]
    ended = attempt(arguments, WORLD, scratch, [fault], timeout=90)
    seconds = time.monotonic() - began
    assert_codes(ended, [entry.victim if rank == fault.rank else entry.others for rank in range(WORLD)])
    speaker = 1 if fault.rank == 0 and entry.victim < 0 else 0
    assert entry.said in said(ended[speaker]), told(ended)
    resumed = resumed_from(ended)
    # from the newest checkpoint that is whole
    assert resumed == (step_of(checkpoints[-1]) if checkpoints else 0), told(ended)
    # at most the steps of a checkpoint that was still being written, and those since; more only if one was damaged
    assert reached - resumed <= EVERY * (2 if planned.damage is None else 3), told(ended)
    return Cost(planned, resumed, max(losses(folder), default=0), seconds)
