"""Signals end a run at a step boundary instead of in the middle of one."""

from __future__ import annotations

import pathlib
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, ClassVar

# Ctrl-C; what ends a job; and the warning that Slurm sends before it does (not on every system)
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if isinstance(getattr(signal, name, None), int)
)

REPEAT_S = 1.0
"""Seconds in which a further signal is taken for the same one: launchers and batch systems both send it."""


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
    """Notes SIGINT, SIGTERM and SIGUSR1 inside a ``with`` block; a second SIGINT raises KeyboardInterrupt.

    Further SIGTERMs and SIGUSR1s change nothing: the run is on its way to its end, and what wants it gone sends
    SIGKILL. Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        received: The signal that came first, or None.
        stage: Of this process: ``"before"`` the first guard, ``"inside"`` of one, or ``"after"``.
    """

    stage: ClassVar[str] = "before"

    def __init__(self) -> None:
        self.received: int | None = None
        self._noted = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._note)
            InterruptGuard.stage = "inside"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous:
            InterruptGuard.stage = "after"
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._noted = signum, now
        elif signum == signal.SIGINT and now - self._noted > REPEAT_S:
            raise KeyboardInterrupt
