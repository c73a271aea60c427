"""Reading a checkpoint or a config runs nothing that is written in it."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import TinyRun, message_of
from harness import Pool
from torch.distributed.checkpoint.metadata import Metadata

from distmuon.pretrain import UserError, load_config, train
from distmuon.pretrain.checkpoint import find_problem, load_checkpoint
from distmuon.pretrain.checkpoint import manifest as manifests
from distmuon.pretrain.checkpoint.metadata import BrokenCheckpoint, read_metadata

Tiny = Callable[..., Path]


class Touch:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The file that a malicious pickle would make; a plain ``pickle.loads`` does."""
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.exists()
    trap.unlink()
    return trap


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run = TinyRun().train(1)
    with run.saver(tmp_path / "checkpoints") as saver:
        return saver.save(1)


def sign(checkpoint: Path) -> None:
    """Make sizes and checksums right again, as somebody would who may write the folder."""
    content = json.loads((checkpoint / manifests.FILE).read_text())
    del content["checksum"]
    for name in content["files"]:
        found = manifests.record(checkpoint / name)
        content["files"][name] = {"size": found.size, "sha256": found.sha256}
    content["checksum"] = manifests._checksum(content)
    (checkpoint / manifests.FILE).write_text(json.dumps(content))


def index_with(checkpoint: Path, change: Callable[[Metadata], object]) -> None:
    """Replace the index by another object, made of the true one, and sign it."""
    path = checkpoint / ".metadata"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))
    sign(checkpoint)


def test_the_index_of_a_true_checkpoint_is_read_as_it_was_written(checkpoint: Path) -> None:
    files = manifests.read_manifest(checkpoint).files
    safe, plain = read_metadata(checkpoint, files), pickle.loads((checkpoint / ".metadata").read_bytes())
    assert safe.state_dict_metadata == plain.state_dict_metadata
    assert set(safe.storage_data) == set(plain.storage_data)
    for index, place in safe.storage_data.items():
        other = plain.storage_data[index]
        assert (place.relative_path, place.offset, place.length) == (other.relative_path, other.offset, other.length)


@pytest.mark.parametrize("where", ["whole", "key", "planner", "size"])
def test_an_index_that_would_run_something_is_refused(checkpoint: Path, trap: Path, where: str) -> None:
    def change(metadata: Metadata) -> object:
        if where == "whole":
            return Touch(trap)
        if where == "key":
            metadata.state_dict_metadata[Touch(trap)] = next(iter(metadata.state_dict_metadata.values()))  # type: ignore[index]
        elif where == "planner":
            metadata.planner_data = Touch(trap)
        else:
            entry = metadata.state_dict_metadata["app.model.0.weight"]
            entry.size = Touch(trap)  # type: ignore[union-attr, assignment]
        return metadata

    index_with(checkpoint, change)
    said = message_of(load_checkpoint, checkpoint, TinyRun().state)
    assert "asks for pathlib" in said
    assert "nothing was run" in said
    assert "\n" not in said
    assert find_problem(checkpoint, hashes=True) in said
    assert not trap.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "torch.load", "torch.hub.load", "os.system", "torch.serialization._load", "torch.nn.Linear"],
)
def test_names_that_are_no_part_of_an_index_are_refused(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(BrokenCheckpoint, match=f"asks for {name}"):
        read_metadata(tmp_path, ())


def test_an_index_cannot_change_the_classes_it_names(tmp_path: Path) -> None:
    # BUILD with a pair of states sets attributes of whatever is there, a class too
    data = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}(X\x03\x00\x00\x00abcK\x01utb."
    assert [op.name for op, *_ in pickletools.genops(data)][-2] == "BUILD"
    pickle.loads(data)
    assert Metadata.abc == 1  # type: ignore[attr-defined]
    del Metadata.abc  # type: ignore[attr-defined]
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(BrokenCheckpoint, match="not the index of a checkpoint"):
        read_metadata(tmp_path, ())
    assert not hasattr(Metadata, "abc")


@pytest.mark.parametrize("path", ["/etc/passwd", "../step-1/__0_0.distcp", "other"])
def test_an_index_names_only_files_of_its_checkpoint(checkpoint: Path, path: str) -> None:
    def change(metadata: Metadata) -> object:
        next(iter(metadata.storage_data.values())).relative_path = path
        return metadata

    index_with(checkpoint, change)
    assert f"points to {path!r}, which is no file" in message_of(load_checkpoint, checkpoint, TinyRun().state)


@pytest.mark.parametrize("entry", ["app.train_state.step", "app.dataloader", "rng inside"])
def test_an_entry_that_would_run_something_is_refused(checkpoint: Path, trap: Path, entry: str) -> None:
    with_entry(checkpoint, trap, entry)
    said = message_of(load_checkpoint, checkpoint, TinyRun().state)
    assert "plain" in said
    assert "was run" in said
    assert "\n" not in said
    assert not trap.exists()


def with_entry(checkpoint: Path, trap: Path, entry: str) -> None:
    """Append a malicious value to a file, let the index point to it, and sign all."""
    stream = io.BytesIO()
    torch.save(Touch(trap), stream)
    value = stream.getvalue()
    if entry == "rng inside":
        # bytes that are plain, and are unpacked a second time
        entry, stream = "app.train_state.rng", io.BytesIO()
        torch.save(value, stream)
        value = stream.getvalue()

    def change(metadata: Metadata) -> object:
        place = next(place for index, place in metadata.storage_data.items() if index.fqn == entry)
        file = checkpoint / place.relative_path
        place.offset, place.length = file.stat().st_size, len(value)
        file.write_bytes(file.read_bytes() + value)
        return metadata

    index_with(checkpoint, change)


def load_malicious(folder: Path, trap: Path, entry: str) -> str:
    run = TinyRun().train(1)
    with run.saver(folder) as saver:
        path = saver.save(1)
        saver.wait()
    if not torch.distributed.get_rank():
        with_entry(path, trap, entry)
    torch.distributed.barrier()
    return message_of(load_checkpoint, path, run.state)


def test_it_is_refused_on_all_ranks(two: Pool, tmp_path: Path, trap: Path) -> None:
    first, second = two.run(load_malicious, tmp_path / "checkpoints", trap, "rng inside")
    assert first == second
    assert "nothing of them was run" in first
    assert not trap.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../x": {"size": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"size": 1, "sha256": "0"}}},
        {"files": {}},
        {"files": []},
        {"step": "1"},
        {"step": True},
        {"routing": {"0.weight": {"on": "sgd", "shape": [1]}}},
        {"routing": {"0.weight": {"on": "muon", "shape": "all"}}},
        {"format": 2},
        {"more": 1},
    ],
    ids=json.dumps,
)
def test_a_manifest_of_other_entries_is_refused(checkpoint: Path, change: dict[str, Any]) -> None:
    content = json.loads((checkpoint / manifests.FILE).read_text())
    del content["checksum"]
    content.update(change)
    content["checksum"] = manifests._checksum(content)
    (checkpoint / manifests.FILE).write_text(json.dumps(content))
    problem = find_problem(checkpoint, hashes=True)
    assert problem is not None and problem.startswith("manifest.json ")


def test_a_manifest_that_is_a_bomb_is_refused(checkpoint: Path) -> None:
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 100_000,
        "",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
    ):
        (checkpoint / manifests.FILE).write_text(text, encoding="latin1")
        assert (find_problem(checkpoint, hashes=True) or "").startswith("manifest.json is not a manifest")


@pytest.mark.parametrize("tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path"])
def test_a_config_runs_nothing(tiny: Tiny, trap: Path, tag: str) -> None:
    path = tiny()
    text = path.read_text(encoding="utf-8")
    for there in ("optim: {{lr: {0}}}\n", "model: {{config: {{x: {0}}}}}\n", "{0}\n"):
        path.write_text(there.format(f"{tag} [{str(trap)!r}]"), encoding="utf-8")
        with pytest.raises(UserError, match="is not YAML"):
            load_config(path)
        path.write_text(text, encoding="utf-8")
        for flag in ("--optim.lr", "--model.config", "--data.source"):
            try:
                load_config(path, f"{flag}={tag} [{trap}]")
            except UserError:
                continue
    assert not trap.exists()


def test_a_config_imports_nothing_and_makes_no_objects(
    tiny: Tiny, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_of_a_config.py").write_text(f"open({str(trap)!r}, 'w')\nclass Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    value = {"class_path": "module_of_a_config.Thing", "init_args": {}}
    config = load_config(tiny(model__init=value), f"--model.config.more={json.dumps(value)}")
    assert config.model.config["init"] == config.model.config["more"] == value
    assert not trap.exists()


def test_the_resolved_config_of_a_run_runs_nothing(tiny: Tiny, trap: Path) -> None:
    path = tiny(train__steps=2, checkpoint__every=1)
    summary = train(load_config(path))
    saved = Path(summary.run_dir) / "config.yaml"
    saved.write_text(f"optim: !!python/object/apply:pathlib.Path.touch [{str(trap)!r}]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        train(load_config(path), resume="auto")
    assert not trap.exists()
