"""The manifest of a checkpoint: what was written, by size and checksum, and by whom."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import stat
from dataclasses import dataclass, field
from typing import Any

from distmuon.pretrain.checkpoint.metadata import FILE as INDEX
from distmuon.pretrain.checkpoint.metadata import BrokenCheckpoint

FILE = "manifest.json"
FORMAT = 1

_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written.

    Attributes:
        size: Bytes.
        sha256: Of its bytes, in hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: Steps that were done.
        world_size: Ranks of the run that wrote it.
        layout: Their arrangement, in words.
        torch: Version of torch.
        distmuon: Version of this package.
        routing: `distmuon.checkpoint.routing_table` of the optimizer.
        files: All other files of the folder by name.
    """

    step: int
    world_size: int
    layout: str
    torch: str
    distmuon: str
    routing: dict[str, dict[str, Any]]
    files: dict[str, FileRecord] = field(default_factory=dict)


def record(path: pathlib.Path) -> FileRecord:
    """Size and checksum of a file.

    Raises:
        OSError: If it cannot be read.
    """
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
            digest.update(block)
    return FileRecord(size, digest.hexdigest())


def sync(path: pathlib.Path) -> None:
    """Bring a file, or the names in a folder, to the disk, so that they survive a power cut; where the system can.

    Raises:
        OSError: If the disk refuses it.
    """
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Write it into a folder, down to the disk."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    path = folder / FILE
    path.write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1), encoding="utf-8")
    sync(path)


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Read the manifest of a ``step-N`` folder.

    Raises:
        BrokenCheckpoint: If there is none, or not the one that was written.
    """
    try:
        if not stat.S_ISREG((folder / FILE).stat().st_mode):
            raise BrokenCheckpoint(f"{FILE} is not a file")
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
        if content["format"] != FORMAT:
            raise BrokenCheckpoint(f"{FILE} has format {content['format']!r}, and this version reads {FORMAT}")
        if checksum != _checksum(content):
            raise BrokenCheckpoint(f"{FILE} has another checksum than it was written with")
        del content["format"]
        return _checked(content)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{FILE} is missing") from error
    except OSError as error:
        raise BrokenCheckpoint(f"{FILE} cannot be read ({error.strerror})") from error
    except BrokenCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpoint(f"{FILE} is not a manifest ({type(error).__name__})") from error


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checked(content: dict[str, Any]) -> Manifest:
    """A manifest of the right types; a checksum that fits says who wrote it by mistake, not who did on purpose."""
    manifest = Manifest(**{**content, "files": {name: FileRecord(**file) for name, file in content["files"].items()}})
    numbers = [manifest.step, manifest.world_size, *(file.size for file in manifest.files.values())]
    texts = [manifest.layout, manifest.torch, manifest.distmuon, *(file.sha256 for file in manifest.files.values())]
    right = all(type(number) is int and number >= 0 for number in numbers) and all(type(x) is str for x in texts)
    plain = all(name not in ("", ".", "..") and not set(name) & set("/\\\0") for name in manifest.files)
    if not right or not plain or INDEX not in manifest.files or not _is_routing(manifest.routing):
        raise BrokenCheckpoint(f"{FILE} has entries of other types than a manifest")
    return manifest


def _is_routing(table: Any) -> bool:
    return type(table) is dict and all(
        type(entry) is dict
        and set(entry) == {"on", "shape"}
        and entry["on"] in ("muon", "adamw")
        and type(entry["shape"]) is list
        and all(type(size) is int for size in entry["shape"])
        for entry in table.values()
    )
