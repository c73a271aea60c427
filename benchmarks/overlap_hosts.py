"""Two network namespaces of this machine as two hosts, with a cable of a given rate between them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A namespace: what comes before a command that runs in it, its address, and its end of the cable."""

    prefix: tuple[str, ...]
    address: str
    interface: str


@contextmanager
def two_hosts(rate: str) -> Iterator[tuple[Host, Host]]:
    """Make the hosts, and remove them at the end.

    Args:
        rate: Of each direction of the cable, as ``tc`` writes it, such as ``"1gbit"``; ``""``: not limited.

    Raises:
        SystemExit: where this is not permitted; says what is needed.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        raise SystemExit("network namespaces need root, ip and tc (iproute2): run it as root on Linux.")
    names = [f"dmo{os.getpid()}n{number}" for number in (0, 1)]
    ends = [f"dmo{os.getpid()}v{number}" for number in (0, 1)]
    lines = [f"ip netns add {name}" for name in names]
    lines.append(f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}")
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        lines += [
            f"ip -n {name} addr add 10.78.0.{number}/24 dev {end}",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set {end} up",
        ]
        if rate:
            # a short queue, so that what waits, waits in the sender and not unseen in the cable
            lines.append(f"tc -n {name} qdisc add dev {end} root tbf rate {rate} burst 128kb latency 50ms")
    try:
        for line in lines:
            done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"`{line}` failed ({done.stderr.strip()}): this machine permits no namespaces.")
        first, second = (
            Host(("ip", "netns", "exec", name), f"10.78.0.{number}", end)
            for number, (name, end) in enumerate(zip(names, ends, strict=True), 1)
        )
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
