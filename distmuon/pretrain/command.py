"""The ``pretrain`` command: parse, train, and turn what goes wrong into a sentence and an exit code."""

from __future__ import annotations

import logging
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence

import rich
from rich.logging import RichHandler

from distmuon.pretrain.errors import AgreedError, UserError
from distmuon.pretrain.interrupt import Interrupted
from distmuon.pretrain.parse import parse_command
from distmuon.pretrain.processes import agreed, process_group, rank
from distmuon.pretrain.progress import wants_bar
from distmuon.pretrain.run import train


def run_command(arguments: Sequence[str], prog: str = "distmuon pretrain") -> int:
    """Run ``pretrain`` with a command line.

    Args:
        arguments: Without the program's name.
        prog: Name of the program, for the help.

    Returns:
        The exit code: 0, 1 for a user's error, 128 + signal for an interrupted run.
    """
    first = rank() == 0
    debug = "--debug" in arguments or bool(os.environ.get("DISTMUON_DEBUG"))
    try:
        with process_group():
            _train(arguments, prog)
    except UserError as error:
        if debug:
            traceback.print_exc()
        # what all ranks know is said once
        if first or not isinstance(error, AgreedError):
            print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        if first:
            print(f"{stop}", file=sys.stderr)
        if first and stop.checkpoint is not None:
            print(f"resume: {_resume_command(arguments, stop.checkpoint.parent.parent)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        if first:
            print(
                "stopped by SIGINT before the first step or by a second Ctrl-C; nothing new is saved", file=sys.stderr
            )
        return 130
    return 0


def _train(arguments: Sequence[str], prog: str) -> None:
    with agreed():
        command = parse_command(arguments, prog)
    _set_up_logging(wants_bar(command.config.log.progress))
    train(command.config, command.resume)


def _set_up_logging(bar: bool) -> None:
    """Messages of the package, of rank 0 alone, to the terminal above the bar, or as plain lines to stdout."""
    handler: logging.Handler
    if rank() > 0:
        handler = logging.NullHandler()
    elif bar:
        console = rich.get_console()
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False, highlighter=None)
    else:
        handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("distmuon")
    logger.handlers[:] = [handler]
    # the optimizer's own table of all parameters is in routing.txt
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logging.getLogger("distmuon.pretrain").setLevel(logging.INFO)


def _resume_command(arguments: Sequence[str], folder: pathlib.Path) -> str:
    """A command line that works from any folder and in a shell without this environment."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == "--resume":
            skip = not skip
        elif not argument.startswith("--resume="):
            kept.append(argument)
    command = ["-m", "distmuon.pretrain", *kept, "--resume", str(folder.absolute())]
    processes, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    if processes == "1":
        return shlex.join([sys.executable, *command])
    # how the machines of a larger run find each other is not known here
    how = ["--standalone", f"--nproc_per_node={here}"] if here == processes else ["..."]
    return shlex.join([sys.executable, "-m", "torch.distributed.run", *how, *command])
