"""The file that names the first cause of a failure: who writes it, what stays, and a disk that refuses it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distmuon.pretrain import failures
from distmuon.pretrain.command import run_command
from distmuon.pretrain.errors import AgreedError, RankLost, UserError
from distmuon.pretrain.failures import FILE, HISTORY, Failures, put_aside, read, sentence
from distmuon.pretrain.interrupt import Interrupted
from distmuon.pretrain.phase import phase

Tiny = Callable[..., Path]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this process one of four."""

    def become(rank: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", str(rank))

    return become


def ended_by(error: BaseException, folder: Path, *, settled: bool = True) -> list[str]:
    """What was called when an exception ends a run in a folder; the exception passes."""
    called: list[str] = []
    noting = Failures(folder / f"tiny.{FILE}", lambda: called.append("first"))
    with pytest.raises(type(error)) as caught, noting, noting:
        if settled:
            Failures.settle(folder, {"step": 4})
        with phase("clipping", 5):
            raise error
    assert caught.value is error
    return called


@pytest.fixture
def torchruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The error file that torchrun gives to a process."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def test_it_names_rank_place_and_error(tmp_path: Path, as_rank: Callable[[int], None], torchruns: Path) -> None:
    as_rank(2)
    assert ended_by(ArithmeticError("too many sheep"), tmp_path) == ["first"]
    note = read(tmp_path / FILE)
    assert note is not None
    expected: dict[str, Any] = {"kind": "failed", "rank": 2, "ranks": 4, "host": os.uname().nodename}
    expected |= {"process": os.getpid(), "steps_done": 4, "where": "clipping", "step": 5, "report": None}
    expected |= {"exception": "ArithmeticError", "message": "too many sheep"}
    assert {key: note[key] for key in expected} == expected
    assert "in ended_by" in note["traceback"]
    line = (
        f"rank 2 on {os.uname().nodename} in the clipping of step 5 at {note['time']}: ArithmeticError: too many sheep"
    )
    assert sentence(note) == line
    message = json.loads(torchruns.read_text(encoding="utf-8"))["message"]
    assert message["message"] == "ArithmeticError: too many sheep"
    assert {path.name for path in tmp_path.iterdir()} == {FILE, torchruns.name}


LOST, OWN, AGREED = RankLost("rank 0 is gone"), ArithmeticError("own"), AgreedError("agreed")


@pytest.mark.parametrize(
    ("errors", "stays"),
    [
        ([(1, LOST), (0, OWN), (2, LOST)], 0),
        ([(2, OWN), (1, OWN)], 2),
        ([(3, LOST), (1, LOST)], 3),
        ([(2, LOST), (1, AGREED), (0, AGREED)], 0),
        ([(0, AGREED), (1, OWN)], 1),
    ],
)
def test_the_first_cause_stays(
    tmp_path: Path, as_rank: Callable[[int], None], errors: list[tuple[int, Exception]], stays: int
) -> None:
    for rank, error in errors:
        as_rank(rank)
        ended_by(error, tmp_path)
    note = read(tmp_path / FILE)
    assert note is not None
    assert note["rank"] == stays
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_before_there_is_a_run_folder(tmp_path: Path) -> None:
    """A mistake in the settings is told in a sentence; the rest goes beside the folders until the next start."""
    ended_by(UserError("lr is -1"), tmp_path, settled=False)
    assert list(tmp_path.iterdir()) == []
    ended_by(OWN, tmp_path, settled=False)
    assert [path.name for path in tmp_path.iterdir()] == [f"tiny.{FILE}"]
    with Failures(tmp_path / f"tiny.{FILE}", lambda: None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_stop_is_told_to_torchrun_alone(tmp_path: Path, torchruns: Path) -> None:
    ended_by(Interrupted(15, 7, tmp_path), tmp_path)
    assert not (tmp_path / FILE).exists()
    message = json.loads(torchruns.read_text(encoding="utf-8"))["message"]["message"]
    assert message.startswith("Interrupted: stopped by SIGTERM after step 7; saved as ")


def test_another_rank_tells_who_was_first(tmp_path: Path, as_rank: Callable[[int], None]) -> None:
    as_rank(2)
    ended_by(OWN, tmp_path)
    noting = Failures(None, lambda: None)
    Failures.settle(tmp_path, {"step": 4})
    assert noting.elsewhere() is None, "of itself"
    as_rank(1)
    assert "rank 2 on " in (noting.elsewhere() or "")
    (tmp_path / FILE).unlink()
    ended_by(LOST, tmp_path)
    as_rank(0)
    assert noting.elsewhere() is None, "another that lost one is no cause"


@pytest.mark.parametrize("hangs", [False, True])
def test_a_disk_that_refuses_or_hangs_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], hangs: bool
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    if hangs:
        folder.mkdir()
        os.mkfifo(folder / f"..{FILE}.0.new")  # which nobody reads
        monkeypatch.setattr(failures, "_DISK_SECONDS", 0.2)
    else:
        folder.write_text("no folder")
    ended_by(OWN, folder)
    said = capfd.readouterr().err
    assert "error.json could not be written (No such file or directory)" in said
    assert (f"{folder / FILE} could not be written" in said) != hangs


def test_a_run_that_goes_on_keeps_the_history(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--config={tiny(train__steps=4, checkpoint__every=2, checkpoint__async_save=False)}", "--resume=auto"]
    folder = tmp_path / "runs" / "tiny"
    norms = [torch.ones(()), torch.ones(()), ArithmeticError("too many sheep")]
    with mock.patch("distmuon.pretrain.loop.Loop._clip", side_effect=norms), pytest.raises(ArithmeticError):
        run_command(arguments)
    note = read(folder / FILE)
    assert note is not None
    assert (note["rank"], note["step"], note["where"], note["exception"]) == (0, 3, "clipping", "ArithmeticError")
    assert run_command(arguments) == 0
    assert f"the start before has failed: {sentence(note)}" in capfd.readouterr().out
    assert not (folder / FILE).exists()
    assert [json.loads(line) for line in (folder / HISTORY).read_text(encoding="utf-8").splitlines()] == [note]


@pytest.mark.parametrize("text", ['{"kind": "failed", "rank": 0}', '["kind"]', '{"kind": "fai', ""])
def test_a_file_that_is_no_note_stops_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    assert put_aside(tmp_path) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    ended_by(ArithmeticError("too many sheep"), tmp_path)
    assert "too many sheep" in (tmp_path / FILE).read_text(encoding="utf-8")
