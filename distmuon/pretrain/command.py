"""The ``pretrain`` command: parse, train, and turn what goes wrong into a sentence and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence

import rich
from rich.logging import RichHandler

from distmuon.pretrain.atonce import EndsAtOnce
from distmuon.pretrain.config import validate
from distmuon.pretrain.errors import AgreedError, RankLost, UserError
from distmuon.pretrain.failures import FILE, Failures
from distmuon.pretrain.interrupt import Interrupted
from distmuon.pretrain.parse import parse_command
from distmuon.pretrain.processes import agreed, process_group, rank, world_size
from distmuon.pretrain.progress import wants_bar
from distmuon.pretrain.requeue import LOST, exit_code, leave_note
from distmuon.pretrain.run import train

MESSAGES = "messages.log"
"""What a rank above 0 logs under torchrun with DISTMUON_LOG_ALL, in the folder of its stdout.log and stderr.log."""


def run_command(arguments: Sequence[str], prog: str = "distmuon pretrain") -> int:
    """Run ``pretrain`` with a command line.

    Args:
        arguments: Without the program's name.
        prog: Name of the program, for the help.

    Returns:
        The exit code: 0; 1 for a user's error; `requeue.LOST` if another rank was lost; `requeue.RUN_AGAIN` after
        SIGTERM or SIGUSR1 with the state saved; 128 + signal after Ctrl-C or with nothing saved.
    """
    with EndsAtOnce() as signals:
        try:
            _train(arguments, prog, signals)
        except (UserError, RankLost, Interrupted, KeyboardInterrupt) as error:
            # a launcher that sees the first rank end sends SIGTERM to the others
            signals.ignore()
            if "--debug" in arguments or os.environ.get("DISTMUON_DEBUG"):
                traceback.print_exc()
            return _tell(error, arguments)
        except Exception:
            if world_size() == 1:
                raise
            signals.ignore()
            # at once: torchrun takes the rank that ends first for the cause
            traceback.print_exc()
            return 1
        signals.ignore()
    return 0


def _train(arguments: Sequence[str], prog: str, signals: EndsAtOnce) -> None:
    mistake: UserError | None = None
    seconds: float | None = None
    place: pathlib.Path | None = None
    try:
        command = parse_command(arguments, prog)
        validate(command.config)
        seconds = command.config.parallel.timeout_seconds
        log = command.config.log
        place = pathlib.Path(log.dir) / f"{log.name or 'run'}.{FILE}"
    except UserError as error:
        mistake = error
    failures = Failures(place, signals.ignore)
    # inside too, as the others fail as soon as this rank leaves the group
    with _telling(failures), failures, process_group(seconds), failures:
        with agreed():
            if mistake is not None:
                raise mistake
        _set_up_logging(wants_bar(command.config.log.progress))
        train(command.config, command.resume)


@contextlib.contextmanager
def _telling(failures: Failures) -> Iterator[None]:
    """A rank that lost another one says what ended that, if it has left word."""
    try:
        yield
    except RankLost as error:
        cause = failures.elsewhere()
        if cause is None:
            raise
        raise RankLost(f"{error}\nfirst cause: {cause}; see {failures.path}") from error


def _tell(error: BaseException, arguments: Sequence[str]) -> int:
    """Say what ended the run, and give the exit code; what all ranks know is said once."""
    first = rank() == 0
    if isinstance(error, RankLost):
        print(f"error: {error}", file=sys.stderr)
        return LOST
    if isinstance(error, UserError):
        if first or not isinstance(error, AgreedError):
            print(f"error: {'' if first else f'rank {rank()}: '}{error}", file=sys.stderr)
        return 1
    if not isinstance(error, Interrupted):
        if first:
            print("stopped by a second Ctrl-C, in the middle of a step; nothing new is saved", file=sys.stderr)
        return 130
    if first:
        print(f"{error}", file=sys.stderr)
    if first and error.checkpoint is not None:
        command = _resume_command(arguments, error.checkpoint.parent.parent)
        leave_note(error, command)
        print(f"resume: {command}", file=sys.stderr)
    return exit_code(error)


def _set_up_logging(bar: bool) -> None:
    """Messages of the package: of rank 0 to the terminal above the bar, or as plain lines to stdout.

    Of the other ranks errors alone, to stderr; with DISTMUON_LOG_ALL all, beside the error file of torchrun where there
    is one, as the first rank of each machine may be on a terminal. Lines of more than one rank have time and rank.
    """
    every = bool(os.environ.get("DISTMUON_LOG_ALL")) and world_size() > 1
    handlers: list[logging.Handler]
    if rank() > 0:
        handlers = [logging.StreamHandler(sys.stderr)]
        beside = os.environ.get("TORCHELASTIC_ERROR_FILE")
        handlers[0].setLevel(logging.INFO if every and not beside else logging.ERROR)
        if every and beside:
            with contextlib.suppress(OSError):  # the run needs it not
                handlers.append(logging.FileHandler(pathlib.Path(beside).with_name(MESSAGES), encoding="utf-8"))
    elif bar:
        console = rich.get_console()
        handlers = [RichHandler(console=console, show_time=False, show_level=False, show_path=False, highlighter=None)]
    else:
        handlers = [logging.StreamHandler(sys.stdout)]
    tag = f"%(asctime)s rank {rank()}: " if every or rank() > 0 else ""
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"{tag}%(message)s"))
    logger = logging.getLogger("distmuon")
    logger.handlers[:] = handlers
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
