"""The .bin format: round trips, both widths, and every way a file can be damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmuon.pretrain.data import TokenStream, read_shard, write_shard
from distmuon.pretrain.data.shards import HEADER_BYTES, MAGIC_UINT16, MAGIC_UINT32
from distmuon.pretrain.errors import UserError


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(0, (1 << 32) - 1), max_size=50), wide=st.booleans())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tokens: list[int], wide: bool) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    ids = np.asarray(tokens, dtype=np.int64)
    found = read_shard(write_shard(path, ids.astype(np.uint32) if wide else ids))
    assert found.tolist() == tokens
    narrow = not wide and max(tokens, default=0) < 1 << 16
    assert found.dtype == (np.uint16 if narrow else np.uint32)
    assert path.stat().st_size == HEADER_BYTES + len(tokens) * found.itemsize
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


@pytest.mark.parametrize(("dtype", "magic", "version"), [(np.uint16, MAGIC_UINT16, 1), (np.uint32, MAGIC_UINT32, 7)])
def test_bytes_are_those_of_llm_c(tmp_path: Path, dtype: type, magic: int, version: int) -> None:
    ids = np.arange(5, dtype=dtype)
    path = write_shard(tmp_path / "x.bin", ids)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, 5
    assert path.read_bytes() == header.tobytes() + ids.tobytes()
    assert isinstance(read_shard(path), np.memmap)


def _damage(path: Path, word: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[4 * word : 4 * word + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(bytes(data))


def test_damaged_files_are_named_with_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    fresh = write_shard(path, np.arange(10, dtype=np.uint16)).read_bytes()

    path.write_bytes(fresh[:-3])
    with pytest.raises(UserError, match=r"x\.bin has 1041 bytes.*10 tokens of 2 bytes.*1044"):
        read_shard(path)
    path.write_bytes(fresh[:100])
    with pytest.raises(UserError, match=r"x\.bin has 100 bytes.*1024"):
        read_shard(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.bin has 0 bytes"):
        read_shard(path)
    for word, value, message in ((0, 7, "starts with 7.*20240520"), (1, 9, "version 9.*version 1"), (2, -4, "-4")):
        path.write_bytes(fresh)
        _damage(path, word, value)
        with pytest.raises(UserError, match=message):
            read_shard(path)
    path.write_bytes(fresh)
    _damage(path, 2, 11)
    with pytest.raises(UserError, match=r"11 tokens"):
        read_shard(path)
    with pytest.raises(UserError, match=r"missing\.bin cannot be read"):
        read_shard(tmp_path / "missing.bin")


def test_write_refuses_what_is_no_token_array(tmp_path: Path) -> None:
    for bad in (np.zeros((2, 2), np.uint16), np.array([-1]), np.array([1 << 32])):
        with pytest.raises(ValueError):
            write_shard(tmp_path / "x.bin", bad)
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), max_size=5), data=st.data())
def test_stream_of_parts_is_one_sequence(sizes: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    stream = TokenStream(np.split(whole, np.cumsum(sizes)[:-1]) if sizes else [])
    stop = data.draw(st.integers(0, len(whole)))
    start = data.draw(st.integers(0, stop))
    assert len(stream) == len(whole)
    assert stream.slice(start, stop).tolist() == whole[start:stop].tolist()
    assert stream.head(stop).slice(0, stop).tolist() == whole[:stop].tolist()
    assert stream.largest == len(whole) - 1
    with pytest.raises(IndexError):
        stream.slice(0, len(whole) + 1)
