"""Which folder a run goes on in, and that one that was refused, or is another's, stays as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from distmuon.pretrain import Summary, UserError, load_config, train
from distmuon.pretrain.changes import write_config
from distmuon.pretrain.config import LogConfig
from distmuon.pretrain.export import export
from distmuon.pretrain.metrics import read_metrics
from distmuon.pretrain.runfolder import open_run_folder
from distmuon.pretrain.runlock import RunLock

Tiny = Callable[..., Path]
SHORT = {"train__steps": 4, "train__eval_every": 0, "checkpoint__every": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `run` keeps what it made."""
    return tmp_path_factory.mktemp("first") / "tiny"


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, first: Path) -> Summary:
    """A run of four steps with checkpoints of two and four."""
    folder = tmp_path / "runs" / "tiny"
    if first.exists():
        shutil.copytree(first, folder)
    else:
        train(load_config(tiny(**SHORT)))
        shutil.copytree(folder, first)
    summary = Summary.load(folder / "summary.json")
    assert summary is not None
    summary.run_dir = str(folder)
    return summary


def longer(tiny: Tiny, steps: int = 6, **changes: Any) -> Any:
    return load_config(tiny(**{**SHORT, "train__steps": steps, **changes}))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- which folder


def test_a_checkpoint_outside_of_a_run_is_refused(run: Summary, tiny: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "backup" / "deep" / "step-4"
    shutil.copytree(Path(run.run_dir) / "checkpoints" / "step-4", copy)
    for asked in (copy, copy.parent):
        with pytest.raises(UserError, match="is in no run folder") as caught:
            train(longer(tiny), resume=str(asked))
        assert "RUN/checkpoints/step-4" in str(caught.value)
    assert [path.name for path in (tmp_path / "backup").iterdir()] == ["deep"]
    # as the sentence says
    moved = tmp_path / "moved" / "checkpoints" / "step-4"
    shutil.copytree(copy, moved)
    shutil.copy(Path(run.run_dir) / "config.yaml", tmp_path / "moved")
    assert Path(train(longer(tiny), resume=str(tmp_path / "moved")).run_dir) == tmp_path / "moved"


def test_links_are_followed_to_the_run(run: Summary, tiny: Tiny, tmp_path: Path) -> None:
    """Checkpoints on another disk, and a link to one of them."""
    folder, disk = Path(run.run_dir), tmp_path / "disk" / "of-checkpoints"
    disk.parent.mkdir()
    shutil.move(folder / "checkpoints", disk)
    (folder / "checkpoints").symlink_to(disk)
    (tmp_path / "latest").symlink_to(folder / "checkpoints" / "step-4")
    (tmp_path / "run").symlink_to(folder)
    for steps, asked in enumerate((folder, folder / "checkpoints" / "step-4", tmp_path / "run"), 5):
        summary = train(longer(tiny, steps), resume=str(asked))
        assert Path(summary.run_dir).resolve() == folder.resolve()
        assert sorted(path.name for path in disk.parent.iterdir()) == ["of-checkpoints"]
    exported = export(folder, tmp_path / "model")
    assert exported.checkpoint.name == "step-7"


def test_a_link_of_another_name_is_a_checkpoint(run: Summary, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(Path(run.run_dir) / "checkpoints" / "step-4")
    summary = train(longer(tiny), resume=str(tmp_path / "latest"))
    assert Path(summary.run_dir) == Path(run.run_dir).resolve()
    assert export(tmp_path / "latest", tmp_path / "model").checkpoint.name == "step-4"


def test_auto_finds_names_with_brackets(tiny: Tiny) -> None:
    name = "lr[0.1] ?*"
    first = train(longer(tiny, 2, log__name=name))
    assert train(longer(tiny, 4, log__name=name), resume="auto").run_dir == first.run_dir


def test_auto_does_not_take_a_run_that_is_called_alike(tiny: Tiny, tmp_path: Path) -> None:
    """A second run of `e` is in `e-2`; the first of `e-7` is its own."""
    for name in ("e", "e", "e-7"):
        train(longer(tiny, 2, log__name=name))
    found = open_run_folder(LogConfig(dir=str(tmp_path / "runs"), name="e"), "auto")
    assert found.path.name == "e-2"


# --- what is refused changes nothing


def test_other_data_are_refused_before_the_folder_changes(run: Summary, tiny: Tiny) -> None:
    folder = Path(run.run_dir)
    (folder / "interrupted.json").write_text("{}")
    before = content(folder)
    with pytest.raises(UserError, match="the data seed changed"):
        train(longer(tiny, data__seed=3), resume=str(folder / "checkpoints" / "step-2"))
    assert {**content(folder), ".lock": b""} == {**before, ".lock": b""}


def test_the_summary_of_a_run_that_was_shorter_is_made_again(run: Summary, tiny: Tiny) -> None:
    """It was made longer, and killed before its report."""
    path = Path(run.run_dir) / "summary.json"
    old = path.read_text()
    train(longer(tiny), resume="auto")
    for text in (old, old[:40], "[]"):
        path.write_text(text)
        assert train(longer(tiny), resume="auto").steps == 6
        assert json.loads(path.read_text())["steps"] == 6


def test_a_config_is_written_whole_or_not(run: Summary, tiny: Tiny) -> None:
    path = Path(run.run_dir) / "config.yaml"
    with mock.patch("os.replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        write_config(path, load_config(tiny("other", optim__lr=1.0)), step=4)
    kept = path if path.exists() else path.with_name("config-until-step-4.yaml")
    assert yaml.safe_load(kept.read_text())["optim"]["lr"] == 3e-3
    assert not path.exists() or path.read_text()


# --- one run at a time

HOLD = """
import pathlib, sys
from distmuon.pretrain.runlock import RunLock
with RunLock() as lock:
    lock.take(pathlib.Path(sys.argv[1]))
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(run: Summary) -> Any:
    """Another process with the lock of the run."""
    command = [sys.executable, "-c", HOLD, run.run_dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmuon.pretrain.runlock._PATIENCE_SECONDS", 0.2)


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
@pytest.mark.usefixtures("impatient")
def test_a_folder_in_which_another_process_trains_is_refused(run: Summary, tiny: Tiny, holder: Any) -> None:
    before = content(Path(run.run_dir))
    with pytest.raises(UserError, match=f"process {holder.pid} of this machine is training in"):
        train(longer(tiny), resume="auto")
    assert content(Path(run.run_dir)) == before
    holder.kill()
    holder.wait()
    assert train(longer(tiny), resume="auto").steps == 6
    # and this process let go of it
    with RunLock() as lock:
        lock.take(Path(run.run_dir))


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
@pytest.mark.usefixtures("impatient", "holder")
def test_a_lock_of_another_machine_is_told(
    run: Summary, tiny: Tiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be that of a machine that was lost."""
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert train(longer(tiny), resume="auto").steps == 6
    assert "is locked by process" in caplog.text
    assert read_metrics(Path(run.run_dir) / "metrics.jsonl")[-1]["step"] == 6
