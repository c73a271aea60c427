"""When the scripts for sbatch put a job back into the queue, by stand-ins of srun and scontrol, not by Slurm.

The stand-ins write down how they were called; srun's also does to the run folder what a run would have done, and ends
with a code of our choice. test_launch_slurm.py runs the same scripts on a real Slurm where there is one.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launch_helpers import LAUNCH, ROOT, environment, tiny_config

STAND_IN = """#!/usr/bin/env bash
echo "{name} $*" >>"{folder}/calls"
{body}
"""
SAVED = 'mkdir -p "{run}/checkpoints/step-7"'
NOTE = """echo '{{"signal": "{signal}"}}' >"{run}/interrupted.json.new"; mv "{run}/interrupted.json.new" "{run}/interrupted.json" """


def run_job(folder: Path, script: str, body: str, **changes: object) -> tuple[int, list[str], str]:
    """The exit code of a batch script, how the stand-ins were called, and what it printed."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    bodies = {"srun": body, "scontrol": '[[ $1 != show ]] || printf "%s\\n" n4 n5'}
    for name, text in bodies.items():
        path = tools / name
        path.write_text(
            STAND_IN.format(name=name, folder=folder, body=text.replace("{run}", str(folder / "runs/tiny")))
        )
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": 41, "SLURM_JOB_NODELIST": "n[4-5]", "SLURM_NNODES": 2, "SLURM_NTASKS": 4}
    settings = environment(CONFIG=folder / "tiny.yaml", LOG_DIR=folder / "logs", NGPU=2, **job, **changes)
    settings["PATH"] = f"{tools}:{settings['PATH']}"
    done = subprocess.run(
        ["bash", str(LAUNCH / script)], env=settings, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    calls = (folder / "calls").read_text().splitlines()
    (folder / "calls").unlink()
    return done.returncode, calls, done.stdout + done.stderr


def note(signal: str) -> str:
    return "\n".join([SAVED, NOTE.replace("{{", "{").replace("}}", "}").replace("{signal}", signal)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_config(tmp_path)
    return tmp_path


def test_the_head_is_the_first_node_and_the_port_is_the_jobs(folder: Path) -> None:
    code, calls, _ = run_job(folder, "slurm.sbatch", "exit 0")
    assert code == 0
    assert calls[0] == "scontrol show hostnames n[4-5]"
    assert " HEAD=n4 PORT=15041 JOB=41 NNODES=2 " in calls[1]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("script", "body", "back"),
    [
        # torchrun ends with 1 whatever its ranks end with: the note tells
        ("slurm.sbatch", f"{note('SIGUSR1')}\nexit 1", True),
        ("slurm.sbatch", f"{note('SIGINT')}\nexit 1", False),
        ("slurm.sbatch", "exit 1", False),
        ("slurm_srun_native.sbatch", "exit 75", True),
        ("slurm_srun_native.sbatch", "exit 69", True),
        ("slurm_srun_native.sbatch", "exit 137", True),
        ("slurm_srun_native.sbatch", "exit 130", False),
    ],
)
def test_what_goes_back_into_the_queue(folder: Path, script: str, body: str, back: bool) -> None:
    code, calls, output = run_job(folder, script, body)
    assert (calls[-1] == "scontrol requeue 41") == back, output
    assert ("job 41 goes back into the queue" in output) == back
    # the stand-in of scontrol ends with 0; Slurm's ends the job
    assert code == (0 if back else int(body.split()[-1]))


def test_a_note_of_an_earlier_start_is_not_taken_for_a_new_one(folder: Path) -> None:
    """A run that cannot go on, as with a changed setting, leaves it, and would start again for ever."""
    run_job(folder, "slurm.sbatch", f"{note('SIGTERM')}\nexit 1")
    code, calls, _ = run_job(folder, "slurm.sbatch", "exit 1")
    assert (code, calls[-1][:5]) == (1, "srun ")
    # the same words again, of a run that went on and was stopped again
    code, calls, _ = run_job(folder, "slurm.sbatch", f"{note('SIGTERM')}\nexit 1")
    assert calls[-1] == "scontrol requeue 41"


def test_lost_ranks_start_again_as_long_as_there_are_new_checkpoints(folder: Path) -> None:
    changes = {"SLURM_RESTART_COUNT": 3}
    code, calls, _ = run_job(folder, "slurm_srun_native.sbatch", f"{SAVED}\nexit 69", **changes)
    assert calls[-1] == "scontrol requeue 41"
    code, calls, output = run_job(folder, "slurm_srun_native.sbatch", f"{SAVED}\nexit 69", **changes)
    assert (code, calls[-1][:5]) == (69, "srun ")
    assert "this start has written no checkpoint, and MAX_REQUEUES allows no more than 3" in output
    code, calls, _ = run_job(folder, "slurm_srun_native.sbatch", f"{SAVED}\nexit 69", MAX_REQUEUES=4, **changes)
    assert calls[-1] == "scontrol requeue 41"


def test_a_task_has_what_torchrun_would_set(folder: Path) -> None:
    """The wrapper in the shell of each task, with Slurm's variables of the second task of the second node."""
    command = subprocess.run(
        ["bash", str(LAUNCH / "slurm_srun_native.sbatch"), "--dry-run"],
        env=environment(HEAD="127.0.0.1", JOB=41, NNODES=2, NTASKS=4, LOG_DIR=folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    (folder / "41").mkdir()
    tell = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    tool = folder / "python"
    tool.write_text(f'#!/usr/bin/env bash\n[[ $1 == -m ]] && exec python3 -c \'{tell}\' "$@"\nexec python3 "$@"\n')
    tool.chmod(0o755)
    slurm = {"SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 1, "SLURM_NNODES": 2}
    # srun's own options go; the python is the one that tells
    text = command[command.index("env MASTER_ADDR") :].replace(environment()["PYTHON"], str(tool))
    subprocess.run(["bash", "-c", text], env=environment(**slurm), cwd=ROOT, timeout=60, check=True)
    arguments, variables = json.loads((folder / "41" / "rank-3.log").read_text())
    assert arguments[:2] == ["-m", "distmuon.pretrain"]
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "15041"}
    assert {key: variables[key] for key in expected} == expected
    assert (variables["MASTER_ADDR"], variables["OMP_NUM_THREADS"]) == ("127.0.0.1", "1")
