"""A rank that ends or stalls: what the others say, and that a restart loses only steps after the last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_helpers import assert_codes, assert_same_run, resumed_from, said, undisturbed
from fault_runs import Fault
from soak_ranks import attempt

Tiny = Callable[..., Path]
STEPS, EVERY, AT = 8, 3, 5
CHANGES = {
    "train__steps": STEPS,
    "train__device_batch": 2,
    "train__eval_every": AT,
    "checkpoint__every": EVERY,
    "checkpoint__async_save": False,
    "model__num_hidden_layers": 2,
}
FLAGS = ["--parallel.dp_shard=2"]
LOST = 69


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the undisturbed run is, once a test has made it."""
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize(
    ("kind", "victim", "where"),
    [
        ("killed in the backward pass", 1, f"in the forward and backward pass of step {AT}"),
        ("killed in the gather of matrices", 0, f"in the optimizer step of step {AT}"),
        ("killed in Newton-Schulz", 1, f"in the optimizer step of step {AT}"),
        ("killed in a checkpoint write", 0, "in the checkpoint of step 6"),
        ("killed in a checkpoint write", 1, "in the checkpoint of step 6"),
        ("killed in a validation", 0, f"in the validation of step {AT}"),
    ],
)
def test_a_killed_rank_ends_the_other_and_a_restart_goes_on(
    tiny: Tiny, tmp_path: Path, folder: Path, kind: str, victim: int, where: str
) -> None:
    path = tiny("parts", **CHANGES)
    ended = attempt([f"--config={path}", *FLAGS], 2, tmp_path, [Fault(kind, victim, AT)])
    assert ended[victim].code == -9
    other = ended[1 - victim]
    assert other.code == LOST
    assert said(other).startswith(f"error: rank {1 - victim}: in the ")
    assert where in said(other)
    assert "another rank has probably ended or stalled" in said(other)
    assert f"nothing is heard of rank {victim}" in said(other)
    assert said(other).endswith("go on from the last checkpoint with --resume auto.")
    assert len(said(other).splitlines()) == 1
    again = attempt([f"--config={path}", *FLAGS, "--resume=auto"], 2, tmp_path)
    assert_codes(again, [0, 0])
    assert resumed_from(again) == EVERY
    assert_same_run(undisturbed(tiny, folder, CHANGES, FLAGS), tmp_path / "runs" / "parts", STEPS, tmp_path)


def test_a_rank_killed_while_a_thread_writes_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    """The others take further steps meanwhile; the checkpoint before is still there."""
    flags = [f"--config={tiny(**CHANGES)}", *FLAGS, "--checkpoint.async_save=true"]
    ended = attempt(flags, 2, tmp_path, [Fault("killed in a checkpoint write", 1, 2 * EVERY)])
    assert_codes(ended, [LOST, -9])
    assert "another rank has probably ended or stalled" in said(ended[0])
    again = attempt([*flags, "--resume=auto"], 2, tmp_path)
    assert_codes(again, [0, 0])
    assert resumed_from(again) == EVERY


def test_a_rank_killed_in_the_set_up(tiny: Tiny, tmp_path: Path) -> None:
    ended = attempt([f"--config={tiny(**CHANGES)}", *FLAGS], 2, tmp_path, [Fault("killed in the set-up", 1)])
    assert_codes(ended, [LOST, -9])
    assert said(ended[0]).startswith("error: rank 0: in the set-up or the end of the run another rank has probably")


def test_a_stopped_rank_ends_all_after_the_time_out(tiny: Tiny, tmp_path: Path) -> None:
    """The stopped one too, when it wakes up; test_soak has one that sleeps."""
    flags = [*FLAGS, "--parallel.timeout_seconds=6"]
    fault = Fault("stopped in the optimizer step", 1, AT)
    ended = attempt([f"--config={tiny(**CHANGES)}", *flags], 2, tmp_path, [fault], wakes=1)
    assert_codes(ended, [LOST, LOST])
    for rank, end in enumerate(ended):
        assert said(end).startswith(f"error: rank {rank}: in the ")
        assert f"of step {AT} another rank has probably ended or stalled" in said(end)
        assert len(said(end).splitlines()) == 1
    assert "Timed out waiting 6000ms" in said(ended[0])


def test_a_stall_in_a_group_of_some_ranks_ends_all(tiny: Tiny, tmp_path: Path) -> None:
    flags = ["--parallel.dp_replicate=2", "--parallel.dp_shard=2", "--parallel.timeout_seconds=6"]
    fault = Fault("stalled in the forward pass", 3, AT, seconds=12.0)
    ended = attempt([f"--config={tiny(**CHANGES)}", *flags], 4, tmp_path, [fault])
    assert_codes(ended, [LOST] * 4)


def test_debug_shows_the_traceback(tiny: Tiny, tmp_path: Path) -> None:
    flags = [f"--config={tiny(**CHANGES)}", *FLAGS, "--debug"]
    ended = attempt(flags, 2, tmp_path, [Fault("killed in Newton-Schulz", 1, 2)])
    assert ended[0].code == LOST
    assert "Traceback (most recent call last)" in said(ended[0])
