"""Where the ranks are: this one, as its environment says, and all of them, as rank 0 heard."""

from __future__ import annotations

import pathlib
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from distmuon.calibrating.ranks import nodes_of
from distmuon.comm.group import host
from distmuon.diagnosing.findings import ranks_text

# Machines that a sentence names
_TOLD = 3


@dataclass(frozen=True)
class Here:
    """One rank, and what it was asked for.

    Attributes:
        rank: Which it is.
        size: How many there are.
        local_rank: Which of this machine.
        device: ``"cpu"`` or ``"cuda"``.
        folder: Of checkpoints, if one is to be checked.
        timeout_s: Seconds that anything may wait for another rank.
        launched: Whether a launcher such as torchrun started it among others.
        node: What the ranks of this machine have in common.
        hostname: Of this machine.
    """

    rank: int
    size: int
    local_rank: int
    device: str
    folder: pathlib.Path | None
    timeout_s: float
    launched: bool = False
    node: str = field(default_factory=host)
    hostname: str = field(default_factory=socket.gethostname)


@dataclass(frozen=True)
class Places:
    """All ranks that have come.

    Attributes:
        nodes: The ranks of each machine.
        hosts: The name of each rank's machine.
    """

    nodes: tuple[tuple[int, ...], ...]
    hosts: Mapping[int, str]

    @property
    def several(self) -> bool:
        """Whether there are several machines."""
        return len(self.nodes) > 1

    def text(self, ranks: Iterable[int]) -> str:
        """Ranks by number, with their machines where there are several."""
        named = list(ranks)
        machines = dict.fromkeys(self.hosts[rank] for rank in named if rank in self.hosts)
        told = self.several and 0 < len(machines) <= _TOLD
        return ranks_text(named) + (f" ({', '.join(machines)})" if told else "")


def places_of(nodes: Mapping[int, str], hosts: Mapping[int, str]) -> Places:
    """The places of ranks, from the machine of each.

    Args:
        nodes: What the ranks of a machine have in common, by rank.
        hosts: Names of machines, by rank.
    """
    ranks = sorted(nodes)
    groups = nodes_of([nodes[rank] for rank in ranks])
    return Places(tuple(tuple(ranks[i] for i in group) for group in groups), dict(hosts))
