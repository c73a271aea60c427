"""The ``calibrate`` command: measure, fit, say how good the fit is, write the cost table."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from distmuon.calibrating.arguments import Arguments, parse
from distmuon.calibrating.devices import device_name
from distmuon.calibrating.fit import Errors, errors, fit
from distmuon.calibrating.moving import Moving, fit_moving
from distmuon.calibrating.ranks import RanksError
from distmuon.calibrating.report import report, report_moving
from distmuon.calibrating.session import Findings, Job, run
from distmuon.calibrating.shapes import LINK_SIZES, PASS_NUMEL, PASS_SIDES, Shapes, shapes_for
from distmuon.numerics.costs import CostTable, Rates
from distmuon.numerics.hardware import device_class
from distmuon.usage import UsageError

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
        given = parse(arguments)
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        return _calibrate(given)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)


def _calibrate(given: Arguments) -> int:
    shapes = shapes_for(given.device)
    sizes = LINK_SIZES.all if given.links else ()
    job = Job(shapes.all, given.engines, PASS_SIDES.all, PASS_NUMEL, sizes)
    threads = torch.get_num_threads() if given.threads is not None else max(1, torch.get_num_threads() // given.ranks)
    source = _source(given, threads)
    if not given.in_launch or os.environ.get("RANK") == "0":
        print(f"{source}; about a minute", flush=True)
    try:
        found = run(job, device=given.device, count=given.ranks, threads=threads, in_launch=given.in_launch)
    except RanksError as error:
        way_out = f"give {'' if given.ranks == 1 else '--ranks 1 '}--no-links to do without them"
        if given.in_launch:
            way_out = "look for the first error among all ranks"
        print(f"error: links were not measured ({error}): {way_out}.", file=sys.stderr)
        return 1
    # other ranks have given theirs to the first
    return 0 if found is None else _write(given, found, shapes, source)


def _write(given: Arguments, found: Findings, shapes: Shapes, source: str) -> int:
    rates, engine_errors = _rates(given.engines, found, shapes)
    if not rates:
        print("error: no engine was measured on enough shapes, so there is no table to write.", file=sys.stderr)
        return 1
    moving = fit_moving(found, device_class(given.device), LINK_SIZES, PASS_SIDES)
    table = CostTable(device_class(given.device), source, tuple(rates.items()), moving.speeds)
    print(report(found.engines, shapes.held_out, table, engine_errors, given.device))
    print(report_moving(moving))
    try:
        table.save(given.out, **_notes(found, shapes, engine_errors, moving))
    except OSError as error:
        print(f"error: --out {given.out} cannot be written ({error.strerror}): name another file.", file=sys.stderr)
        return 1
    print(f"wrote {given.out}: name it as cost_table of distmuon.Muon or of the optim section of a config.")
    return 0


def _rates(names: Sequence[str], found: Findings, shapes: Shapes) -> tuple[dict[str, Rates], dict[str, Errors]]:
    """The fit of each engine that was measured on enough shapes, and its errors on those held out."""
    rates: dict[str, Rates] = {}
    off: dict[str, Errors] = {}
    for engine in names:
        own = [timing for timing in found.engines if timing.engine == engine]
        known = [timing for timing in own if timing.shape in shapes.fitted]
        unseen = [timing for timing in own if timing.shape in shapes.held_out]
        if len(known) < _FEWEST or not unseen:
            print(f"left out: {engine}, too slow here for enough shapes to tell its rates.")
            continue
        rates[engine] = fit(known)
        off[engine] = errors(unseen, rates[engine])
    return rates, off


def _notes(found: Findings, shapes: Shapes, engine_errors: dict[str, Errors], moving: Moving) -> dict[str, Any]:
    return {
        "errors": {engine: asdict(error) for engine, error in engine_errors.items()},
        "speed_errors": {name: asdict(error) for name, error in moving.errors.items()},
        "estimated": list(moving.estimated),
        "held_out": shapes.held_out,
        "held_out_bytes": LINK_SIZES.held_out,
        "held_out_sides": PASS_SIDES.held_out,
        "timings": [asdict(timing) for timing in found.engines],
        "passes": [asdict(timing) for timing in found.passes],
        "links": [asdict(timing) for timing in found.links],
    }


def _source(given: Arguments, threads: int) -> str:
    where = device_name(given.device)
    if given.device.type == "cpu":
        where += f", {threads} thread{'' if threads == 1 else 's'}"
    ranks = int(os.environ["WORLD_SIZE"]) if given.in_launch else given.ranks
    if ranks > 1:
        where += f", {ranks} ranks at the same time"
    return f"measured on {where}, torch {torch.__version__}, {datetime.date.today().isoformat()}"
