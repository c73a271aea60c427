"""What a user finds when a rank of a run under torchrun fails: its table, the terminal, and failed.json."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from launch_helpers import LAUNCH, ROOT, descendants, finish, read, started, tiny_config, wait_for

from distmuon.pretrain.metrics import read_metrics

SINGLE = ["bash", str(LAUNCH / "torchrun_single_node.sh")]
# Python imports it at its start: rank 1 raises in its third step
RAISES = """
import os
if os.environ.get("RANK") == "1":
    from distmuon.pretrain import loop
    original, calls = loop.language_model_loss, []
    def instead(*args):
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("too many sheep")
        return original(*args)
    loop.language_model_loss = instead
"""

pytestmark = pytest.mark.slow


def failed(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / "tiny" / "failed.json").read_text(encoding="utf-8"))
    return found


def root_cause(terminal: str) -> str:
    """The last part of torchrun's table."""
    return terminal.rpartition("Root Cause (first observed failure):")[2]


def test_a_rank_that_raises_is_the_first_cause_everywhere(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(RAISES)
    settings: dict[str, object] = {"NGPU": 2, "CONFIG": tiny_config(tmp_path), "LOG_DIR": tmp_path / "logs"}
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    log = tmp_path / "terminal"
    with started(SINGLE, log, **settings) as process:
        assert finish(process, log) == 1
    terminal = read(log)
    cause = root_cause(terminal)
    assert "rank      : 1 (local_rank: 1)" in cause, terminal[-5000:]
    assert "ArithmeticError: too many sheep" in cause
    assert re.search(r"exitcode  : 1 ", cause)
    note = failed(tmp_path)
    assert note["kind"] == "failed"
    assert (note["rank"], note["ranks"], note["step"]) == (1, 2, 3)
    assert note["where"] == "forward and backward pass"
    assert (note["exception"], note["message"]) == ("ArithmeticError", "too many sheep")
    assert note["traceback"].endswith("ArithmeticError: too many sheep\n")
    # the other one ends because of it, and says so on the terminal
    assert "[rank0]:error: rank 0: in the forward and backward pass of step 3 another rank" in terminal
    assert "[rank0]:first cause: rank 1 on " in terminal
    # each rank's file has what it logs, with its rank and the time
    for rank in (0, 1):
        logs = "".join(read(path) for path in (tmp_path / "logs").glob(f"*/attempt_0/{rank}/*.log"))
        assert re.search(rf"^\d{{4}}-\d\d-\d\d [\d:,]+ rank {rank}: processes   2: dp_shard 2$", logs, re.MULTILINE)
    assert "[rank1]:" not in terminal
    # a rank that may be on the terminal of its machine keeps its messages in a file of their own
    assert [path.parent.name for path in (tmp_path / "logs").glob("*/attempt_0/*/messages.log")] == ["1"]


def rank_of(pid: int) -> str | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((value[5:].decode() for value in variables if value.startswith(b"RANK=")), None)


def test_a_rank_that_is_killed_is_the_first_cause_and_is_missed(tmp_path: Path) -> None:
    settings = {"NGPU": 2, "CONFIG": tiny_config(tmp_path, train__steps=100_000), "LOG_DIR": tmp_path / "logs"}
    log, metrics = tmp_path / "terminal", tmp_path / "runs" / "tiny" / "metrics.jsonl"
    with started(SINGLE, log, **settings) as process:
        wait_for(lambda: len(read_metrics(metrics)) >= 3, log)
        victim = next(pid for pid in descendants(process.pid) if rank_of(pid) == "1")
        os.kill(victim, signal.SIGKILL)
        assert finish(process, log) == 1
    cause = root_cause(read(log))
    assert "rank      : 1 (local_rank: 1)" in cause, read(log)[-5000:]
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in cause
    note = failed(tmp_path)
    assert (note["kind"], note["rank"], note["exception"]) == ("lost another rank", 0, "RankLost")
    assert note["step"] >= 3
    assert "nothing is heard of rank 1: ended, stalled or far behind" in note["report"]
