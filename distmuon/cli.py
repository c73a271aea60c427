"""The ``distmuon`` command; each subcommand imports what it needs when it is called."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

from distmuon._version import __version__


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        run: Takes the arguments after the subcommand's name and returns the exit code.
        help: One line for ``distmuon --help``.
    """

    run: Callable[[Sequence[str]], int]
    help: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: Without the program's name; None: those of the process.

    Returns:
        The exit code; 1 after a user's error, 2 for a command line that names no subcommand.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not given:
        parser.print_help(sys.stderr)
        return 2
    # only the first word is looked at: all others belong to the subcommand
    name = parser.parse_args(given[:1]).command
    try:
        return COMMANDS[name].run(given[1:])
    except ModuleNotFoundError as error:
        # distmuon.pretrain says itself what it misses, and a bug of our own shows its traceback
        if "pip install" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _pretrain(arguments: Sequence[str]) -> int:
    from distmuon.pretrain.command import run_command
    from distmuon.pretrain.processes import leave

    return leave(run_command(arguments))


def _tokenize(arguments: Sequence[str]) -> int:
    from distmuon.pretrain.tokenize_command import run_command

    return run_command(arguments)


def _export(arguments: Sequence[str]) -> int:
    from distmuon.pretrain.export_command import run_command

    return run_command(arguments)


def _check(arguments: Sequence[str]) -> int:
    from distmuon.checking.command import run_command

    return run_command(arguments)


def _calibrate(arguments: Sequence[str]) -> int:
    from distmuon.calibrating.command import run_command

    return run_command(arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from distmuon.diagnosing.command import leave, run_command

    return leave(run_command(arguments))


def _plan(arguments: Sequence[str]) -> int:
    from distmuon.planning.command import run_command

    return run_command(arguments)


COMMANDS = {
    "calibrate": Command(_calibrate, "measure how fast the engines are on this machine"),
    "check": Command(_check, "prove that the sharded update of your model is the single-device one"),
    "doctor": Command(_doctor, "check machines, ranks and links before a job, and say what to do"),
    "export": Command(_export, "write the model of a run for transformers, as safetensors"),
    "plan": Command(_plan, "predict the step on a cluster: owners, time, memory, and what would be better"),
    "pretrain": Command(_pretrain, "pretrain a language model from a YAML file"),
    "tokenize": Command(_tokenize, "turn text into shards of tokens, once for many runs"),
}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="distmuon",
        description="The Muon optimizer for whole models.",
        epilog=f"commands:\n{listing}\n\ndistmuon COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distmuon {__version__}")
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND", help="what to do")
    return parser


if __name__ == "__main__":
    sys.exit(main())
