"""The network interfaces of this machine: their names, whether they are up, their addresses."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import struct
import sys

_FLAGS = pathlib.Path("/sys/class/net")
_IPV6 = pathlib.Path("/proc/net/if_inet6")
# Of Linux: ask a socket for an interface's IPv4 address, and the flag of an interface that is up
_SIOCGIFADDR, _IFF_UP = 0x8915, 0x1
# Made by containers and virtual machines, for this machine alone
_VIRTUAL = ("docker", "virbr", "veth", "br-", "cni", "flannel", "podman", "lxc", "lxd")


def adapters() -> dict[str, dict[str, object]]:
    """Each interface's ``up`` and ``addresses``, by name."""
    found: dict[str, dict[str, object]] = {}
    for _, name in socket.if_nameindex():
        found[name] = {"up": _is_up(name), "addresses": [*_ipv4(name), *_ipv6(name)]}
    return found


def leads_nowhere(name: str) -> bool:
    """Whether other machines cannot be reached through it, going by its name."""
    return name == "lo" or name.startswith(_VIRTUAL)


def _is_up(name: str) -> bool:
    try:
        return bool(int((_FLAGS / name / "flags").read_text(), 16) & _IFF_UP)
    except (OSError, ValueError):  # not told: its addresses will
        return True


def _ipv4(name: str) -> list[str]:
    if sys.platform != "linux":
        return []
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return [socket.inet_ntoa(answer[20:24])]
    return []


def _ipv6(name: str) -> list[str]:
    try:
        rows = [line.split() for line in _IPV6.read_text().splitlines()]
    except OSError:
        return []
    return [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])) for row in rows if row[-1] == name]
