"""Checkpoints that are written while training goes on hold what was there when they were asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import rank_runs
import torch
from checkpoint_states import TinyRun, different, held_back, message_of, same, saved_state
from harness import Pool

from distmuon.pretrain import UserError, load_config, train
from distmuon.pretrain.checkpoint import list_checkpoints, load_checkpoint
from distmuon.pretrain.checkpoint.writer import Writer
from distmuon.pretrain.processes import rank

Tiny = Callable[..., Path]
FULL = OSError(28, "No space left on device")


def steps_while_writing(folder: Path) -> tuple[bool, bool, bool, bool]:
    """Is the checkpoint what the state was, although six steps were taken before any of it was written?"""
    run = TinyRun().train(3)
    with run.saver(folder) as saver, held_back(saver) as go:
        before = run.values()
        path = saver.save(3)
        unfinished = not path.exists()
        run.train(3)
        saver.poll()  # says nothing, and does not wait
        run.train(3)
        moved = not same(run.values(), before)
        go.set()
        saver.wait()
    other = TinyRun(seed=1)
    load_checkpoint(path, other.state)
    loaded = same(other.values(), before)
    # and both go on alike
    whole = TinyRun().train(9)
    torch.set_rng_state(before["random"])
    other.train(6)
    return unfinished, moved, loaded, same({**other.values(), "random": 0}, {**whole.values(), "random": 0})


def test_steps_while_it_is_written_do_not_leak_into_it(tmp_path: Path) -> None:
    assert steps_while_writing(tmp_path) == (True, True, True, True)


def test_steps_while_it_is_written_do_not_leak_into_it_on_shards(two: Pool, tmp_path: Path) -> None:
    assert two.run(steps_while_writing, tmp_path) == [(True, True, True, True)] * 2


def save_twice(folder: Path) -> list[str]:
    run = TinyRun().train(2)
    paths = []
    for async_save in (True, False):
        with run.saver(folder / str(async_save), async_save=async_save) as saver:
            paths.append(saver.save(2))
            saver.wait()
    return [str(path) for path in paths]


def test_async_and_sync_saves_hold_the_same(two: Pool, tmp_path: Path) -> None:
    for paths in (save_twice(tmp_path / "one"), two.run(save_twice, tmp_path / "two")[0]):
        later, now = (saved_state(Path(path)) for path in paths)
        assert different(later, now) == []
        assert sum(isinstance(value, torch.Tensor) for value in now.values()) == 3 + 2 + 3


def saves_in_a_row(folder: Path) -> list[list[str]]:
    """Names of whole checkpoints while the second save waits for the first."""
    run, seen = TinyRun().train(1), []

    def look() -> None:
        seen.append([path.name for path in list_checkpoints(folder)])

    with run.saver(folder, keep=1) as saver:
        with held_back(saver) as go:
            saver.save(1)
            look()
            go.set()
            saver.save(2)
        look()
    look()
    return seen


def test_one_save_at_a_time_and_the_older_goes_when_the_newer_is_there(two: Pool, tmp_path: Path) -> None:
    for seen in (saves_in_a_row(tmp_path / "one"), *two.run(saves_in_a_row, tmp_path / "two")):
        assert seen[0] == []
        assert seen[1] in (["step-1"], ["step-2"])  # the second may be there by then
        assert seen[2] == ["step-2"]


def fail_behind(folder: Path, on: int) -> tuple[int, str]:
    """A save fails on one rank while training goes on: at which poll all hear of it, and what."""
    run = TinyRun().train(1)
    with run.saver(folder) as saver:
        saver.save(1)
        saver.wait()
        original = Writer.write_data

        def fails(self: Writer, *arguments: Any) -> Any:
            if rank() == on:
                raise FULL
            return original(self, *arguments)

        with mock.patch.object(Writer, "write_data", fails):
            saver.save(2)
            polls, message = 0, ""
            while not message and polls < 10_000:
                polls, message = polls + 1, message_of(saver.poll)
    return polls, message


@pytest.mark.parametrize("on", [0, 1])
def test_a_failure_behind_is_heard_of_at_a_step_on_all_ranks(two: Pool, tmp_path: Path, on: int) -> None:
    first, second = two.run(fail_behind, tmp_path, on)
    assert first == second
    assert first[1].startswith(f"the checkpoint {tmp_path}/step-2 could not be written (No space left on device): ")
    assert "\n" not in first[1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_failure_behind_ends_the_run_before_its_next_save(tiny: Tiny) -> None:
    path, taken = tiny(train__steps=40, checkpoint__every=30), []
    with (
        mock.patch.object(Writer, "write_data", side_effect=FULL),
        mock.patch("distmuon.pretrain.progress.Lines.advance", lambda self, step: taken.append(step)),
        pytest.raises(UserError, match=r"step-30 could not be written \(No space left on device\)"),
    ):
        train(load_config(path))
    assert 30 <= taken[-1] < 40


def copy_fails(path: Path, on: int) -> tuple[bool, str]:
    """No memory on one rank for the copy that is written."""
    if rank() != on:
        return rank_runs.message_of(path)
    with mock.patch("distmuon.pretrain.checkpoint.saving.BlockingAsyncStager.stage", side_effect=MemoryError):
        return rank_runs.message_of(path)


def test_a_rank_without_memory_for_its_copy_is_a_sentence_on_all(tiny: Tiny, two: Pool, tmp_path: Path) -> None:
    path = tiny()
    path.write_text(path.read_text(encoding="utf-8") + "parallel: {dp_shard: 2}\n", encoding="utf-8")
    first, second = two.run(copy_fails, path, 1)
    assert first == second
    assert first[0]
    assert "copy in host memory failed (MemoryError): set checkpoint.async_save to false" in first[1]
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir()) == []


def test_a_run_without_async_saves_is_the_same(tiny: Tiny) -> None:
    runs = [train(load_config(tiny(f"async-{on}", checkpoint__async_save=on))) for on in (True, False)]
    assert runs[0].checkpoint is not None and runs[1].checkpoint is not None
    later, now = (saved_state(Path(run.checkpoint or "")) for run in runs)
    assert different(later, now) == []
