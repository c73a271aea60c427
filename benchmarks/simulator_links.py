"""Network namespaces as nodes: two adapters, slowed to a rate."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

_NAMES = ("distmuon0", "distmuon1")
_ADAPTERS = ("dmv0", "dmv1")
_ADDRESSES = ("10.77.0.1/24", "10.77.0.2/24")


class LinksError(RuntimeError):
    """Why there are no such links here."""


@contextlib.contextmanager
def namespaces(count: int, rate: str) -> Iterator[list[list[str]]]:
    """Two nodes for the while of a ``with`` block.

    Args:
        count: Ranks, which take turns: one a node where there are 2.
        rate: As ``tc`` reads it: ``"1gbit"``.

    Yields:
        For each rank how a command line begins that runs on its node.

    Raises:
        LinksError: if they cannot be made; what there is of them is removed.
    """
    missing = [program for program in ("ip", "tc", "unshare") if shutil.which(program) is None]
    if missing:
        raise LinksError(f"this machine has no {', '.join(missing)}.")
    if os.geteuid() != 0:
        raise LinksError("namespaces take root: run this as root.")
    try:
        for name in _NAMES:
            _run("ip", "netns", "add", name)
        first, second = _ADAPTERS
        _run("ip", "link", "add", first, "netns", _NAMES[0], "type", "veth", "peer", "name", second, "netns", _NAMES[1])
        for name, adapter, address in zip(_NAMES, _ADAPTERS, _ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", address, "dev", adapter)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", adapter, "up")
            _in(
                name,
                "tc",
                "qdisc",
                "add",
                "dev",
                adapter,
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "128kb",
                "latency",
                "50ms",
            )
        yield [_beginning(rank % 2) for rank in range(count)]
    finally:
        for name in _NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _beginning(node: int) -> list[str]:
    # nodes are told apart by their host names, and gloo needs to be told the adapter
    script = 'hostname "$0" && export GLOO_SOCKET_IFNAME="$1" && shift && exec "$@"'
    inner = ["unshare", "--uts", "sh", "-c", script, _NAMES[node], _ADAPTERS[node]]
    return ["ip", "netns", "exec", _NAMES[node], *inner]


def _in(name: str, *command: str) -> None:
    _run("ip", "netns", "exec", name, *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinksError(f"`{' '.join(command)}` failed here ({done.stderr.strip() or done.returncode}).")
