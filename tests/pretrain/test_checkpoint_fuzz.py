"""Damaged checkpoints: a clear error or the right state, and nothing else. 208 of them, drawn with a seed."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_states import TinyRun, same
from harness import Pool

from distmuon.pretrain import UserError
from distmuon.pretrain.checkpoint import load_checkpoint
from distmuon.pretrain.config import LogConfig
from distmuon.pretrain.runfolder import open_run_folder

EACH = 16
"""Checkpoints of each kind of damage."""


def truncated(draw: random.Random, path: Path) -> None:
    file = some_file(draw, path)
    os.truncate(file, draw.randrange(file.stat().st_size))


def flipped(draw: random.Random, path: Path) -> None:
    flip(draw, some_file(draw, path))


def flipped_index(draw: random.Random, path: Path) -> None:
    flip(draw, path / ".metadata")


def missing(draw: random.Random, path: Path) -> None:
    some_file(draw, path).unlink()


def swapped(draw: random.Random, path: Path) -> None:
    first, second = path / "__0_0.distcp", path / "__1_0.distcp"
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)


def of_an_older_step(draw: random.Random, path: Path) -> None:
    name = draw.choice(["__0_0.distcp", "__1_0.distcp", ".metadata"])
    shutil.copy(path.with_name("step-2") / name, path / name)


def with_the_manifest_of_another_step(draw: random.Random, path: Path) -> None:
    shutil.copy(path.with_name("step-2") / "manifest.json", path / "manifest.json")


def empty(draw: random.Random, path: Path) -> None:
    some_file(draw, path).write_bytes(b"")


def with_an_extra_file(draw: random.Random, path: Path) -> None:
    name = draw.choice(["__2_0.distcp", "__0_1.distcp", "__0.metadata", "manifest.json.old", "notes.txt"])
    (path / name).write_bytes(draw.randbytes(draw.randrange(500)))


def with_a_file_twice(draw: random.Random, path: Path) -> None:
    file = some_file(draw, path)
    shutil.copy(file, file.with_name(f"{file.name}.copy"))


def renamed(draw: random.Random, path: Path) -> None:
    path.rename(path.with_name(draw.choice(["step-40", "step-3", "step-04", "step-4.superseded", "4"])))


def with_something_else_for_a_file(draw: random.Random, path: Path) -> None:
    file = some_file(draw, path)
    file.unlink()
    kind = draw.choice(["folder", "dangling", "loop", "pipe"])
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file if kind == "loop" else path / "nowhere")


def longer(draw: random.Random, path: Path) -> None:
    with some_file(draw, path).open("ab") as stream:
        stream.write(draw.randbytes(draw.randrange(1, 300)))


KINDS: list[Callable[[random.Random, Path], None]] = [
    truncated,
    flipped,
    flipped_index,
    missing,
    swapped,
    of_an_older_step,
    with_the_manifest_of_another_step,
    empty,
    with_an_extra_file,
    with_a_file_twice,
    renamed,
    with_something_else_for_a_file,
    longer,
]


def some_file(draw: random.Random, path: Path) -> Path:
    return draw.choice(sorted(path.iterdir()))


def flip(draw: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def save_two(folder: Path) -> None:
    run = TinyRun()
    with run.saver(folder) as saver:
        for _ in range(2):
            run.train(2)
            saver.save(int(run.state.progress["step"]))


def load(runs: Path, resume: str, verify: bool) -> tuple[str, str, dict[str, Any]]:
    """Name of the checkpoint that a run resumes from, or the sentence with which it ends; and what it loaded."""
    try:
        folder = open_run_folder(LogConfig(dir=str(runs), name="tiny"), resume, verify=verify)
        run = TinyRun(seed=1)
        if folder.resume_from is None:
            return "", "", {}
        load_checkpoint(folder.resume_from, run.state)
    except UserError as error:
        return "", str(error), {}
    return folder.resume_from.name, "", run.values()


@pytest.fixture(scope="module")
def whole(two: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of two ranks."""
    runs = tmp_path_factory.mktemp("whole")
    two.run(save_two, runs / "tiny" / "checkpoints")
    return runs


@pytest.fixture(scope="module")
def right(whole: Path) -> dict[str, dict[str, Any]]:
    """What each holds."""
    found = {}
    for name in ("step-2", "step-4"):
        where, said, found[name] = load(whole, str(whole / "tiny" / "checkpoints" / name), True)
        assert (where, said) == (name, "")
    assert not same(found["step-2"], found["step-4"])
    return found


def damaged(whole: Path, folder: Path, kind: Callable[[random.Random, Path], None]) -> Iterator[tuple[int, Path]]:
    for number in range(EACH):
        runs = Path(shutil.copytree(whole, folder / str(number)))
        kind(random.Random(f"{kind.__name__} {number}"), runs / "tiny" / "checkpoints" / "step-4")
        yield number, runs
        shutil.rmtree(runs)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_checkpoint_is_an_error_or_the_right_state(
    whole: Path, right: dict[str, dict[str, Any]], tmp_path: Path, kind: Callable[[random.Random, Path], None]
) -> None:
    for number, runs in damaged(whole, tmp_path, kind):
        resume = str(runs / "tiny" / "checkpoints" / "step-4") if number % 2 else "auto"
        where, said, values = load(runs, resume, True)
        if resume == "auto":
            assert said == "", "the older one is whole"
        if said:
            assert "\n" not in said
            assert "Traceback" not in said
            assert resume in said
            # what is advised works
            assert load(runs, said.split("resume from ")[1].rstrip("."), True)[0] in right
        else:
            assert same(values, right[where]), (kind.__name__, number)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_without_checksums_it_is_an_error_or_a_state(
    whole: Path, right: dict[str, dict[str, Any]], tmp_path: Path, kind: Callable[[random.Random, Path], None]
) -> None:
    for number, runs in damaged(whole, tmp_path, kind):
        where, said, values = load(runs, str(runs / "tiny" / "checkpoints" / "step-4"), False)
        assert "\n" not in said, (kind.__name__, number)
        assert said or (where == "step-4" and values.keys() == right["step-4"].keys())


def load_on_ranks(runs: Path, resume: str) -> tuple[str, str, dict[str, Any]]:
    return load(runs, resume, True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_two_ranks_agree_about_a_damaged_checkpoint(
    whole: Path, two: Pool, tmp_path: Path, kind: Callable[[random.Random, Path], None]
) -> None:
    for number, runs in damaged(whole, tmp_path, kind):
        if number == 2:
            return
        auto, given = (
            two.run(load_on_ranks, runs, resume) for resume in ("auto", str(runs / "tiny" / "checkpoints" / "step-4"))
        )
        assert auto[0][:2] == auto[1][:2]
        assert auto[0][0] in ("step-2", "step-4")
        assert given[0][:2] == given[1][:2]
        assert given[0][1] or given[0][0] == auto[0][0]
