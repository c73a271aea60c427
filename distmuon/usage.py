"""What subcommands have in common: how they tell of a mistake on their command line, and how they are started."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn


class UsageError(ValueError):
    """A mistake on the command line, told in one sentence."""


class Parser(argparse.ArgumentParser):
    """Raises :class:`UsageError` where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        """See :meth:`argparse.ArgumentParser.error`."""
        raise UsageError(f"{message} (see {self.prog} --help).")


def in_launch() -> bool:
    """Whether a launcher started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def ranks_to_start(number: int | None) -> int:
    """What ``--ranks`` asks for; 1 where it was not given.

    Raises:
        UsageError: for less than one, and where a launcher has started the processes already.
    """
    if number is None:
        return 1
    if number < 1:
        raise UsageError(f"--ranks is {number}, and it counts processes: give 1 or more.")
    if in_launch():
        raise UsageError(f"--ranks {number} starts processes, and torchrun has started them already: drop it.")
    return number
