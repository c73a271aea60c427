"""The ``tokenize`` command: text to shards of tokens."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser

from distmuon.pretrain.data import DataConfig, tokenize_to_shards
from distmuon.pretrain.errors import UserError

DESCRIPTION = "Tokenize text once; data.source of a pretraining config can name the folder afterwards."

# these matter when shards are read, not when they are written
_NOT_WRITTEN = {"sequence_length", "cache_dir", "seed"}


def run_command(arguments: Sequence[str], prog: str = "distmuon tokenize") -> int:
    """Tokenize as a command line says.

    Args:
        arguments: Without the program's name.
        prog: Name of the program in the help text.

    Returns:
        The exit code: 0, or 1 for a user's error.
    """
    try:
        parsed = _parser(prog).parse_args(list(arguments))
        names = [field.name for field in dataclasses.fields(DataConfig) if field.name not in _NOT_WRITTEN]
        settings = {name: getattr(parsed, name) for name in names}
        shards = tokenize_to_shards(DataConfig(**settings), parsed.out_dir, shard_tokens=parsed.shard_tokens)
    except (UserError, ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"wrote {len(shards)} shards to {parsed.out_dir}; train on them with --data.source {parsed.out_dir}")
    return 0


def _parser(prog: str) -> ArgumentParser:
    usage = f"{prog} OUT_DIR [--source PATH] [options]"
    parser = ArgumentParser(prog=prog, usage=usage, description=DESCRIPTION, exit_on_error=False)
    parser.add_argument("out_dir", type=str, help="empty folder for the shards")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in one shard (default: 100M)")
    parser.add_class_arguments(DataConfig, as_group=False, skip=_NOT_WRITTEN)
    return parser
