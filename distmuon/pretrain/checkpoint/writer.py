"""The writer that ``torch.distributed.checkpoint`` calls: files, their checksums, the manifest, and the rename."""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from distmuon.pretrain.checkpoint.manifest import FileRecord, Manifest, record, sync, write_manifest
from distmuon.pretrain.checkpoint.metadata import FILE as INDEX
from distmuon.pretrain.checkpoint.store import Writing, prune


@dataclass(frozen=True)
class _Files(WriteResult):
    """What a rank wrote, which goes to the coordinator with DCP's own results."""

    files: dict[str, FileRecord]


class Writer(FileSystemWriter):
    """Writes a checkpoint into a temporary folder and commits it.

    DCP calls `write_data` on every rank, and `finish` on the coordinator once all have written; what either raises
    reaches all ranks.

    Args:
        path: The temporary folder.
        final: The name that it gets.
        manifest: What it says, but for the files.
        writing: On the coordinator the folder's lock, else None.
        keep: Newest checkpoints that stay once this one is committed.
    """

    def __init__(
        self, path: pathlib.Path, final: pathlib.Path, manifest: Manifest, writing: Writing | None, keep: int
    ) -> None:
        # DCP would ask the disk for what is still in Python's buffer; `sync` comes after the file is closed
        super().__init__(path, sync_files=False)
        self._folder, self._final, self._manifest = path, final, manifest
        self._writing, self._keep = writing, keep

    def storage_meta(self) -> StorageMeta:
        """The name of the checkpoint and not of the temporary folder."""
        return StorageMeta(checkpoint_id=self._final.name, save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files down to the disk, and read back their checksums."""
        results = super().write_data(plan, planner).wait()
        files = {}
        for path in sorted(self._folder.glob(f"__{self.rank}_*")):
            sync(path)
            files[path.name] = record(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result([*results, _Files(MetadataIndex("files"), 0, None, files)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index and the manifest, rename the folder, and let old checkpoints go."""
        super().finish(metadata, [[result for result in of if not isinstance(result, _Files)] for of in results])
        sync(self._folder / INDEX)
        files = {INDEX: record(self._folder / INDEX)}
        for result in (result for of in results for result in of):
            if isinstance(result, _Files):
                files.update(result.files)
        write_manifest(self._folder, dataclasses.replace(self._manifest, files=files))
        if self._writing is None:
            raise AssertionError("DCP's coordinator is rank 0, which holds the lock")
        self._writing.commit(self._final)
        prune(self._final.parent, self._keep)
