"""Faults under torchrun: restarts, signals to its agent, and agents that come and go."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_helpers import LOSS, assert_same_run, losses, undisturbed
from fault_runs import Fault

from distmuon.pretrain.metrics import read_metrics

Tiny = Callable[..., Path]
HERE = Path(__file__).parent
STEPS = 12
CHANGES = {
    "train__steps": STEPS,
    "train__device_batch": 4,
    "train__eval_every": 0,
    "checkpoint__every": 3,
    "checkpoint__async_save": False,
    "model__num_hidden_layers": 2,
}
# any number of processes, with the same global batch
FLAGS = ["--parallel.dp_shard=-1"]

pytestmark = pytest.mark.slow


@contextmanager
def torchrun(
    launcher: Sequence[str], arguments: Sequence[str], log: Path, faults: Sequence[Fault] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """An agent of torchrun and its ranks, all of which are gone afterwards."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "FAULTS": json.dumps([dataclasses.asdict(fault) for fault in faults]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(HERE / "fault_runs.py"), *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        yield process
        # an agent that ended by itself has ended its ranks
        assert process.poll() not in (0, 1) or not alive(arguments[0])
    finally:
        kill(process)


def alive(argument: str) -> list[str]:
    """Processes with an argument that no others have."""
    found = subprocess.run(["pgrep", "-f", "--", argument], capture_output=True, text=True, check=False)
    return found.stdout.split()


def children(pid: int) -> list[int]:
    """The ranks that an agent has started, which are leaders of process groups of their own."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def kill(process: subprocess.Popen[bytes]) -> None:
    """An agent and its ranks, as when a machine is lost."""
    for pid in [*children(process.pid), process.pid]:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def finish(process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not finished in time\n{log.read_text(errors='replace')[-5000:]}") from None


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) >= step, process, log)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        running = process.poll() is None and time.monotonic() < deadline
        assert running, log.read_text(errors="replace")[-5000:]
        time.sleep(0.05)


def test_torchrun_restarts_ranks_that_were_killed(tiny: Tiny, tmp_path: Path) -> None:
    path, log = tiny("parts", **CHANGES), tmp_path / "log"
    faults = [
        Fault("killed in Newton-Schulz", 1, 5, attempt=0),
        Fault("killed in a checkpoint write", 0, 8, attempt=1),
    ]
    launcher = ["--standalone", "--max-restarts=2", "--nproc_per_node=2"]
    with torchrun(launcher, [f"--config={path}", *FLAGS, "--resume=auto"], log, faults) as process:
        assert finish(process, log) == 0, log.read_text(errors="replace")[-5000:]
    text = log.read_text(errors="replace")
    # step 9 was being written when rank 0 was killed
    assert text.count("after step 3\n") == 1
    assert text.count("after step 6\n") == 1
    whole = undisturbed(tiny, tmp_path / "whole", CHANGES, FLAGS)
    assert_same_run(whole, tmp_path / "runs" / "parts", STEPS, tmp_path)


def test_a_signal_of_slurm_to_torchrun_saves_and_leaves_a_note(tiny: Tiny, tmp_path: Path) -> None:
    path, log = tiny(**{**CHANGES, "train__steps": 100_000, "checkpoint__every": 100_000}), tmp_path / "log"
    folder = tmp_path / "runs" / "tiny"
    launcher = ["--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    launcher += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=60"]
    with torchrun(launcher, [f"--config={path}", *FLAGS, "--resume=auto"], log) as process:
        wait_for_step(folder, 2, process, log)
        process.send_signal(signal.SIGUSR1)
        # torchrun's own code, whatever its ranks ended with; and it starts none again
        assert finish(process, log) == 1
    note = json.loads((folder / "interrupted.json").read_text(encoding="utf-8"))
    assert note["signal"] == "SIGUSR1"
    assert Path(note["checkpoint"]).is_dir()
    assert log.read_text(errors="replace").count("stopped by SIGUSR1 after step") == 1


def test_the_machine_that_is_left_goes_on_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Two agents of a rank each; one is lost with its rank, and the other goes on from the checkpoint."""
    changes = {**CHANGES, "train__steps": 60, "checkpoint__every": 5}
    path, folder, logs = tiny("parts", **changes), tmp_path / "runs" / "parts", [tmp_path / "log-0", tmp_path / "log-1"]
    launchers = elastic()
    arguments = [f"--config={path}", *FLAGS, "--resume=auto"]
    # time to kill one
    slow = [Fault("stalled in the forward pass", None, 12, seconds=4)]
    with (
        torchrun(launchers[0], arguments, logs[0], slow) as stays,
        torchrun(launchers[1], arguments, logs[1], slow) as lost,
    ):
        wait_for_step(folder, 11, stays, logs[0])
        kill(lost)
        assert finish(stays, logs[0]) == 0, logs[0].read_text(errors="replace")[-5000:]
    text = both(logs)
    assert text.count("processes   2: dp_shard 2") == 1
    assert "another rank has probably ended or stalled" in text
    assert "after step 10\n" in text
    whole = undisturbed(tiny, tmp_path / "whole", changes, FLAGS)
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 61))
    expected = [record[LOSS] for record in read_metrics(whole / "metrics.jsonl")]
    # the same bits on two ranks; on one, sums of another order through bfloat16 as in test_ranks_resume
    assert [record[LOSS] for record in records[:10]] == expected[:10]
    assert [record[LOSS] for record in records] == pytest.approx(expected, rel=5e-5)
    assert losses(folder).keys() == losses(whole).keys()


def test_a_machine_that_comes_joins_and_nothing_is_lost(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun stops the ranks that run with SIGTERM, so they save, and starts them again with the new ones."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    changes = {**CHANGES, "train__steps": 100_000, "checkpoint__every": 100_000}
    path, folder, logs = tiny(**changes), tmp_path / "runs" / "tiny", [tmp_path / "log-0", tmp_path / "log-1"]
    launchers, arguments = elastic(), [f"--config={path}", *FLAGS, "--resume=auto"]
    with torchrun(launchers[0], arguments, logs[0]) as first:
        wait_for_step(folder, 3, first, logs[0])
        with torchrun(launchers[1], arguments, logs[1]) as second:
            wait_for(lambda: "resumed " in both(logs), second, logs[0])
            kill(second)
        kill(first)
    text = both(logs)
    saved = re.findall(r"stopped by SIGTERM after step (\d+); saved", text)
    assert re.findall(r"after step ([\d,]+)\n", text)[0].replace(",", "") == saved[0]
    assert "processes   2: dp_shard 2" in text


def elastic() -> list[list[str]]:
    """What starts torchrun on two machines, of which one is enough; the first keeps the store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test"]
    common += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    quick = "last_call_timeout=3,keep_alive_interval=1"
    return [[*common, f"--rdzv-conf=is_host={host},{quick}"] for host in (1, 0)]


def both(logs: Sequence[Path]) -> str:
    return "".join(log.read_text(errors="replace") for log in logs if log.exists())
