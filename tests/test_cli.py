"""The commands as a user starts them: help, exit codes, errors on stderr, signals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distmuon import cli


def run(*arguments: str, module: str = "distmuon.cli", **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)  # type: ignore[call-overload]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    text = tmp_path / "words.txt"
    text.write_text("\n\n".join(f"line {i} of the words that it reads, {i * i}" for i in range(400)), encoding="utf-8")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tree = {
        "model": {"config": {**sizes, "num_key_value_heads": 2}},
        "data": {"source": str(text), "sequence_length": 32, "cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 200, "global_batch_tokens": 256, "device_batch": 8, "threads": 1, "device": "cpu"},
        "log": {"dir": str(tmp_path / "runs"), "every": 1, "plot": False},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_help_lists_only_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", ["pretrain", "tokenize"])
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: distmuon {name}" in capsys.readouterr().out


def test_no_command_and_an_unknown_one_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["pertrain"])
    assert stop.value.code == 2
    assert "'pertrain'" in capsys.readouterr().err


def test_the_package_imports_torch_only() -> None:
    code = (
        "import sys, distmuon, distmuon.cli; print([m for m in ('transformers', 'rich', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["pretrain", "tokenize"])
def test_without_the_extra_one_sentence_says_what_to_install(name: str) -> None:
    code = (
        f"import sys; sys.modules['jsonargparse'] = None; import distmuon.cli as c; sys.exit(c.main(['{name}', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "pip install 'distmuon[pretrain]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--optim.lrr", "1"], "error: --optim.lrr on the command line is no setting: did you mean --optim.lr?\n"),
        (["--train.device_batch", "3"], "set train.global_batch_tokens to 192 or 288, or train.device_batch to 2.\n"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr(config: Path, flags: list[str], sentence: str) -> None:
    done = run("pretrain", "--config", str(config), *flags)
    assert done.returncode == 1
    assert done.stderr.endswith(sentence)
    assert done.stderr.count("\n") == 1


def test_debug_shows_where_an_error_is_from(config: Path) -> None:
    done = run("pretrain", "--config", str(config), "--train.device_batch", "3", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_tokenize_writes_shards(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    assert cli.main(["tokenize", str(out), "--source", str(tmp_path / "words.txt"), "--shard_tokens", "8000"]) == 0
    assert "wrote " in capsys.readouterr().out
    assert (out / "train_000001.bin").exists()
    assert (out / "metadata.json").exists()
    assert cli.main(["tokenize", str(out), "--source", str(tmp_path / "words.txt")]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_equals_an_uninterrupted_one(
    config: Path, tmp_path: Path, signum: int
) -> None:
    flags = ["--config", str(config), "--train.steps", "400"]
    command = [sys.executable, "-m", "distmuon.pretrain", *flags]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step   5/"):
                process.send_signal(signum)
                break
        process.stdout.read()
        errors = process.stderr.read()
    # Ctrl-C wants the run to end; SIGTERM is to be followed by the same command
    assert process.returncode == (130 if signum == signal.SIGINT else 75)
    resume = errors.splitlines()[-1]
    assert resume.startswith(f"resume: {sys.executable} -m distmuon.pretrain --config ")
    # it works from any folder, given that the package is installed
    command = shlex.split(resume)[1:]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    assert run(*flags, "--log.name", "whole", module="distmuon.pretrain").returncode == 0
    assert losses(tmp_path / "runs" / "small") == losses(tmp_path / "runs" / "whole")
    assert len(losses(tmp_path / "runs" / "whole")) == 400


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(record["step"], record["loss_metrics/global_avg_loss"]) for record in records]
