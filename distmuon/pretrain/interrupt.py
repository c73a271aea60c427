"""Ctrl-C and SIGTERM end a run at a step boundary instead of in the middle of one."""

from __future__ import annotations

import pathlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):  # noqa: N818 - not an error
    """A run that was asked to stop and did.

    Attributes:
        signum: The signal.
        step: Steps that are done.
        checkpoint: Where the state was saved; None with checkpoints switched off.
    """

    def __init__(self, signum: int, step: int, checkpoint: pathlib.Path | None) -> None:
        self.signum, self.step, self.checkpoint = signum, step, checkpoint
        saved = f"saved as {checkpoint}" if checkpoint else "nothing is saved, as checkpoint.every is 0"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {saved}")


class InterruptGuard:
    """Notes SIGINT and SIGTERM inside a ``with`` block; a second one acts at once.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        received: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()
