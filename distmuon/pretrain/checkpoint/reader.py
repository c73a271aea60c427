"""What ``torch.distributed.checkpoint`` calls to load: a reader and a planner that unpickle no objects."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from distmuon.pretrain.checkpoint.metadata import BrokenCheckpoint


class Reader(FileSystemReader):
    """Reads the files of a checkpoint whose index was read before.

    Args:
        path: The ``step-N`` folder.
        metadata: From `read_metadata`.
    """

    def __init__(self, path: pathlib.Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    # without a parameter called kwargs DCP does not look for an index of each rank
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The index that was given."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


class Planner(DefaultLoadPlanner):
    """Loads values that are no tensors with ``weights_only``: numbers, texts, bytes, lists, dicts and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a value, and put it where the state to be filled has one.

        Raises:
            BrokenCheckpoint: If it holds other objects, none of which are made.
        """
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises all kinds for bytes that are no pickle
            raise BrokenCheckpoint(
                f"the entry {name} is not made of plain values ({type(error).__name__}), and nothing of it was run"
            ) from error
        *path, last = self.mappings[name]
        target: Any = self.original_state_dict
        for key in path:
            target = target[key]
        target[last] = loaded
