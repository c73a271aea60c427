"""How subcommands tell of a mistake on their command line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UsageError(ValueError):
    """A mistake on the command line, told in one sentence."""


class Parser(argparse.ArgumentParser):
    """Raises :class:`UsageError` where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        """See :meth:`argparse.ArgumentParser.error`."""
        raise UsageError(f"{message} (see {self.prog} --help).")
