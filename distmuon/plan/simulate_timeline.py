"""What a simulation is told of a backend, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distmuon.speeds import Speeds


@dataclass(frozen=True, slots=True)
class Span:
    """One bar of a Gantt chart.

    Attributes:
        rank: The global rank.
        kind: ``"pack"`` (packing and unpacking), ``"ns"``, ``"apply"`` and ``"wait"`` are of its engine and do not
            overlap; ``"gather"`` and ``"scatter"`` are exchanges under way.
        bucket: Place of the bucket in the plan.
        start: Seconds since the step began.
        end: Seconds since the step began.
    """

    rank: int
    kind: str
    bucket: int
    start: float
    end: float


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends and receives in a step, inside its node and between nodes."""

    local_out: int
    local_in: int
    remote_out: int
    remote_in: int

    def seconds(self, speeds: Speeds) -> float:
        """What its busiest link takes at least, latency aside."""
        local, remote = (min(link.exchange, link.gather) for link in (speeds.local, speeds.remote))
        return max(max(self.local_out, self.local_in) * local, max(self.remote_out, self.remote_in) * remote)


@dataclass(frozen=True)
class Transport:
    """How a backend runs collectives; the defaults are those of NCCL.

    Attributes:
        all_gather: Whether updates of replicated buckets come back by an all-gather instead of an all-to-all.
        at_once: Exchanges that a rank has under way at a time; later ones wait in their order.
        joint: Whether an exchange is complete only after all ranks have begun it, even those with nothing to send.
        handling: Seconds that a byte sent or received keeps a rank from computing, as where a CPU moves it.
        duty: Share of an exchange's time for which it fills its links; below 1 those under way at a time take less
            than their sum.
    """

    all_gather: bool = True
    at_once: int = 1
    joint: bool = False
    handling: float = 0.0
    duty: float = 1.0

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise ValueError(f"at_once={self.at_once}: at least one exchange is under way at a time.")
        if not 0.0 <= self.handling < float("inf"):
            raise ValueError(f"handling={self.handling}: seconds are finite and not negative.")
        if not 0.0 < self.duty <= 1.0:
            raise ValueError(f"duty={self.duty}: it is more than 0 and at most 1.")


NCCL = Transport()
# as measured: empty messages are sent and waited for, two threads run a group's collectives, and one exchange uses a
# slow link one way at a time, two of them both ways
GLOO = Transport(all_gather=False, at_once=2, joint=True, duty=0.5)


@dataclass(frozen=True)
class Timeline:
    """A simulated step; mappings are by global rank.

    Attributes:
        ranks: Those of the plan.
        seconds: Of the step: when the last rank is done.
        finish: When each is done.
        ns: Seconds in orthogonalization, talk in its teams included.
        waiting: Seconds idle before that: exposed communication, and waiting for slower ranks.
        bytes: What it sends and receives, the talk of teams aside.
        spans: Of the ranks asked for, by rank and start.
    """

    ranks: tuple[int, ...]
    seconds: float
    finish: Mapping[int, float]
    ns: Mapping[int, float]
    waiting: Mapping[int, float]
    bytes: Mapping[int, Traffic]
    spans: tuple[Span, ...] = ()
