"""The ``export`` command: a checkpoint to a model folder of transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distmuon.pretrain.errors import UserError
from distmuon.usage import Parser, UsageError

DESCRIPTION = """Write the model of a run as a folder for AutoModelForCausalLM.from_pretrained: config.json, safetensors
and the tokenizer. Checkpoints of any layout are read by one process on the CPU. Exit code: 0 it was written, 1 it was
not, 2 bad usage."""


def run_command(arguments: Sequence[str], prog: str = "distmuon export") -> int:
    """Export as a command line says.

    Args:
        arguments: Without the program's name.
        prog: Name of the program in the help text.

    Returns:
        The exit code: 0, 1 if nothing was written, 2 for bad usage.
    """
    from transformers.utils.logging import disable_progress_bar

    from distmuon.pretrain.export import DTYPES, describe, export

    disable_progress_bar()
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("source", metavar="RUN", help="run folder (its newest checkpoint), or a step-N folder")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: float32)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in DIR")
    try:
        parsed = parser.parse_args(list(arguments))
        exported = export(parsed.source, parsed.to, dtype=parsed.dtype, overwrite=parsed.overwrite)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(describe(exported))
    return 0
