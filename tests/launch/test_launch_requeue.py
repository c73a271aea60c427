"""When the scripts for sbatch put a job back into the queue, by stand-ins of srun and scontrol, not by Slurm.

The stand-ins write down how they were called; srun's also changes what _state.py says of the run, which has a stand-in
too as it takes seconds to import the trainer, and ends with a code of our choice. test_launch_slurm.py runs the same
scripts on a real Slurm where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from launch_helpers import LAUNCH, ROOT, environment, tiny_config

REQUEUE = "scontrol requeue 41"


def run_job(folder: Path, script: str, code: int, state: str, **changes: object) -> tuple[int, str, str]:
    """The exit code of a batch script, how the stand-ins were called, and what it printed.

    ``srun`` ends with ``code``, and leaves a run of which ``_state.py`` says ``state``.
    """
    tools, calls = folder / "bin", folder / "calls"
    tools.mkdir(exist_ok=True)
    (folder / "state").touch()
    told = f'echo "$(basename "$0") $*" >>"{calls}"'
    bodies = {
        "srun": f'{told}; echo "{state}" >"{folder}/state"; exit {code}',
        "scontrol": f'{told}; [[ $1 != show ]] || printf "%s\\n" n4 n5',
        "python": f'[[ $1 != *_state.py ]] || exec cat "{folder}/state"; exec "{sys.executable}" "$@"',
    }
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": 41, "SLURM_JOB_NODELIST": "n[4-5]", "SLURM_NNODES": 2, "SLURM_NTASKS": 4}
    settings = environment(CONFIG="tiny.yaml", LOG_DIR=folder / "logs", NGPU=2, **job, **changes)
    settings.update(PATH=f"{tools}:{settings['PATH']}", PYTHON=str(tools / "python"))
    done = subprocess.run(
        ["bash", str(LAUNCH / script)], env=settings, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    text = calls.read_text()
    calls.unlink()
    return done.returncode, text, done.stdout + done.stderr


def test_the_head_is_the_first_node_and_the_port_is_the_jobs(tmp_path: Path) -> None:
    code, calls, _ = run_job(tmp_path, "slurm.sbatch", 0, "- tiny/step-7")
    first, second = calls.splitlines()
    assert (code, first) == (0, "scontrol show hostnames n[4-5]")
    assert " HEAD=n4 PORT=15041 JOB=41 NNODES=2 " in second


@pytest.mark.parametrize(
    ("script", "code", "state", "back"),
    [
        # torchrun ends with 1 whatever its ranks end with: the note tells
        ("slurm.sbatch", 1, "12:34 tiny/step-7", True),
        ("slurm.sbatch", 1, "- tiny/step-7", False),
        ("slurm_srun_native.sbatch", 75, "12:34 tiny/step-7", True),
        ("slurm_srun_native.sbatch", 69, "- tiny/step-7", True),
        ("slurm_srun_native.sbatch", 137, "- -", True),
        ("slurm_srun_native.sbatch", 130, "- tiny/step-7", False),
        ("slurm_srun_native.sbatch", 1, "- tiny/step-7", False),
    ],
)
def test_what_goes_back_into_the_queue(tmp_path: Path, script: str, code: int, state: str, back: bool) -> None:
    (tmp_path / "state").write_text("- -\n")
    ended, calls, output = run_job(tmp_path, script, code, state)
    assert (REQUEUE in calls) == back, output
    assert ("job 41 goes back into the queue" in output) == back
    # the stand-in of scontrol ends with 0; Slurm's ends the job
    assert ended == (0 if back else code)


def test_a_note_of_an_earlier_start_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    """A run that cannot go on, as with a changed setting, leaves it, and would start again for ever."""
    (tmp_path / "state").write_text("12:34 tiny/step-7\n")
    code, calls, _ = run_job(tmp_path, "slurm.sbatch", 1, "12:34 tiny/step-7")
    assert (code, REQUEUE in calls) == (1, False)
    _, calls, _ = run_job(tmp_path, "slurm.sbatch", 1, "12:35 tiny/step-7")
    assert REQUEUE in calls


def test_lost_ranks_start_again_as_long_as_there_are_new_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("- -\n")
    changes = {"SLURM_RESTART_COUNT": 3}
    _, calls, _ = run_job(tmp_path, "slurm_srun_native.sbatch", 69, "- tiny/step-7", **changes)
    assert REQUEUE in calls
    code, calls, output = run_job(tmp_path, "slurm_srun_native.sbatch", 69, "- tiny/step-7", **changes)
    assert (code, REQUEUE in calls) == (69, False)
    assert "this start has written no checkpoint, and MAX_REQUEUES allows no more than 3" in output
    _, calls, _ = run_job(tmp_path, "slurm_srun_native.sbatch", 69, "- tiny/step-7", MAX_REQUEUES=4, **changes)
    assert REQUEUE in calls


@pytest.fixture
def state() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_state", LAUNCH / "_state.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_state_of_a_run_is_that_of_the_folder_that_goes_on(state: ModuleType, tmp_path: Path) -> None:
    arguments = ["--config", str(tiny_config(tmp_path)), "--resume", "auto"]
    assert state.main(arguments) == "- -"
    runs = tmp_path / "runs"
    for name in (
        "tiny/checkpoints/step-9",
        "tiny/checkpoints/step-10",
        "tiny-2/checkpoints",
        "tiny-other/checkpoints/step-1",
    ):
        (runs / name).mkdir(parents=True)
    # tiny-2 has nothing to go on from
    assert state.main(arguments) == "- tiny/step-10"
    note = runs / "tiny" / "interrupted.json"
    note.write_text(json.dumps({"signal": "SIGUSR1"}))
    first = state.main(arguments)
    assert first.endswith(" tiny/step-10") and not first.startswith("-")
    assert state.main([*arguments[:2], "--resume", str(runs / "tiny")]) == first
    # a later note of the same words is another one
    (runs / "new").write_text(note.read_text())
    os.replace(runs / "new", note)
    assert state.main(arguments) != first
    note.write_text(json.dumps({"signal": "SIGINT"}))
    assert state.main(arguments) == "- tiny/step-10"


def test_a_task_has_what_torchrun_would_set(tmp_path: Path) -> None:
    """The wrapper in the shell of each task, with Slurm's variables of the second task of the second node."""
    command = subprocess.run(
        ["bash", str(LAUNCH / "slurm_srun_native.sbatch"), "--dry-run"],
        env=environment(HEAD="127.0.0.1", JOB=41, NNODES=2, NTASKS=4, LOG_DIR=tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    (tmp_path / "41").mkdir()
    tell = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    tool = tmp_path / "python"
    tool.write_text(f'#!/usr/bin/env bash\n[[ $1 == -m ]] && exec python3 -c \'{tell}\' "$@"\nexec python3 "$@"\n')
    tool.chmod(0o755)
    slurm = {"SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 1, "SLURM_NNODES": 2}
    # srun's own options go; the python is the one that tells
    text = command[command.index("env MASTER_ADDR") :].replace(environment()["PYTHON"], str(tool))
    subprocess.run(["bash", "-c", text], env=environment(**slurm), cwd=ROOT, timeout=60, check=True)
    arguments, variables = json.loads((tmp_path / "41" / "rank-3.log").read_text())
    assert arguments[:2] == ["-m", "distmuon.pretrain"]
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "15041"}
    assert {key: variables[key] for key in expected} == expected
    assert (variables["MASTER_ADDR"], variables["OMP_NUM_THREADS"]) == ("127.0.0.1", "1")
