"""A signal on one rank: what all of them do, and the codes with which they end."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_helpers import assert_codes, assert_same_run, resumed_from, said, undisturbed
from fault_runs import Fault
from soak_ranks import attempt

Tiny = Callable[..., Path]
STEPS = 8
CHANGES = {
    "train__steps": STEPS,
    "train__device_batch": 4,
    "train__eval_every": 4,
    "checkpoint__every": 3,
    "model__num_hidden_layers": 2,
    "optim__ns_dtype": "float32",
}
FLAGS = ["--parallel.dp_shard=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the undisturbed run is, once a test has made it."""
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize(
    ("kind", "rank", "code", "step"),
    [
        ("SIGTERM in a step", 1, 75, 4),
        ("SIGUSR1 in a validation", 1, 75, 4),
        # step 3 saves; whether it is seen at once or a step later depends on the thread that writes
        ("SIGUSR1 in a checkpoint write", 0, 75, None),
        ("SIGINT in a step", 1, 130, 4),
    ],
)
def test_a_signal_on_one_rank_saves_on_all(
    tiny: Tiny, tmp_path: Path, whole: Path, kind: str, rank: int, code: int, step: int | None
) -> None:
    path = tiny("parts", **CHANGES)
    folder = tmp_path / "runs" / "parts"
    ended = attempt([f"--config={path}", *FLAGS], 2, tmp_path, [Fault(kind, rank, step or 1)])
    assert_codes(ended, [code, code])
    assert said(ended[1]) == ""
    name = kind.split()[0]
    note = json.loads((folder / "interrupted.json").read_text(encoding="utf-8"))
    assert note["signal"] == name
    assert note["step"] == step or step is None
    assert f"stopped by {name} after step {note['step']}; saved as {note['checkpoint']}" in said(ended[0])
    assert note["checkpoint"] == str(folder / "checkpoints" / f"step-{note['step']}")
    assert said(ended[0]).splitlines()[-1] == f"resume: {note['resume']}"
    assert shlex.split(note["resume"])[-2:] == ["--resume", str(folder)]
    again = attempt([f"--config={path}", *FLAGS, "--resume=auto"], 2, tmp_path)
    assert_codes(again, [0, 0])
    assert resumed_from(again) == note["step"]
    assert not (folder / "interrupted.json").exists()
    assert_same_run(undisturbed(tiny, whole, CHANGES, FLAGS), folder, STEPS, tmp_path)


def test_a_signal_with_nothing_saved(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(**{**CHANGES, "checkpoint__every": 0})
    ended = attempt([f"--config={path}", *FLAGS], 2, tmp_path, [Fault("SIGUSR1 in a step", 0, 2)])
    assert_codes(ended, [128 + signal.SIGUSR1] * 2)
    assert "stopped by SIGUSR1 after step 2; nothing is saved" in said(ended[0])
    assert not (tmp_path / "runs" / "tiny" / "interrupted.json").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_in_the_set_up_ends_at_once(tiny: Tiny, tmp_path: Path, name: str) -> None:
    ended = attempt(
        [f"--config={tiny(**CHANGES)}", *FLAGS], 2, tmp_path, [Fault(f"{name} in the set-up", None)], timeout=40
    )
    assert_codes(ended, [128 + getattr(signal, name)] * 2)
    for rank, end in enumerate(ended):
        assert said(end) == f"rank {rank}: stopped by {name} before the first step; nothing new is saved"


def test_a_signal_while_others_do_not_come_ends_at_once(tiny: Tiny, tmp_path: Path) -> None:
    """A rank that waits inside of torch for another one, where Python calls no handlers."""
    faults = [Fault("stopped before it meets the others", 1), Fault("SIGTERM a second after the start", 0)]
    ended = attempt([f"--config={tiny(**CHANGES)}", *FLAGS], 2, tmp_path, faults, timeout=40, gone=1)
    assert ended[0].code == 128 + signal.SIGTERM
    assert said(ended[0]) == "rank 0: stopped by SIGTERM before the first step; nothing new is saved"


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_a_stopped_one(tiny: Tiny, tmp_path: Path) -> None:
    faults = [Fault("stopped in the optimizer step", 1, 5), Fault("SIGINT twice", 0, 5)]
    ended = attempt([f"--config={tiny(**CHANGES)}", *FLAGS], 2, tmp_path, faults, timeout=40, gone=1)
    assert ended[0].code == 130
    assert said(ended[0]) == "rank 0: stopped by SIGINT a second time, in the middle of a step; nothing new is saved"


def test_a_signal_sent_twice_is_one(tiny: Tiny, tmp_path: Path) -> None:
    """A launcher passes on what a batch system has sent to all processes already."""
    faults = [Fault("SIGTERM in a step", 0, 4), Fault("SIGINT in a step", 1, 4), Fault("SIGINT in a step", 1, 4)]
    ended = attempt([f"--config={tiny(**CHANGES)}", *FLAGS], 2, tmp_path, faults)
    assert_codes(ended, [75, 75])
    assert "after step 4; saved" in said(ended[0])


def test_a_signal_in_the_report_lets_it_end(tiny: Tiny, tmp_path: Path) -> None:
    ended = attempt([f"--config={tiny(**CHANGES)}", *FLAGS], 2, tmp_path, [Fault("SIGTERM in the report", 0)])
    assert_codes(ended, [0, 0])
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()
