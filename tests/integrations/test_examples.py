"""Every file of examples/ by the command in its head, with few steps, on the CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from distmuon.pretrain import load_config, train
from distmuon.pretrain.metrics import read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DEBUG = ROOT / "configs" / "debug.yaml"
STEPS = 4
# two passes of each of two processes a step, four of one
RUN = [f"--config={DEBUG}", f"--train.steps={STEPS}", "--train.device_batch=4", "--data.max_megabytes=2"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """The corpus is read once for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """What a module of Python prints, with its arguments."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd or ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, err
    return out


def torchrun(processes: int, *command: object) -> str:
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command)


def losses(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"^step \d+  loss ([\d.]+)$", printed, flags=re.M)]


def test_one_device():
    first, last = losses(run(EXAMPLES / "single_gpu.py", 8))
    assert last < first - 1


@pytest.fixture(scope="module")
def of_ddp() -> list[float]:
    return losses(torchrun(2, EXAMPLES / "ddp.py", 8))


def test_ddp(of_ddp: list[float]):
    assert of_ddp[-1] < of_ddp[0] - 1


@pytest.mark.parametrize(("name", "processes"), [("fsdp2", 2), ("hsdp_tp", 4)])
def test_other_layouts_train_as_ddp(of_ddp: list[float], name: str, processes: int):
    """They read the same and compute the same, with updates in bfloat16."""
    assert losses(torchrun(processes, EXAMPLES / f"{name}.py", 8)) == pytest.approx(of_ddp, abs=2e-3)


def test_trainer(tmp_path):
    found = re.findall(r"'loss': '([\d.]+)'", run(EXAMPLES / "trainer.py", 20, cwd=tmp_path))
    assert len(found) == 2
    assert float(found[1]) < float(found[0]) - 0.5
    assert (tmp_path / "runs" / "trainer" / "checkpoint-20").is_dir()


@pytest.fixture(scope="module")
def of_the_trainer(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of `python -m distmuon.pretrain`, on one process."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--train.dtype=float32", "--train.device=cpu", "--train.eval_tokens=2048", "--train.sample_tokens=0"]
    flags += ["--log.every=1", f"--log.dir={folder}", "--log.plot=false", "--log.progress=lines"]
    train(load_config(DEBUG, *RUN[1:], *flags))
    return [record["loss_metrics/global_avg_loss"] for record in read_metrics(folder / "debug" / "metrics.jsonl")]


@pytest.mark.parametrize(("name", "kind"), [("accelerate_ddp", "MULTI_CPU"), ("accelerate_fsdp2", "FSDP")])
def test_accelerate_computes_what_the_trainer_does(of_the_trainer: list[float], name: str, kind: str):
    """By the configuration files of launch/, for two processes that have no GPU and compute in float32."""
    config = ["--config_file", ROOT / "launch" / f"{name}.yaml", "--num_processes=2", "--mixed_precision=no"]
    launch = ["-m", "accelerate.commands.launch", *config]
    script = [EXAMPLES / "accelerate_pretrain.py", *RUN]
    if kind == "FSDP":
        printed = run(*launch, Path(__file__).parent / "accelerate_on_cpu.py", *script)
    else:
        printed = run(*launch, *script, ACCELERATE_USE_CPU="true")
    assert f"2 processes, {kind}" in printed
    assert losses(printed) == pytest.approx(of_the_trainer, rel=5e-6)


def test_each_is_short_and_says_how_it_is_run():
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 7
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") < 60, file
        assert f"examples/{file.name}" in text or file.name == "torchtitan_optimizer.py", file
