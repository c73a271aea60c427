"""The index of a checkpoint, ``.metadata``, read without running what a pickle may ask for.

``torch.distributed.checkpoint`` writes it with pickle. Here its classes become plain records that this file makes
anew for each reading, so that nothing a pickle does to a class outlives it, and what comes out is checked before
DCP's own classes are made of it.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

FILE = ".metadata"

_RECORDS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    )
} | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
# plain values in the place of what makes them
_VALUES: dict[tuple[str, str], type] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
}


class BrokenCheckpoint(ValueError):  # noqa: N818 - what it is, not what raised it
    """A checkpoint that is not what was written; the message says what about it, without its name."""


@dataclass
class Location:
    """Where the bytes of a value are, with the names that DCP's reader asks for.

    Attributes:
        relative_path: Name of a file of the checkpoint.
        offset: Bytes before it.
        length: Bytes of it.
        transform_descriptors: DCP's for compressed streams, of which there are none.
    """

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def read_metadata(folder: pathlib.Path, files: Collection[str]) -> Metadata:
    """Read the index of a checkpoint.

    Args:
        folder: The ``step-N`` folder.
        files: Names of its files, the only ones that may be read later.

    Raises:
        BrokenCheckpoint: If it cannot be read, asks for anything but the classes of an index, or is none.
    """
    try:
        found = _Unpickler(io.BytesIO((folder / FILE).read_bytes())).load()
        return _metadata(found, files)
    except BrokenCheckpoint as error:
        raise BrokenCheckpoint(f"{FILE} {error}") from error
    except OSError as error:
        raise BrokenCheckpoint(f"{FILE} cannot be read ({error.strerror})") from error
    except Exception as error:  # a pickle that is none fails in every way there is
        raise BrokenCheckpoint(f"{FILE} is not the index of a checkpoint ({type(error).__name__})") from error


class _Record:
    """The attributes of an object; a new subclass of each reading stands for each class."""

    def __init__(self, *values: object) -> None:
        if values:
            raise BrokenCheckpoint("makes an object of its index with arguments")

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows the classes of an index and dtypes, and refuses all other names."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._made = {key: type(key[1], (_Record,), {}) for key in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in self._made:
            return self._made[key]
        if key in _VALUES:
            return _VALUES[key]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise BrokenCheckpoint(f"asks for {module}.{name}, which no index of a checkpoint holds, and nothing was run")

    def persistent_load(self, pid: Any) -> Any:
        raise BrokenCheckpoint("asks for an object outside of it")


def _metadata(found: object, files: Collection[str]) -> Metadata:
    fields = _fields(found, "Metadata")
    entries = _typed(fields.get("state_dict_metadata"), dict)
    places = _typed(fields.get("storage_data"), dict)
    return Metadata(
        state_dict_metadata={_typed(name, str): _entry(entry) for name, entry in entries.items()},
        storage_data={_index(index): _location(place, files) for index, place in places.items()},
    )


def _entry(found: object) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(found).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(found, "TensorStorageMetadata")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in _typed(fields.get("chunks"), list)]
    size = _size(fields.get("size"))
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_dtype(fields.get("properties"))),
        size=size,
        chunks=[_chunk(_size(chunk.get("offsets")), _size(chunk.get("sizes")), size) for chunk in chunks],
    )


def _chunk(offsets: torch.Size, sizes: torch.Size, whole: torch.Size) -> ChunkStorageMetadata:
    if not len(offsets) == len(sizes) == len(whole):
        raise BrokenCheckpoint("has a part of a tensor with another number of dimensions")
    if any(start + length > end for start, length, end in zip(offsets, sizes, whole, strict=True)):
        raise BrokenCheckpoint("has a part of a tensor that goes past its end")
    return ChunkStorageMetadata(offsets=offsets, sizes=sizes)


def _dtype(found: object) -> torch.dtype:
    if type(found).__name__ != "TensorProperties" or not isinstance(found, _Record):
        raise BrokenCheckpoint(f"has {_kind(found)} where the properties of a tensor belong")
    # dtype, layout, requires_grad, memory format, pinned
    state = _typed(getattr(found, "state", None), tuple)
    if len(state) != 5 or not isinstance(state[0], torch.dtype) or state[1] != "torch.strided":
        raise BrokenCheckpoint("has a tensor of an unknown dtype or layout")
    return state[0]


def _index(found: object) -> MetadataIndex:
    fields = _fields(found, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _typed(fields.get("fqn"), str),
        None if offset is None else _size(offset),
        None if index is None else _number(index),
    )


def _location(found: object, files: Collection[str]) -> Location:
    fields = _fields(found, "_StorageInfo")
    name = _typed(fields.get("relative_path"), str)
    if name not in files:
        raise BrokenCheckpoint(f"points to {name!r}, which is no file of this checkpoint")
    if fields.get("transform_descriptors"):
        raise BrokenCheckpoint("has compressed values, which are not read here")
    return Location(name, _number(fields.get("offset")), _number(fields.get("length")))


def _fields(found: object, kind: str) -> dict[str, Any]:
    if not isinstance(found, _Record) or type(found).__name__ != kind:
        raise BrokenCheckpoint(f"has {_kind(found)} where {kind} belongs")
    return _typed(getattr(found, "state", {}), dict)


def _size(found: object) -> torch.Size:
    return torch.Size([_number(value) for value in _typed(found, tuple)])


def _number(found: object) -> int:
    if type(found) is not int or not 0 <= found < 2**62:
        raise BrokenCheckpoint(f"has {_kind(found)} where a size or a place belongs")
    return found


def _typed(found: Any, kind: type) -> Any:
    if type(found) is not kind:
        raise BrokenCheckpoint(f"has {_kind(found)} where {kind.__name__} belongs")
    return found


def _kind(found: object) -> str:
    return "nothing" if found is None else f"{type(found).__name__}"
