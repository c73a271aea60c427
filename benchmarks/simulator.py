"""The step as distmuon.plan.simulate predicts it beside the step as it is measured, on gloo ranks of this machine.

    python benchmarks/simulator.py --ranks 2 4
    python benchmarks/simulator.py --ranks 2 --links 1gbit 0.2gbit
    python benchmarks/simulator.py --ranks 2 --only 4096 --rounds 5    # a team where one matrix dominates
    python benchmarks/simulator.py --ranks 2 --only mix --json simulator.json

Rounds A B C A B C: in each the ranks time the parts of a step as ``distmuon calibrate`` does (engines and passes on as
many ranks as there are cores, all busy; links between all ranks) and then step every model, so that whatever else
the machine does slows both alike. Predictions are made of the medians, and compared with the median step of the
slowest rank. Owners are planned by a first round. Where more ranks than cores run, the simulation lets them share.

``--links`` puts two ranks into network namespaces of their own, nodes to distmuon, whose adapters are slowed to that
rate: it takes root on Linux, with ``ip``, ``tc`` and ``unshare``.
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

_HERE = pathlib.Path(__file__).parent
_LIMIT_S = 240.0


def main() -> int:
    """Parse the command line, run, print; 0 if all predictions are within the bar."""
    args = _parse()
    console = Console(highlight=False, width=max(120, Console().width))
    cores = len(os.sched_getaffinity(0))
    began = time.time()
    console.print(f"torch {torch.__version__}, {cores} cores, {args.threads} threads a rank")
    rows: list[Row] = []
    for ranks, link in [*((count, None) for count in args.ranks), *((2, rate) for rate in args.links)]:
        try:
            found = measured(ranks, link, args)
        except LinksError as error:
            console.print(f"{link}: skipped, {error}", markup=False)
            continue
        rows += found
        console.print(shown(found, ranks, link))
    console.print(f"{time.time() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return int(any(abs(row.ratio - 1.0) > args.bar for row in rows))


def measured(ranks: int, link: str | None, args: argparse.Namespace) -> list[Row]:
    """Start ``ranks`` processes, each in its namespace if there is a ``link``, and return what they found.

    Raises:
        LinksError: if the machine has no such links.
    """
    cases = tuple(
        name
        for name, case in CASES.items()
        if (any(word in name for word in args.only) if args.only else not case.large)
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        places = stack.enter_context(namespaces(ranks, link)) if link else [[] for _ in range(ranks)]
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
    for column in (
        "model",
        "layout",
        "ms",
        "fastest to slowest",
        "others",
        "of it ns",
        "predicted",
        "of it ns",
        "waiting",
    ):
        table.add_column(column, justify="left" if column in ("model", "layout") else "right", no_wrap=True)
    table.add_column("predicted / measured", justify="right")
    for row in rows:
        seconds = (row.median, row.measured_ns, row.predicted, row.ns, row.waiting)
        median, measured_ns, predicted, ns, waiting = (f"{1e3 * number:.1f}" for number in seconds)
        spread = f"{1e3 * row.fastest:.1f} to {1e3 * row.slowest:.1f}"
        ratio = f"{row.ratio:.3f}"
        others = f"{row.others:.0%}"
        table.add_row(row.case, row.layout, median, spread, others, measured_ns, predicted, ns, waiting, ratio)
    return table


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="world sizes on one node")
    parser.add_argument("--links", nargs="*", default=[], metavar="RATE", help="rates of links between 2 nodes: 1gbit")
    parser.add_argument("--threads", type=int, default=1, help="threads a rank")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each model")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds after which no round of a run begins")
    parser.add_argument("--only", nargs="+", default=[], help="models whose name contains one of these")
    parser.add_argument("--bar", type=float, default=0.2, help="how far a prediction may be off")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
