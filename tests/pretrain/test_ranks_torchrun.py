"""The command under torchrun: what it prints, writes and returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from distmuon.pretrain import load_config
from distmuon.pretrain.metrics import read_metrics

Tiny = Callable[..., Path]
DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"

pytestmark = pytest.mark.slow


def start(processes: int, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, "-m", "distmuon.pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        # torchrun passes it on to the ranks
        process.terminate()
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"not finished in time\n{out}\n{err}") from None
    return process.returncode, out, err


def losses(folder: Path) -> list[float]:
    return [record["loss_metrics/global_avg_loss"] for record in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("one")
    done = subprocess.run(
        [sys.executable, "-m", "distmuon.pretrain", *debug(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0
    return losses(folder / "debug")


def debug(folder: Path) -> Sequence[str]:
    flags = {"train.steps": 4, "log.every": 1, "train.eval_tokens": 4096, "train.dtype": "float32", "log.plot": "false"}
    return [f"--config={DEBUG}", f"--log.dir={folder}", *(f"--{key}={value}" for key, value in flags.items())]


@pytest.mark.parametrize(
    ("processes", "flags"), [(1, []), (2, ["--parallel.dp_shard=2"])], ids=["one rank", "two ranks"]
)
def test_the_debug_config_trains_as_on_one_process(
    tmp_path: Path, of_one_process: list[float], processes: int, flags: list[str]
) -> None:
    code, out, err = finish(start(processes, *debug(tmp_path), *flags))
    assert code == 0, err
    assert losses(tmp_path / "debug") == pytest.approx(of_one_process, rel=5e-5)
    assert [found.name for found in tmp_path.iterdir()] == ["debug"]
    # one rank prints
    assert out.count("step 4/4") == 1
    assert out.count("sample:") == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config=nowhere.yaml"], "--config nowhere.yaml cannot be read"),
        ([f"--config={DEBUG}", "--parallel.dp_shard=2", "--data.source=nowhere"], "data.source 'nowhere'"),
    ],
)
def test_a_mistake_is_said_once(flags: list[str], sentence: str) -> None:
    code, _, err = finish(start(2, *flags))
    assert code == 1
    assert err.count("error: ") == 1
    assert sentence in err
    assert "exitcode  : 1" in err


def test_a_signal_to_torchrun_saves_and_the_printed_command_goes_on(tiny: Tiny) -> None:
    path = tiny(train__steps=100_000, train__device_batch=4, log__every=1, checkpoint__every=1_000_000)
    folder = Path(load_config(path).log.dir) / "tiny"
    process = start(2, f"--config={path}", "--parallel.dp_shard=2")
    deadline = time.monotonic() + 100
    while len(read_metrics(folder / "metrics.jsonl")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, _, err = finish(process)
    checkpoints = list((folder / "checkpoints").iterdir())
    assert len(checkpoints) == 1, err
    step = int(checkpoints[0].name.removeprefix("step-"))
    assert f"stopped by SIGINT after step {step}; saved as" in err
    command = next(line for line in err.splitlines() if line.startswith("resume: ")).removeprefix("resume: ")
    assert "--nproc_per_node=2" in command
    done = subprocess.run(
        f"{command} --train.steps={step + 2} --train.sample_tokens=0",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")][-3:] == [step, step + 1, step + 2]
