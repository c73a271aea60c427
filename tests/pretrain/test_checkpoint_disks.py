"""What goes wrong with a disk is one sentence, and the checkpoint before stays as it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoint_states import TinyRun, message_of, same
from harness import Pool, RankError, run_ranks

from distmuon.pretrain import UserError, load_config, train
from distmuon.pretrain.checkpoint import Saver, find_problem, list_checkpoints, load_checkpoint
from distmuon.pretrain.checkpoint.names import lock_of, temporary
from distmuon.pretrain.checkpoint.store import Writing
from distmuon.pretrain.checkpoint.writer import Writer

ADVICE = "free space or point log.dir at another disk, and go on from the one before with --resume."


def save(saver: Saver, step: int) -> None:
    saver.save(step)
    saver.wait()


def fails_to_save(run: TinyRun, folder: Path, step: int) -> str:
    """The sentence of a save that fails."""
    with run.saver(folder) as saver:
        message = message_of(save, saver, step)
    assert "\n" not in message
    assert message.startswith(f"the checkpoint {folder}/step-{step} could not be written (")
    assert message.endswith(f"): {ADVICE}")
    return message


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, timeout=30)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


@pytest.mark.parametrize("async_save", [True, False])
def test_a_full_disk(tmp_path: Path, async_save: bool) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "512k"):
        run = TinyRun().train(1)
        before = run.values()
        with run.saver(disk, async_save=async_save) as saver:
            save(saver, 1)
            with (disk / "other").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(4096))
            run.train(1)
            message = message_of(save, saver, 2)
            assert message == f"the checkpoint {disk}/step-2 could not be written (No space left on device): {ADVICE}"
            assert sorted(path.name for path in disk.iterdir()) == ["other", "step-1"]
            # with space again the run could go on
            (disk / "other").unlink()
            save(saver, 2)
        assert find_problem(disk / "step-2", hashes=True) is None
        other = TinyRun(seed=1)
        load_checkpoint(disk / "step-1", other.state)
        assert same(other.values(), before)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    # root may write everywhere, so the system's answer is put in
    with mock.patch.object(Path, "mkdir", side_effect=PermissionError(13, "Permission denied", "x")):
        assert "(Permission denied: x)" in fails_to_save(TinyRun().train(1), tmp_path, 1)
    with mock.patch.object(Path, "rename", side_effect=OSError(30, "Read-only file system")):
        assert "(Read-only file system)" in fails_to_save(TinyRun().train(1), tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    # one that turns read-only lets nothing be removed either
    read_only = OSError(30, "Read-only file system")
    with (
        mock.patch.object(Path, "rename", side_effect=read_only),
        mock.patch.object(os, "unlink", side_effect=read_only),
    ):
        assert "(Read-only file system)" in fails_to_save(TinyRun().train(1), tmp_path, 1)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    assert "exists" in fails_to_save(TinyRun().train(1), tmp_path / "checkpoints", 1)


def test_a_folder_that_goes_while_it_is_written(tmp_path: Path) -> None:
    folder, run, original = tmp_path / "checkpoints", TinyRun().train(1), Writer.finish

    def finish(self: Writer, **arguments: Any) -> None:
        shutil.rmtree(folder)
        original(self, **arguments)

    with mock.patch.object(Writer, "finish", finish):
        assert "No such file or directory" in fails_to_save(run, folder, 1)
    # and one that went between two saves is made again
    with run.saver(folder) as saver:
        save(saver, 1)
        shutil.rmtree(folder)
        save(saver, 2)
    assert [path.name for path in list_checkpoints(folder)] == ["step-2"]


def save_and_fail(folder: Path, on: int, what: str) -> str:
    run = TinyRun().train(1)
    with run.saver(folder) as saver:
        save(saver, 1)
    if torch.distributed.get_rank() != on:
        return fails_to_save(run.train(1), folder, 2)
    with mock.patch(what, side_effect=OSError(5, "Input/output error")):
        return fails_to_save(run.train(1), folder, 2)


@pytest.mark.parametrize(
    ("on", "what"),
    [
        (1, "distmuon.pretrain.checkpoint.writer.record"),
        (1, "torch.distributed.checkpoint.filesystem.FileSystem.create_stream"),
        (0, "distmuon.pretrain.checkpoint.store.Writing.commit"),
        (0, "distmuon.pretrain.checkpoint.saving.Writing"),
        (0, "torch.distributed.checkpoint.filesystem.FileSystemWriter.finish"),
    ],
)
def test_one_rank_whose_disk_fails(two: Pool, tmp_path: Path, on: int, what: str) -> None:
    first, second = two.run(save_and_fail, tmp_path, on, what)
    assert first == second
    assert "(Input/output error)" in first
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert find_problem(tmp_path / "step-1", hashes=True) is None


def test_what_killed_runs_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    run = TinyRun().train(1)
    left = [temporary(tmp_path, step) for step in (1, 2)]
    for path in left:
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"x")
    lock_of(left[1]).touch()
    lock_of(temporary(tmp_path, 3)).touch()
    others = Writing(temporary(tmp_path, 4))
    notes = tmp_path / ".writing-step-5-notes"
    notes.mkdir()
    with run.saver(tmp_path) as saver:
        save(saver, 1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-1",
        notes.name,
        others.path.name,
        lock_of(others.path).name,
    }
    # the lock goes with the process that had it
    others._lock.close()
    with run.saver(tmp_path) as saver:
        save(saver, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2", notes.name}


def test_a_disk_without_locks_is_written_too(tmp_path: Path) -> None:
    with mock.patch.object(fcntl, "flock", side_effect=OSError(95, "Operation not supported")):
        with TinyRun().train(1).saver(tmp_path) as saver:
            save(saver, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def save_and_die(folder: Path) -> None:
    """Save, and end in the middle of the second save, all but the rename done."""
    run = TinyRun().train(1)
    with run.saver(folder, keep=1) as saver:
        save(saver, 1)
        with mock.patch.object(Writing, "commit", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)):
            save(saver, 2)


def test_a_run_that_is_killed_while_it_writes_leaves_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(save_and_die, 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # with what was being written, and its lock
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    with TinyRun().train(2).saver(tmp_path, keep=1) as saver:
        save(saver, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    run = TinyRun().train(1)
    with run.saver(tmp_path) as saver:
        save(saver, 1)
        run.train(1)
        save(saver, 1)
    other = TinyRun(seed=1)
    load_checkpoint(tmp_path / "step-1", other.state)
    assert same(other.values(), run.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-1.superseded"]


def test_an_error_of_the_run_waits_for_the_save_under_way(tmp_path: Path) -> None:
    run = TinyRun().train(1)
    with pytest.raises(UserError, match="of the run"), run.saver(tmp_path) as saver:
        saver.save(1)
        raise UserError("of the run")
    assert find_problem(tmp_path / "step-1", hashes=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def run_on_a_small_disk(path: Path, disk: Path, what: str) -> str:
    """A whole run whose disk refuses one kind of write on rank 0."""
    with mock.patch(what, side_effect=OSError(28, "No space left on device")):
        return message_of(train, load_config(path, f"--log.dir={disk}"))


@pytest.mark.parametrize(
    "what",
    [
        "distmuon.pretrain.run.write_config",
        "distmuon.pretrain.run.MetricsFile",
        "distmuon.pretrain.run.MetricsFile.write",
        "distmuon.pretrain.report.Summary.save",
    ],
)
def test_the_rest_of_a_run_folder_is_a_sentence_too(tiny: Callable[..., Path], tmp_path: Path, what: str) -> None:
    said = run_on_a_small_disk(tiny(train__steps=2), tmp_path / "disk", what)
    assert said == (
        f"{tmp_path}/disk/tiny cannot be written (No space left on device): free space or point log.dir at another "
        "disk, and go on from the last checkpoint with --resume."
    )
