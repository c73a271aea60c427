"""What a launch script is told about a run that ended before its last step: exit codes and ``interrupted.json``."""

from __future__ import annotations

import json
import pathlib
import signal

from distmuon.pretrain.files import replace_text
from distmuon.pretrain.interrupt import Interrupted

RUN_AGAIN = 75
"""Exit code after SIGTERM or SIGUSR1 with the state saved, EX_TEMPFAIL of sysexits.h: the same command goes on."""

LOST = 69
"""Exit code of a rank that lost another one, EX_UNAVAILABLE of sysexits.h: the last checkpoint stands."""

FILE = "interrupted.json"


def exit_code(stop: Interrupted) -> int:
    """The exit code of a run that a signal stopped: `RUN_AGAIN`, or 128 + signal if that is not what is wanted.

    Ctrl-C is from a person who wants the run to end; and without a checkpoint there is nothing to go on from.
    """
    if stop.checkpoint is None or stop.signum == signal.SIGINT:
        return 128 + stop.signum
    return RUN_AGAIN


def leave_note(stop: Interrupted, command: str) -> None:
    """Write ``interrupted.json`` into the run folder of a run whose state was saved.

    Under torchrun this is what tells a script that the run can go on, as torchrun has exit codes of its own.

    Args:
        stop: What ended the run.
        command: The command line that goes on.
    """
    assert stop.checkpoint is not None, "there is nothing to go on from"
    note = {
        "signal": signal.Signals(stop.signum).name,
        "step": stop.step,
        "checkpoint": str(stop.checkpoint.absolute()),
        "resume": command,
    }
    replace_text(stop.checkpoint.parent.parent / FILE, json.dumps(note, indent=2) + "\n")


def take_note(run_folder: pathlib.Path) -> None:
    """Remove ``interrupted.json`` from the folder of a run that goes on."""
    (run_folder / FILE).unlink(missing_ok=True)
