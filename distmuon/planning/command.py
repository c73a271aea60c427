"""The ``plan`` command: read the options, predict, print tables, JSON and a picture."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from distmuon.planning.states import InfeasibleError
from distmuon.usage import Parser, UsageError

DESCRIPTION = """\
Show a step of the optimizer before the GPUs are rented: who owns which matrices, how long it takes, what bounds it, and
what would be better. Nothing is trained: models are built without weights, and time is simulated.

  distmuon plan --model llama-3-8b --nodes 32 --parallel hsdp --device h100
  distmuon plan --model configs/llama_8b.yaml --nodes 4 --cost-table h100.json --plot step.png
  distmuon plan --model deepseek-v3 --nodes 32 --expert-parallel 8 --compare --json -

Exit code: 0 a plan was made, 1 it does not fit the memory or cannot be written, 2 bad usage."""

_DTYPES = ("bfloat16", "float32")
_ENGINES = ("auto", "standard", "composed", "gram", "rational")


def run_command(arguments: Sequence[str]) -> int:
    """Run ``plan`` with a command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit code: 0 if a plan was made, 1 if it does not fit or a file cannot be written, 2 for bad usage.
    """
    try:
        known = _parse(arguments)
        try:
            from distmuon.planning.run import run
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("distmuon"):
                raise
            raise ModuleNotFoundError(
                f"distmuon plan needs the package {error.name}: pip install 'distmuon[plan]'", name=error.name
            ) from error
        run(known)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except InfeasibleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read has seen enough
        return 1
    except OSError as error:
        print(
            f"error: {error.filename or 'the output'} cannot be written ({error.strerror}): name another file.",
            file=sys.stderr,
        )
        return 1
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="distmuon plan",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|FILE", help="a built-in model, a trainer config or a transformers one")
    add("--nodes", type=int, default=1, metavar="N", help="machines (1)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="ranks of each machine (8)")
    add(
        "--parallel", default="fsdp", metavar="LAYOUT", help="fsdp, hsdp (shards in a node, replicas over nodes) or ddp"
    )
    add("--expert-parallel", type=int, default=1, metavar="N", help="ranks that share the experts of a layer (1)")
    add("--device", metavar="NAME", help="a100, b200, cpu, h100 or h200; else that of the cost table, else h100")
    add("--cost-table", metavar="FILE", help="of distmuon calibrate; else a built-in one")
    add("--tflops", type=float, metavar="X", help="what products reach, 1e12 FLOP/s")
    add("--local-gb-s", type=float, metavar="X", help="GB/s of a rank inside a node")
    add("--remote-gb-s", type=float, metavar="X", help="GB/s of a rank between nodes")
    add("--memory-gib", type=float, metavar="X", help="memory of a rank")
    add("--bucket-mib", type=float, default=64.0, metavar="X", help="bucket_bytes of distmuon.Muon, in MiB (64)")
    add("--engine", choices=_ENGINES, metavar="NAME", help=f"{', '.join(_ENGINES)}; else of the config, else auto")
    add("--dtype", choices=_DTYPES, help="of the iteration and of what travels; else of the config, else bfloat16")
    add("--matrices", choices=("auto", "heads"), metavar="WORD", help="as of distmuon.Muon: auto or heads; else whole")
    add("--no-teams", action="store_true", help="whole matrices have single owners")
    add("--tokens-per-gpu", type=int, default=8192, metavar="N", help="tokens of a training step for each rank (8192)")
    add("--no-advice", action="store_true", help="try no other layouts and bucket sizes")
    add("--compare", action="store_true", help="a table over layouts and 1, 2, 4, ... nodes instead")
    add("--json", metavar="FILE|-", help="write everything as JSON; -: instead of the tables")
    add("--plot", metavar="FILE.png", help="draw the step, the loads and the scaling")
    known = parser.parse_args(list(arguments))
    if not 0 < known.bucket_mib < float("inf"):
        raise UsageError(f"--bucket-mib is {known.bucket_mib:g}, and it must be above 0: 64 is the default.")
    if known.tokens_per_gpu < 1:
        raise UsageError(f"--tokens-per-gpu is {known.tokens_per_gpu}, and it counts: give 1 or more.")
    for option, name in (("json", known.json), ("plot", known.plot)):
        # minutes of simulation are not to end in a file that cannot be
        if name not in (None, "-") and not pathlib.Path(name).absolute().parent.is_dir():
            raise UsageError(f"--{option} {name} cannot be written, as there is no such folder: name another file.")
        if name not in (None, "-") and pathlib.Path(name).is_dir():
            raise UsageError(f"--{option} {name} is a folder: name a file in it.")
    if known.plot and pathlib.Path(known.plot).suffix.lower() not in ("", ".png"):
        raise UsageError(f"--plot {known.plot} names no PNG, and only these are drawn: let it end in .png.")
    if known.compare and known.plot:
        raise UsageError("--plot draws one plan, and --compare makes many: drop one of them.")
    return known
