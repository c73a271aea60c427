"""From every kind of source to a corpus, and every mistake on the way."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distmuon.pretrain.data import (
    Corpus,
    DataConfig,
    check_vocabulary,
    open_corpus,
    read_shard,
    tokenize_to_shards,
    write_shard,
)
from distmuon.pretrain.data.split import split_documents
from distmuon.pretrain.errors import UserError

TEXTS = [f"document {i} " + "äx" * (i % 7) for i in range(60)]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": str(tmp_path / "cache"), "sequence_length": 8}


def documents(corpus: Corpus) -> tuple[list[str], list[str]]:
    """The texts of the two splits, which a separator begins each."""
    result = []
    for stream in (corpus.train, corpus.val):
        ids = stream.slice(0, len(stream))
        assert ids[0] == 256
        pieces = np.split(ids, np.flatnonzero(ids == 256))[1:]
        result.append([bytes(p[1:].astype(np.uint8)).decode() for p in pieces])
    return result[0], result[1]


def check_texts(corpus: Corpus, texts: list[str] = TEXTS) -> None:
    train, val = documents(corpus)
    assert sorted(train + val) == sorted(texts)
    assert train and val
    assert corpus.vocab_size == 257 and corpus.tokenizer is not None
    text_bytes = sum(len(text.encode()) for text in val)
    assert corpus.val_bytes_per_token == pytest.approx(text_bytes / len(corpus.val))


def write_folder(folder: Path) -> Path:
    for i, text in enumerate(TEXTS):
        path = folder / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / ".hidden").write_text("hidden")
    (folder / "latin.txt").write_bytes(b"\xff\xfe bad")
    (folder / "picture.png").write_bytes(b"a\0b")
    return folder


def test_builtin_is_split_by_file(settings: dict[str, Any]) -> None:
    corpus = open_corpus(DataConfig(max_megabytes=0.4, **settings))
    train, val = documents(corpus)
    assert not set(train) & set(val)
    assert len(corpus.train) + len(corpus.val) == 400_000 + len(train) + len(val)
    assert 0.02 < len(corpus.val) / 400_000 < 0.15
    assert "standard library" in corpus.description and "bytes" in corpus.description
    check_vocabulary(corpus, 257)
    with pytest.raises(UserError, match=r"token id 256"):
        check_vocabulary(corpus, 256)


def test_the_second_opening_reads_the_cache(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(max_megabytes=0.1, **settings)
    first = open_corpus(config)
    monkeypatch.setattr("distmuon.pretrain.data.cache.tokenize_to_shards", None)
    second = open_corpus(DataConfig(max_megabytes=0.1, seed=5, **{**settings, "sequence_length": 9}))
    assert documents(first) == documents(second)
    assert first.description == second.description
    assert len(os.listdir(settings["cache_dir"])) == 1


def test_two_processes_may_build_the_same_cache(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from distmuon.pretrain.data import cache

    config = DataConfig(max_megabytes=0.1, **settings)

    def slower(config: DataConfig, folder: Path) -> None:
        tokenize_to_shards(config, folder)
        monkeypatch.setattr(cache, "tokenize_to_shards", tokenize_to_shards)
        open_corpus(config)  # the other process finishes first

    monkeypatch.setattr(cache, "tokenize_to_shards", slower)
    open_corpus(config)
    assert len(os.listdir(settings["cache_dir"])) == 1


def test_text_folder(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "texts")
    corpus = open_corpus(DataConfig(source=str(folder), **settings))
    check_texts(corpus)
    pattern = str(folder / "**" / "*.txt")
    assert documents(open_corpus(DataConfig(source=pattern, **settings))) == documents(corpus)


def test_a_changed_file_is_tokenized_anew(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "texts")
    config = DataConfig(source=str(folder), **settings)
    open_corpus(config)
    (folder / "0" / "0.txt").write_text("another text", encoding="utf-8")
    check_texts(open_corpus(config), ["another text", *TEXTS[1:]])


def test_a_single_file_gives_its_end_to_validation(tmp_path: Path, settings: dict[str, Any]) -> None:
    text = "".join(TEXTS)
    (tmp_path / "all.txt").write_text(text, encoding="utf-8")
    train, val = documents(open_corpus(DataConfig(source=str(tmp_path / "all.txt"), **settings)))
    assert len(train) == len(val) == 1
    assert train[0] + val[0] == text
    assert len(val[0]) == round(0.05 * len(text))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_tables(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "README.md").write_text("about the rows")
    for number, texts in enumerate((TEXTS[:40], [*TEXTS[40:], ""])):
        path = folder / f"part{number}.{kind}"
        lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts))
        if kind == "parquet":
            import datasets

            datasets.Dataset.from_dict({"id": list(range(len(texts))), "body": texts}).to_parquet(path)
        else:
            path.write_bytes(gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode())
    check_texts(open_corpus(DataConfig(source=str(folder), text_column="body", **settings)))
    with pytest.raises(UserError, match=r"no column 'text', only 'id', 'body'"):
        open_corpus(DataConfig(source=str(folder), **settings))
    with pytest.raises(UserError, match=r"'id'.*holds a int"):
        open_corpus(DataConfig(source=str(folder), text_column="id", **settings))


def test_tokenized_shards_are_read_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    source, out = write_folder(tmp_path / "texts"), tmp_path / "shards"
    config = DataConfig(source=str(source), **settings)
    paths = tokenize_to_shards(config, out, shard_tokens=100)
    assert [len(read_shard(p)) for p in paths if "train" in p.name][:-1] == [100] * (
        sum("train" in p.name for p in paths) - 1
    )
    assert sorted(paths) == sorted(out.glob("*.bin"))
    corpus = open_corpus(DataConfig(source=str(out), **settings))
    check_texts(corpus)
    assert documents(corpus) == documents(open_corpus(config))
    with pytest.raises(UserError, match=r"already holds \.bin"):
        tokenize_to_shards(config, out)
    with pytest.raises(UserError, match=r"holds token shards"):
        tokenize_to_shards(DataConfig(source=str(out), **settings), tmp_path / "other")


def test_shards_of_others(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_shard(tmp_path / "a_000000.bin", np.arange(50, dtype=np.uint16))
    write_shard(tmp_path / "a_000001.bin", np.arange(50, 150, dtype=np.uint16))
    config = DataConfig(source=str(tmp_path), val_fraction=0.2, **settings)
    corpus = open_corpus(config)
    assert corpus.train.slice(0, len(corpus.train)).tolist() == list(range(130))
    assert corpus.val.slice(0, len(corpus.val)).tolist() == list(range(130, 150))
    assert (corpus.tokenizer, corpus.val_bytes_per_token, corpus.vocab_size) == (None, None, 150)

    write_shard(tmp_path / "a_val_000000.bin", np.arange(9, dtype=np.uint16))
    corpus = open_corpus(config)
    assert (len(corpus.train), len(corpus.val)) == (150, 9)
    limited = open_corpus(DataConfig(source=str(tmp_path / "*.bin"), max_megabytes=60e-6, **settings))
    assert (len(limited.train), len(limited.val)) == (30, 9)

    for path in tmp_path.glob("a_0*.bin"):
        path.unlink()
    with pytest.raises(UserError, match=r"only validation shards"):
        open_corpus(config)


def test_unreadable_metadata_are_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_shard(tmp_path / "a.bin", np.arange(50, dtype=np.uint16))
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(UserError, match=r"metadata\.json"):
        open_corpus(DataConfig(source=str(tmp_path), **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"val_fraction": 0.0}, "val_fraction is 0"),
        ({"val_fraction": 1.0}, "val_fraction is 1"),
        ({"max_megabytes": 0.0}, "max_megabytes is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"source": "/nothing/here"}, "'/nothing/here' names no file"),
        ({"sequence_length": 10**6}, "training data.* tokens, but data.sequence_length 1000000"),
        ({"sequence_length": 50_000}, "validation data.* tokens, but data.sequence_length 50000"),
    ],
)
def test_wrong_settings_are_explained(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_corpus(DataConfig(**{"max_megabytes": 0.2, **settings, **changes}))


def test_wrong_files_are_explained(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    config = DataConfig(source=str(folder), **settings)
    with pytest.raises(UserError, match=r"names no file"):
        open_corpus(config)
    (folder / "a.bin").write_bytes(b"")
    (folder / "a.jsonl").write_text("{not json")
    with pytest.raises(UserError, match=r"several formats \(bin, jsonl\)"):
        open_corpus(config)
    with pytest.raises(UserError, match=r"no parquet file"):
        open_corpus(DataConfig(source=str(folder), format="parquet", **settings))
    with pytest.raises(UserError, match=r"cannot be read as json"):
        open_corpus(DataConfig(source=str(folder), format="jsonl", **settings))
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"leaves no text for train"):
        open_corpus(DataConfig(source=str(tmp_path / "bad.txt"), **settings))
    with pytest.raises(UserError, match=r"shard_tokens is 0"):
        tokenize_to_shards(config, tmp_path / "out", shard_tokens=0)


class Listed(list[str]):
    description = "listed"
    files: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def test_the_share_of_validation_is_kept_for_any_sizes() -> None:
    sizes = np.random.default_rng(0).integers(1, 2000, 500)
    parts = list(split_documents(Listed(["a" * int(size) for size in sizes]), 0.1))  # type: ignore[arg-type]
    val = sum(len(text) for split, text in parts if split == "val")
    assert len(parts) == 500
    assert val / sizes.sum() == pytest.approx(0.1, abs=0.005)


def test_a_limit_cuts_the_last_document_between_characters() -> None:
    parts = list(split_documents(Listed(["ä" * 10] * 30), 0.1, 105))  # type: ignore[arg-type]
    assert sum(len(text.encode()) for _, text in parts) == 104
