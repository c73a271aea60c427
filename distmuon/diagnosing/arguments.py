"""The command line of ``doctor``."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distmuon.usage import Parser, UsageError, ranks_to_start

DESCRIPTION = """\
Check what goes wrong on clusters before a job does, and say what to do about it:

  distmuon doctor                                                   # this machine
  distmuon doctor --ranks 4                                         # 4 ranks of this machine, that talk
  torchrun --nnodes 16 ... -m distmuon.cli doctor --folder /shared/runs   # all ranks of a job

Versions, threads, devices, names and ports, network interfaces, shared memory, limits, disks, the checkpoint folder,
clocks, the speed of each rank and of the links between them. Takes some seconds. A rank that does not come or stalls is
named. Exit code: 0 if nothing or only warnings were found, 1 after a failure, 2 for bad usage."""


@dataclass(frozen=True)
class Arguments:
    """What to check.

    Attributes:
        ranks: Processes to start; 1: none.
        device: ``"cpu"`` or ``"cuda"``.
        folder: Of checkpoints.
        timeout_s: Seconds to wait for another rank.
        json: Where to write what was found.
        strict: Whether a warning makes the exit code 1.
    """

    ranks: int
    device: str
    folder: pathlib.Path | None
    timeout_s: float
    json: pathlib.Path | None
    strict: bool


def parse(arguments: Sequence[str]) -> Arguments:
    """Read a command line without the program's name.

    Raises:
        UsageError: in one sentence.
    """
    parser = Parser(
        prog="distmuon doctor",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="start N processes on this machine that talk")
    parser.add_argument("--folder", metavar="DIR", help="of checkpoints: can all ranks write to it, do they share it?")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="what ranks compute on; else GPUs where there are some"
    )
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="how long to wait for another rank (30)"
    )
    parser.add_argument("--json", metavar="FILE", help="write what was found, and measured, there")
    parser.add_argument("--strict", action="store_true", help="exit with 1 after a warning too")
    known = parser.parse_args(list(arguments))
    if not 0 < known.timeout < float("inf"):
        raise UsageError(f"--timeout is {known.timeout:g}, and it counts seconds: give more than 0.")
    ranks = ranks_to_start(known.ranks)
    device = known.device or _device(ranks)
    folder, out = (None if name is None else pathlib.Path(name) for name in (known.folder, known.json))
    return Arguments(ranks, device, folder, known.timeout, out, known.strict)


def _device(ranks: int) -> str:
    """GPUs if there is one for each process that is started here."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"
