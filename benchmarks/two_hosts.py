"""Two network namespaces with a cable between them, as two hosts: the cable may be slowed, cut and mended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Ethernet, IPv4 and TCP with its time stamps, without which Linux sends no segment of a connection
HEADERS = 14 + 20 + 32


class NotPermitted(RuntimeError):  # noqa: N818 - a reason to skip
    """Why there are no two hosts here, or not this kind of cable."""


@dataclass(frozen=True)
class Counts:
    """What has left a host over the cable so far."""

    bytes: int
    packets: int

    @property
    def payload(self) -> int:
        """Bytes without headers.

        A packet is what the kernel hands to the cable, up to 64 KiB with one header: nothing is cut on a veth.
        """
        return self.bytes - HEADERS * self.packets


class Host:
    """One of the two.

    Args:
        number: 0 or 1.
        namespace: Its name.
        cable: Its network interface.

    Attributes:
        address: By which the other one reaches it.
        prefix: Of a command that runs there.
    """

    def __init__(self, number: int, namespace: str, cable: str) -> None:
        self.number, self.cable = number, cable
        self.address = f"10.77.0.{number + 1}"
        self.prefix = ["ip", "netns", "exec", namespace]
        self._namespace = namespace

    def ip(self, *arguments: str) -> None:
        """Change its network."""
        _call("ip", "-n", self._namespace, *arguments)

    def tc(self, *arguments: str) -> None:
        """Change how packets leave it."""
        _call(*self.prefix, "tc", "qdisc", *arguments)

    def held_back(self) -> int:
        """How often a packet had to wait as the cable was slow."""
        found = json.loads(_call(*self.prefix, "tc", "-s", "-j", "qdisc", "show", "dev", self.cable))
        return int(found[0]["overlimits"])

    def sent(self) -> Counts:
        """What has left it over the cable."""
        folder = f"/sys/class/net/{self.cable}/statistics"
        # sysfs shows the devices of the namespace in which it was mounted: ip netns exec mounts it again
        text = _call(*self.prefix, "cat", f"{folder}/tx_bytes", f"{folder}/tx_packets")
        return Counts(*map(int, text.split()))


class TwoHosts:
    """10.77.0.1 and 10.77.0.2, each with a host name that is 127.0.0.1 there, as on many machines."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = tuple(hosts)

    def rate(self, mbit: float, *, burst: str = "256kb", latency: str = "400ms") -> None:
        """Let at most so many Mbit/s leave each host.

        Args:
            mbit: The rate.
            burst: What may leave at once.
            latency: How long a packet may wait in the cable before it is dropped.
        """
        self._shape(f"tbf rate {mbit:g}mbit burst {burst} latency {latency}")

    def bad_cable(self, delay: str, loss: str) -> None:
        """Delay packets and lose some, such as 2ms and 0.5%.

        Raises:
            NotPermitted: where the kernel has no netem.
        """
        self._shape(f"netem delay {delay} loss {loss}")

    def _shape(self, discipline: str) -> None:
        for host in self.hosts:
            host.tc("replace", "dev", host.cable, "root", *discipline.split())

    def cut(self) -> None:
        """Pull the cable out."""
        self.hosts[0].ip("link", "set", self.hosts[0].cable, "down")

    def mend(self) -> None:
        """Plug it in again."""
        self.hosts[0].ip("link", "set", self.hosts[0].cable, "up")


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts, gone afterwards.

    Raises:
        NotPermitted: where no network namespaces can be made.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        raise NotPermitted("network namespaces need root, ip and tc")
    names = [f"dm{os.getpid()}n{number}" for number in (0, 1)]
    cables = [f"dm{os.getpid()}v{number}" for number in (0, 1)]
    hosts = [Host(number, names[number], cables[number]) for number in (0, 1)]
    try:
        for name in names:
            _call("ip", "netns", "add", name)
        veth = ["link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1]]
        _call("ip", *veth, "netns", names[1])
        for host in hosts:
            host.ip("addr", "add", f"{host.address}/24", "dev", host.cable)
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", host.cable, "up")
        yield TwoHosts(hosts)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        raise NotPermitted(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
