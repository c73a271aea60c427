"""How much of the exchange between hosts a step waits for, with and without overlap, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py --png overlap.png
    OMP_NUM_THREADS=1 python benchmarks/overlap.py --model gpt2_124m_split_qkv --layout HSDP --ranks 2 --rate 200mbit

Two network namespaces with a limited cable stand for two hosts (gloo, one thread a rank; needs root, ip and tc), by
default with one rank each, so that on two cores every rank has one. Exposed is the time of a step, of the slowest rank,
less that of Newton-Schulz on the busiest: exchanges that are waited for, and passes over memory. With
``bucket_bytes=inf`` all matrices of a shape are one bucket, of which nothing overlaps. Where the cable is not what the
built-in cost table takes it for, a last row has a table that knows it, as ``distmuon calibrate`` on the two hosts would
write. Ratios are medians over rounds in which all took a step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from overlap_ranks import INF, LAYOUTS, Request
from overlap_report import draw, make_table
from rich.console import Console
from step_time_contenders import MODELS
from two_hosts import Host, NotPermitted, two_hosts

from distmuon.numerics.tables import builtin_speeds

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def main() -> None:
    """Parse the command line, measure, and print the table."""
    args = _parse()
    # ranks of a host share the cable
    gigabytes = _bits(args.rate) / 8e9 / args.ranks
    request = Request(
        model=args.model,
        blocks=args.blocks,
        layout=args.layout,
        rounds=args.rounds,
        gigabytes=None if math.isclose(gigabytes, 1e-9 / builtin_speeds("cpu").remote.exchange) else gigabytes,
        ranks=args.ranks,
    )
    try:
        with two_hosts() as both, tempfile.TemporaryDirectory() as folder:
            # a short queue, so that what waits, waits in the sender and not unseen in the cable
            both.rate(_bits(args.rate) / 1e6, burst="128kb", latency="50ms")
            found = measure(request, both.hosts, pathlib.Path(folder), args.limit)
    except NotPermitted as reason:
        raise SystemExit(
            f"this machine permits no namespaces: {reason}. Run it as root on Linux with iproute2."
        ) from None
    Console(highlight=False, width=120).print(make_table(summary(found), _title(request, args.rate)))
    if args.json:
        args.json.write_text(json.dumps({"request": asdict(request), "rate": args.rate, "ranks": found}) + "\n")
    if args.png:
        draw([rank["spans"] for rank in found], summary(found), _title(request, args.rate), args.png)


def measure(request: Request, hosts: Sequence[Host], folder: pathlib.Path, limit_s: float) -> list[dict[str, Any]]:
    """Start the ranks, and return what each found.

    Raises:
        SystemExit: if one fails or all take longer than ``limit_s``.
    """
    (folder / "request.json").write_text(json.dumps(asdict(request)))
    world = len(hosts) * request.ranks
    processes = []
    for rank in range(world):
        node, local = divmod(rank, request.ranks)
        names = {
            "RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": request.ranks,
            "GROUP_RANK": node,
            "GLOO_SOCKET_IFNAME": hosts[node].cable,
            "OMP_NUM_THREADS": 1,
        }
        script = pathlib.Path(__file__).with_name("overlap_ranks.py")
        command = [*hosts[node].prefix, sys.executable, str(script), str(folder)]
        processes.append(subprocess.Popen(command, env=os.environ | {key: str(value) for key, value in names.items()}))
    try:
        for rank, process in enumerate(processes):
            if process.wait(limit_s):
                raise SystemExit(f"rank {rank} ended with {process.returncode}; see above.")
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"the ranks took longer than --limit {limit_s:g} s.") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


def summary(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By contender: medians in ms of the step, of Newton-Schulz on the busiest rank, of what is exposed and waited for.

    ``ratio`` is what is exposed over that without overlap in the same round, its median.
    """
    rounds: dict[str, list[dict[str, float]]] = {}
    for name in found[0]["samples"]:
        rounds[name] = []
        for of_ranks in zip(*(rank["samples"][name] for rank in found), strict=True):
            most = {key: max(sample[key] for sample in of_ranks) for key in ("step", "ns", "wait")}
            rounds[name].append(most | {"exposed": most["step"] - most["ns"]})
    result = {}
    for name, samples in rounds.items():
        medians = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
        ratios = [own["exposed"] / base["exposed"] for own, base in zip(samples, rounds[INF], strict=True)]
        faster = [own["step"] / base["step"] for own, base in zip(samples, rounds[INF], strict=True)]
        result[name] = medians | {
            "ratio": statistics.median(ratios),
            "step_ratio": statistics.median(faster),
            "buckets": found[0]["buckets"][name],
        }
    return result


def _title(request: Request, rate: str) -> str:
    return (
        f"{request.model}{f', {request.blocks} blocks' if request.blocks else ''}: {request.layout} on 2 hosts with "
        f"{request.ranks} rank{'s' * (request.ranks > 1)} each, {rate}/s between them, {request.rounds} rounds"
    )


def _bits(rate: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if not match:
        raise SystemExit(f"--rate {rate}: give a number and kbit, mbit or gbit, such as 1gbit.")
    return float(match[1]) * _UNITS[match[2]]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2_124m_split_qkv", help="hidden matrices of a model")
    parser.add_argument("--blocks", type=int, help="number of blocks instead of the model's own")
    parser.add_argument("--layout", choices=LAYOUTS, default="FSDP2")
    parser.add_argument("--rate", default="1gbit", metavar="RATE", help="of the cable, as tc writes it (1gbit)")
    parser.add_argument("--ranks", type=int, default=1, help="on each host (1)")
    parser.add_argument("--rounds", type=int, default=11, help="steps of each that count (11)")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for the whole (600)")
    parser.add_argument("--json", type=pathlib.Path, help="write all samples and spans there")
    parser.add_argument("--png", type=pathlib.Path, help="draw the timelines there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
