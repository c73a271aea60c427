"""The ``calibrate`` command: measure, fit, say how good the fit is, write the cost table."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from distmuon.calibrating.fit import Errors, errors, fit
from distmuon.calibrating.measure import measure
from distmuon.calibrating.report import report
from distmuon.calibrating.shapes import shapes_for
from distmuon.numerics.costs import CostTable, Rates
from distmuon.numerics.hardware import device_class
from distmuon.usage import Parser, UsageError

DESCRIPTION = """\
Measure how long each engine of the orthogonalization takes on this machine, and write a cost table for
Muon(cost_table=...), orthogonalize(table=...) and the cost_table setting of a pretraining config:

  distmuon calibrate
  distmuon calibrate --device cuda --out h100.json

Takes one to two minutes. Run it while the machine has nothing else to do, with the threads that training will have."""

_ENGINES = ("standard", "composed", "gram", "rational")
# Those that auto chooses among; factorizations do not suit an accelerator
_AUTO = {"cpu": ("rational", "composed", "gram")}
_AUTO_ACCELERATOR = ("composed", "gram")
# Fewer shapes than this tell nothing about six rates
_FEWEST = 4


def run_command(arguments: Sequence[str]) -> int:
    """Run ``calibrate`` with a command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit code: 0 if a table was written, 1 if none could be, 2 for bad usage.
    """
    before = torch.get_num_threads()
    try:
        known = _parse(arguments)
        if known.threads is not None:
            torch.set_num_threads(known.threads)
        return _calibrate(known.device, known.engines, known.out)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)


def _calibrate(device: torch.device, engines: Sequence[str], out: pathlib.Path) -> int:
    shapes = shapes_for(device)
    source = _source(device)
    print(f"{source}; about a minute", flush=True)
    timings = measure(shapes.all, engines, device=device)
    rates: dict[str, Rates] = {}
    found: dict[str, Errors] = {}
    for engine in engines:
        own = [timing for timing in timings if timing.engine == engine]
        known = [timing for timing in own if timing.shape in shapes.fitted]
        unseen = [timing for timing in own if timing.shape in shapes.held_out]
        if len(known) < _FEWEST or not unseen:
            print(f"left out: {engine}, too slow here for enough shapes to tell its rates.")
            continue
        rates[engine] = fit(known)
        found[engine] = errors(unseen, rates[engine])
    if not rates:
        print("error: no engine was measured on enough shapes, so there is no table to write.", file=sys.stderr)
        return 1
    table = CostTable(device_class(device), source, tuple(rates.items()))
    print(report(timings, shapes.held_out, table, found, device))
    notes = {
        "errors": {engine: asdict(error) for engine, error in found.items()},
        "held_out": shapes.held_out,
        "timings": [asdict(timing) for timing in timings],
    }
    try:
        table.save(out, **notes)
    except OSError as error:
        print(f"error: --out {out} cannot be written ({error.strerror}): name another file.", file=sys.stderr)
        return 1
    print(f"wrote {out}: name it as cost_table of distmuon.Muon or of the optim section of a config.")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="distmuon calibrate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cpu", help="what to measure: cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--out", default="cost_table.json", metavar="FILE", help="the table (cost_table.json)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a CPU; else as many as torch takes")
    parser.add_argument(
        "--engines", metavar="NAME,...", help=f"of {', '.join(_ENGINES)}; else those that auto chooses of"
    )
    known = parser.parse_args(list(arguments))
    known.device = _device(known.device)
    if known.threads is not None and known.threads < 1:
        raise UsageError(f"--threads is {known.threads}, and it counts: give 1 or more.")
    if known.threads is not None and known.device.type != "cpu":
        raise UsageError(f"--threads is for a CPU, and --device is {known.device}: drop one of them.")
    known.engines = _engines(known.engines, known.device)
    known.out = pathlib.Path(known.out)
    _check_writable(known.out)
    return known


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


def _source(device: torch.device) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"{_cpu_name()}, {threads} thread{'' if threads == 1 else 's'}"
    elif device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = device.type
    return f"measured on {where}, torch {torch.__version__}, {datetime.date.today().isoformat()}"


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
