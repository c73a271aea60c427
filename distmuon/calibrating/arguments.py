"""The command line of ``calibrate``, checked before anything is measured."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distmuon.usage import Parser, UsageError, in_launch, ranks_to_start

DESCRIPTION = """\
Measure how long each engine of the orthogonalization takes on this machine, the passes over memory around it, and the
links between ranks, and write a cost table for Muon(cost_table=...), orthogonalize(table=...), the cost_table setting
of a pretraining config, and distmuon plan:

  distmuon calibrate
  distmuon calibrate --ranks 2 --threads 1           # as two ranks of this machine have it, both busy
  distmuon calibrate --device cuda --out h100.json
  torchrun --nnodes 2 --nproc-per-node 8 ... -m distmuon.cli calibrate --device cuda   # links between nodes as well

Takes one to two minutes. Run it while the machine has nothing else to do, with the threads that training will have."""

_ENGINES = ("standard", "composed", "gram", "rational")
# Those that auto chooses among; factorizations do not suit an accelerator
_AUTO = {"cpu": ("rational", "composed", "gram")}
_AUTO_ACCELERATOR = ("composed", "gram")


@dataclass(frozen=True)
class Arguments:
    """What to measure.

    Attributes:
        device: Of each process; under torchrun, of an accelerator each takes its own.
        engines: Names.
        out: The file.
        ranks: Processes that measure at the same time.
        threads: Of each; None: what torch takes, shared by them.
        links: Whether links are measured.
        in_launch: Whether torchrun started this process among others.
    """

    device: torch.device
    engines: tuple[str, ...]
    out: pathlib.Path
    ranks: int
    threads: int | None
    links: bool
    in_launch: bool


def parse(arguments: Sequence[str]) -> Arguments:
    """Read a command line without the program's name.

    Raises:
        UsageError: in one sentence.
    """
    parser = Parser(
        prog="distmuon calibrate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cpu", help="what to measure: cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--out", default="cost_table.json", metavar="FILE", help="the table (cost_table.json)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a process on a CPU; else torch's, shared")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="start N processes that measure at the same time, and take their median"
    )
    parser.add_argument("--no-links", action="store_true", help="take links from the built-in estimates")
    parser.add_argument(
        "--engines", metavar="NAME,...", help=f"of {', '.join(_ENGINES)}; else those that auto chooses of"
    )
    known = parser.parse_args(list(arguments))
    launched = in_launch()
    device = _device(known.device)
    if known.threads is not None and known.threads < 1:
        raise UsageError(f"--threads is {known.threads}, and it counts: give 1 or more.")
    if known.threads is not None and device.type != "cpu":
        raise UsageError(f"--threads is for a CPU, and --device is {device}: drop one of them.")
    ranks = _ranks(known.ranks, device)
    if device.index is not None and (ranks > 1 or launched):
        raise UsageError(f"--device {device} is one device, and each process takes its own: give {device.type}.")
    # one device has nobody to talk to
    links = not known.no_links and (device.type == "cpu" or launched or _count(device) > 1)
    engines, out = _engines(known.engines, device), pathlib.Path(known.out)
    if os.environ.get("RANK", "0") == "0" or not launched:
        _check_writable(out)
    return Arguments(device, engines, out, ranks, known.threads, links, launched)


def _ranks(given: int | None, device: torch.device) -> int:
    number = ranks_to_start(given)
    if given is not None and device.type != "cpu" and number > _count(device):
        raise UsageError(f"--ranks is {number}, and there are {_count(device)} {device.type} devices: give no more.")
    return number


def _count(device: torch.device) -> int:
    return int(torch.get_device_module(device).device_count())


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        # a device that torch knows of may be missing in this machine or this build
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise UsageError(
            f"--device {name} cannot be used ({reason}): give cpu, or a device of this machine."
        ) from error
    if device.type == "meta":
        raise UsageError("--device meta computes nothing that could be timed: name cpu or another one.")
    return device


def _engines(text: str | None, device: torch.device) -> tuple[str, ...]:
    if text is None:
        return _AUTO.get(device.type, _AUTO_ACCELERATOR)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in _ENGINES:
            raise UsageError(f"--engines names {name!r}, which cannot be measured: give some of {', '.join(_ENGINES)}.")
    return names


def _check_writable(path: pathlib.Path) -> None:
    """Refuse before the measurement what could not be written after it."""
    there = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written ({error.strerror}): name another file.") from error
    if not there:
        path.unlink()
