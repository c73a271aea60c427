"""The scripts for torchrun, run for real on gloo: one machine, a stop and its resume, and several agents that meet."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest
from launch_helpers import LAUNCH, finish, read, started, tiny_config, wait_for
from two_hosts import TwoHosts

from distmuon.pretrain.metrics import read_metrics

SINGLE = ["bash", str(LAUNCH / "torchrun_single_node.sh")]
MULTI = ["bash", str(LAUNCH / "torchrun_multi_node.sh")]

pytestmark = pytest.mark.slow


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "runs" / "tiny" / "metrics.jsonl")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config, note = tiny_config(tmp_path), tmp_path / "runs" / "tiny" / "interrupted.json"
    settings = {"NGPU": 2, "CONFIG": config, "LOG_DIR": tmp_path / "logs"}
    log = tmp_path / "first"
    with started(SINGLE, log, **settings) as process:
        wait_for(lambda: len(steps(tmp_path)) >= 3, log)
        process.send_signal(signal.SIGTERM)
        assert finish(process, log) == 1
    saved = json.loads(note.read_text(encoding="utf-8"))
    assert saved["signal"] == "SIGTERM"
    # rank 0 alone is on the terminal, and each rank has its files
    terminal = read(log)
    assert f"[rank0]:stopped by SIGTERM after step {saved['step']}; saved as" in terminal
    assert "[rank1]:" not in terminal
    ranks = {path.parent.name for path in (tmp_path / "logs").glob("*/attempt_0/*/stdout.log")}
    assert ranks == {"0", "1"}
    log = tmp_path / "second"
    with started(SINGLE, log, **settings) as process:
        assert finish(process, log) == 0, read(log)[-5000:]
    assert f"after step {saved['step']}\n" in read(log)
    assert steps(tmp_path) == list(range(1, 301))
    assert not note.exists()


@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_two_agents_meet(rendezvous: str, tmp_path: Path) -> None:
    """The one that keeps the store comes last."""
    config = tiny_config(tmp_path, train__steps=3)
    names = {"HEAD": "127.0.0.1", "PORT": free_port(), "NNODES": 2, "RDZV": rendezvous, "RDZV_TIMEOUT": 100}
    settings = {**names, "NGPU": 1, "CONFIG": config, "LOG_DIR": tmp_path / "logs"}
    logs = [tmp_path / "agent-0", tmp_path / "agent-1"]
    with (
        started(MULTI, logs[1], NODE_RANK=1, **settings) as second,
        started(MULTI, logs[0], NODE_RANK=0, **settings) as first,
    ):
        codes = [finish(first, logs[0]), finish(second, logs[1])]
    text = read(logs[0]) + read(logs[1])
    assert codes == [0, 0], text[-5000:]
    assert "processes   2: dp_shard 2" in text
    assert steps(tmp_path) == [1, 2, 3]


def test_machines_whose_host_names_are_loopback_meet(hosts: TwoHosts, tmp_path: Path) -> None:
    """HEAD knows that it is the head, and both advertise the addresses that reach each other."""
    config = tiny_config(tmp_path, train__steps=3)
    settings = {"HEAD": "10.77.0.1", "NNODES": 2, "NGPU": 1, "CONFIG": config, "RDZV_TIMEOUT": 100}
    logs = [tmp_path / "machine-0", tmp_path / "machine-1"]
    with (
        started([*hosts.hosts[1].prefix, *MULTI], logs[1], LOG_DIR=tmp_path / "logs", **settings) as second,
        started([*hosts.hosts[0].prefix, *MULTI], logs[0], LOG_DIR=tmp_path / "logs", **settings) as first,
    ):
        codes = [finish(first, logs[0]), finish(second, logs[1])]
    text = read(logs[0]) + read(logs[1])
    assert codes == [0, 0], text[-5000:]
    assert "processes   2: dp_shard 2" in text
    assert steps(tmp_path) == [1, 2, 3]
