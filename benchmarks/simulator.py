"""The step as distmuon.plan.simulate predicts it beside the step as it is measured, on gloo ranks of this machine.

    python benchmarks/simulator.py --ranks 2 4
    python benchmarks/simulator.py --ranks 2 --links 1gbit 0.2gbit
    python benchmarks/simulator.py --ranks 2 --table cost_table.json --json simulator.json

First one rank a core, all busy, measures the engines and passes as ``distmuon calibrate`` does; then the ranks of each
run measure their links and step each model in turn. ``--links`` puts every rank into a network namespace of its own,
a node to distmuon, whose adapter is slowed to that rate: that takes root on Linux, with ``ip``, ``tc`` and ``unshare``.
Where more ranks than cores run, the simulation lets them share.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table
from simulator_links import LinksError, namespaces
from simulator_models import CASES
from simulator_ranks import Request, Row

from distmuon.calibrating.fit import fit, fit_pass
from distmuon.calibrating.passes import PASSES
from distmuon.calibrating.session import Job, run
from distmuon.numerics.costs import CostTable
from distmuon.numerics.hardware import device_class
from distmuon.numerics.tables import builtin_speeds

_HERE = pathlib.Path(__file__).parent
# One engine, so that the minute goes to its accuracy; sizes between which those of the models lie
_ENGINE = "rational"
_SHAPES = ((64, 64), (128, 512), (256, 256), (320, 1280), (448, 448), (512, 2048), (640, 640), (1024, 1024))
_SIDES = (128, 256, 512)
_LIMIT_S = 240.0


def main() -> int:
    """Parse the command line, run, print; 0 if all predictions are within the bar."""
    args = _parse()
    console = Console(highlight=False, width=max(120, Console().width))
    cores = len(os.sched_getaffinity(0))
    began = time.time()
    table = CostTable.load(args.table) if args.table else calibrated(cores, args.threads)
    console.print(f"torch {torch.__version__}, {cores} cores, {args.threads} threads a rank; engines: {table.source}")
    rows: list[Row] = []
    for ranks, link in [*((count, None) for count in args.ranks), *((2, rate) for rate in args.links)]:
        try:
            found = measured(ranks, link, table, args)
        except LinksError as error:
            console.print(f"{link}: skipped, {error}", markup=False)
            continue
        rows += found
        console.print(shown(found, ranks, link))
    console.print(f"{time.time() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return int(any(abs(row.ratio - 1.0) > args.bar for row in rows))


def calibrated(ranks: int, threads: int) -> CostTable:
    """The rates of one engine and of passes while ``ranks`` processes measure them at the same time."""
    job = Job(shapes=_SHAPES, engines=(_ENGINE,), sides=_SIDES)
    device = torch.device("cpu")
    found = run(job, device=device, count=ranks, threads=threads, in_launch=False)
    assert found is not None
    passes = {name: fit_pass([timing for timing in found.passes if timing.name == name]) for name in PASSES}
    speeds = dataclasses.replace(builtin_speeds("cpu-float32"), **passes)
    source = f"measured, {ranks} ranks at a time"
    return CostTable(device_class(device), source, ((_ENGINE, fit(found.engines)),), speeds)


def measured(ranks: int, link: str | None, table: CostTable, args: argparse.Namespace) -> list[Row]:
    """Start ``ranks`` processes, each in its namespace if there is a ``link``, and return what they found.

    Raises:
        LinksError: if the machine has no such links.
    """
    cases = tuple(name for name in CASES if not args.only or any(word in name for word in args.only))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        places = stack.enter_context(namespaces(ranks, link)) if link else [[] for _ in range(ranks)]
        table.save(pathlib.Path(folder, "table.json"))
        request = Request(ranks, link, args.threads, cases, args.rounds, args.limit, folder)
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        processes = []
        for rank, place in enumerate(places):
            command = [*place, sys.executable, str(_HERE / "simulator_ranks.py"), str(rank), request.text()]
            processes.append(stack.enter_context(subprocess.Popen(command, env=environment)))
        try:
            codes = [process.wait(timeout=_LIMIT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}: their errors are above.")
        return [Row(**row) for row in json.loads(pathlib.Path(folder, "rows.json").read_text())]


def shown(rows: list[Row], ranks: int, link: str | None) -> Table:
    """The rows of one run."""
    title = f"{ranks} ranks, {f'a node each, links of {link}' if link else 'one node'}"
    table = Table(title=f"{title}; {rows[0].links}", title_justify="left")
    for column in ("model", "layout", "measured ms", "fastest", "slowest", "others", "predicted ms", "ns", "waiting"):
        table.add_column(column, justify="left" if column in ("model", "layout") else "right")
    table.add_column("predicted / measured", justify="right")
    for row in rows:
        numbers = [f"{1e3 * number:.1f}" for number in (row.median, row.fastest, row.slowest)]
        more = [f"{1e3 * number:.1f}" for number in (row.predicted, row.ns, row.waiting)]
        table.add_row(row.case, row.layout, *numbers, f"{row.others:.0%}", *more, f"{row.ratio:.3f}")
    return table


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="world sizes on one node")
    parser.add_argument("--links", nargs="*", default=[], metavar="RATE", help="rates of links between 2 nodes: 1gbit")
    parser.add_argument("--threads", type=int, default=1, help="threads a rank")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each model")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds after which no round of a run begins")
    parser.add_argument("--only", nargs="+", default=[], help="models whose name contains one of these")
    parser.add_argument("--table", type=pathlib.Path, help="a cost table of distmuon calibrate, instead of measuring")
    parser.add_argument("--bar", type=float, default=0.2, help="how far a prediction may be off")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
