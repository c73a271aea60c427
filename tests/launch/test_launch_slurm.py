"""The scripts for sbatch on a real Slurm: nodes, tasks, signals, and the way back into the queue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_helpers import LAUNCH, ROOT, environment, read, tiny_config, wait_for
from slurm_cluster import Cluster, cluster, missing

from distmuon.pretrain.metrics import read_metrics

REASON = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=f"no Slurm: {REASON}")]
# a node on CPUs; the names of the nodes are known to Slurm alone, so the head is given
CPUS = ["--gpus-per-node=0", "--ntasks-per-node=1", "--time=10"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as one:
        yield one


def submit(slurm: Cluster, folder: Path, script: str, *options: str) -> str:
    settings = environment(NGPU=1, HEAD="127.0.0.1", CONFIG=folder / "tiny.yaml", LOG_DIR=folder / "logs")
    command = ["sbatch", "--parsable", *CPUS, f"--output={folder}/log", *options, str(LAUNCH / script)]
    return slurm.ask(*command, cwd=ROOT, environment=settings).strip()


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "runs" / "tiny" / "metrics.jsonl")]


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_srun_native.sbatch"])
def test_a_job_that_is_signalled_goes_back_into_the_queue_and_on(slurm: Cluster, script: str, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    log = tmp_path / "log"
    job = submit(slurm, tmp_path, script)
    wait_for(lambda: len(steps(tmp_path)) >= 3, log)
    # as `--signal=USR1@180` does before the time limit
    slurm.ask("scancel", "--signal=USR1", job)
    wait_for(lambda: slurm.job(job)["Restarts"] == "1", log)
    note = json.loads((tmp_path / "runs" / "tiny" / "interrupted.json").read_text(encoding="utf-8"))
    assert note["signal"] == "SIGUSR1"
    # Slurm lets it wait for two minutes, and refuses a start in the second in which the one before was ended
    wait_for(lambda: slurm.job(job)["JobState"] == "PENDING", log)
    time.sleep(5)
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: slurm.job(job)["JobState"] in ("COMPLETED", "FAILED"), log)
    text = read(log)
    assert slurm.job(job)["JobState"] == "COMPLETED", text[-5000:]
    assert (
        f"job {job} goes back into the queue: a signal came, and the state is saved as tiny/step-{note['step']}" in text
    )
    assert text.count(f"after step {note['step']}\n") == 1
    assert text.count("processes   2: dp_shard 2") == 2
    assert steps(tmp_path) == list(range(1, 301))
    assert not (tmp_path / "runs" / "tiny" / "interrupted.json").exists()


def test_a_job_whose_rank_was_killed_goes_back_into_the_queue(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path, train__steps=100_000)
    log = tmp_path / "log"
    job = submit(slurm, tmp_path, "slurm_srun_native.sbatch")
    wait_for(lambda: len(steps(tmp_path)) >= 3, log)
    found = subprocess.run(
        ["pgrep", "-f", f"distmuon.pretrain --config {tmp_path}"], capture_output=True, text=True, check=True
    )
    ranks = [pid for pid in map(int, found.stdout.split()) if rank_of(pid) == "1"]
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: slurm.job(job)["Restarts"] == "1", log)
    text = read(log)
    assert "another rank has probably ended or stalled" in text
    assert f"job {job} goes back into the queue: exit code 137; the last checkpoint is -" in text
    slurm.ask("scancel", job)


def test_a_job_that_a_person_cancels_stays_out(slurm: Cluster, tmp_path: Path) -> None:
    tiny_config(tmp_path, train__steps=100_000)
    job = submit(slurm, tmp_path, "slurm_srun_native.sbatch")
    wait_for(lambda: len(steps(tmp_path)) >= 3, tmp_path / "log")
    slurm.ask("scancel", job)
    wait_for(lambda: slurm.job(job)["JobState"] == "CANCELLED", tmp_path / "log")
    assert slurm.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_srun_native.sbatch"])
def test_slurm_takes_the_options_of_the_scripts(slurm: Cluster, script: str) -> None:
    """What `sbatch` reads from the files; GPUs are not asked for, as these nodes have none."""
    command = ["sbatch", "--parsable", "--hold", "--gpus-per-node=0", "--ntasks-per-node=1", str(LAUNCH / script)]
    number = slurm.ask(*command, cwd=ROOT, environment=environment()).strip()
    job = slurm.job(number)
    slurm.ask("scancel", number)
    assert (job["JobName"], job["NumNodes"][0], job["TimeLimit"]) == ("distmuon", "2", "1-00:00:00")
    assert job["Requeue"] == "1"
    assert job["StdOut"] == str(ROOT / f"distmuon-{number}.log")


def rank_of(pid: int) -> str | None:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((word[5:].decode() for word in words if word.startswith(b"RANK=")), None)
