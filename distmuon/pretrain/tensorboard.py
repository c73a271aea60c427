"""The metrics as TensorBoard events, by ``log.tensorboard``."""

from __future__ import annotations

import pathlib
from types import TracebackType

from distmuon.pretrain.errors import UserError
from distmuon.pretrain.metrics import Record


class TensorBoard:
    """Writes records as scalars under their names.

    Args:
        folder: Where the event files go.
        after_step: Events past this step, of an earlier attempt, are hidden.

    Raises:
        UserError: If the tensorboard package is not installed.
    """

    def __init__(self, folder: pathlib.Path, after_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "log.tensorboard is true, and the tensorboard package is not installed: pip install tensorboard, or "
                "set it to false (metrics.jsonl has the same numbers)."
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1)

    def write(self, record: Record) -> None:
        """Write each number of a record but its step."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
