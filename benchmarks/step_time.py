"""One optimizer step on several ranks: time, bytes and temporary memory, ours beside the others, interleaved.

    python benchmarks/step_time.py --ranks 1 2 4
    python benchmarks/step_time.py --ranks 2 --model gpt2_124m --peer-path ../dion --json step.json --png step.png
    python benchmarks/step_time.py --ranks 8 --device cuda --model llama3.2_1b

Whole processes on one machine: gloo and one thread a rank on a CPU, NCCL and a GPU a rank with ``--device cuda``.
Every matrix of the model goes to Muon (or to AdamW), with a gradient that is there before the clock starts.
Bytes are those that all ranks together send on the loopback interface in a step; "least" is what a step with
one owner a matrix must send in bfloat16. Peak memory is what a rank allocates in its first step, less its state.

Microsoft's dion (github.com/microsoft/dion) and github.com/KellerJordan/Muon take part when ``--peer-path``
names a checkout; muon-fsdp2 does when it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from step_time_contenders import MODELS, Shape, parse_settings
from step_time_ranks import Request, Row, run_rank
from step_time_report import baseline_ms, draw, make_table, notes
from timing import Timing
from torch.multiprocessing.spawn import spawn

import distmuon
from distmuon.numerics.hardware import has_native_bf16


def main() -> None:
    """Parse the command line, measure each world size and print its table."""
    args = _parse()
    request = Request(
        model=args.model,
        blocks=args.blocks,
        device=args.device,
        threads=args.threads,
        rounds=args.rounds,
        limit_s=args.limit,
        ours_settings=tuple(args.ours_settings),
        peer_paths=tuple(args.peer_path),
        compile_peers=args.compile_peers or args.device == "cuda",
        only=tuple(args.only),
        skip=tuple(args.skip),
    )
    for text in request.ours_settings:
        parse_settings(text)
    shapes = [shape for block in request.block_shapes() for shape in block]
    numel = sum(rows * cols for rows, cols in shapes)
    console = Console(highlight=False, width=max(120, Console().width))
    console.print(
        f"{args.model}: {len(shapes)} matrices, {numel / 1e6:.1f} M parameters; torch {torch.__version__}, "
        f"{args.device}, {os.cpu_count()} cores ({processor()}), native bfloat16: {has_native_bf16(args.device)}, "
        f"{args.threads} threads a rank"
    )
    if not request.compile_peers:
        console.print("torch.compile of the peers is replaced by the identity here (--compile-peers leaves it).")
    results: dict[int, list[Row]] = {}
    for ranks in args.ranks:
        began = time.time()
        results[ranks] = measure(ranks, request)
        bucket = bucket_bytes(shapes, ranks)
        console.print(make_table(results[ranks], ranks, bucket))
        console.print(f"Bucket: {bucket / 1e6:.1f} MB of bfloat16.")
        for line in notes(results[ranks]):
            console.print(line, markup=False)
        console.print(f"{time.time() - began:.0f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_document(request, shapes, results), indent=1) + "\n", encoding="utf-8")
    if args.png:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        draw(results, args.model, args.png)


def measure(ranks: int, request: Request) -> list[Row]:
    """Start ``ranks`` processes, and return what they found."""
    # Inherited by the ranks, where it must be set before torch is imported
    os.environ["OMP_NUM_THREADS"] = str(request.threads)
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, (ranks, request, folder), nprocs=ranks)
        rows = json.loads(Path(folder, "rows.json").read_text())
    return [Row(**{**row, "timing": Timing(**row["timing"]) if row["timing"] else None}) for row in rows]


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def bucket_bytes(shapes: Sequence[Shape], ranks: int) -> int:
    """Bytes in bfloat16 of the largest bucket of distmuon, the shares of all ranks together.

    At default settings and with matrices of one shape spread evenly over the ranks.
    """
    bound = inspect.signature(distmuon.Muon).parameters["bucket_bytes"].default
    sizes = []
    for (rows, cols), count in Counter(shapes).items():
        one = rows * cols * torch.bfloat16.itemsize
        sizes.append(one * min(count, ranks * max(1, bound // one)))
    return max(sizes)


def _document(request: Request, shapes: Sequence[Shape], results: dict[int, list[Row]]) -> dict[str, Any]:
    versions = {"distmuon": distmuon.__version__, "torch": torch.__version__, "python": platform.python_version()}
    machine = {"cores": os.cpu_count(), "processor": processor(), "native_bf16": has_native_bf16(request.device)}
    settings = dataclasses.asdict(request)
    settings["peer_paths"] = [Path(path).name for path in request.peer_paths]
    measured = []
    for ranks, rows in results.items():
        base = baseline_ms(rows)
        found = [dataclasses.asdict(row) for row in rows]
        for entry in found:
            entry["ratio"] = entry["timing"]["median"] / base if base and entry["timing"] else None
        measured.append({"ranks": ranks, "bucket_bytes": bucket_bytes(shapes, ranks), "rows": found})
    return {"versions": versions, "machine": machine, "settings": settings, "results": measured}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="world sizes, one table each")
    parser.add_argument("--model", choices=MODELS, default="blocks_512", help="hidden matrices of a model")
    parser.add_argument("--blocks", type=int, help="number of blocks instead of the model's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads a rank")
    parser.add_argument("--rounds", type=int, default=11, help="samples to keep of each contender")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which no round of a table begins")
    parser.add_argument(
        "--ours-settings",
        action="append",
        default=[],
        metavar="'NAME=VALUE ...'",
        help="further rows of distmuon with these settings",
    )
    parser.add_argument("--peer-path", action="append", default=[], help="folder with the checkout of a peer")
    parser.add_argument("--compile-peers", action="store_true", help="leave torch.compile to the peers on a CPU too")
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose name and layout contain one of these")
    parser.add_argument("--skip", nargs="+", default=[], help="leave these out, for example 'torch.optim.Muon FSDP2'")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--png", type=Path, help="draw them here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
