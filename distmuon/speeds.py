"""How fast a cluster moves what the optimizer moves: links between ranks, and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Link:
    """What a collective takes over one class of links.

    The rates are of the bytes that leave a rank by the usual algorithm (each collective's method says which), so on
    an ideal network the three are equal.

    Attributes:
        latency: Seconds of a collective, whatever its size.
        exchange: Seconds a byte of an all-to-all.
        reduce: Seconds a byte of an all-reduce.
        gather: Seconds a byte of an all-gather.
        reduce_extra: Seconds that an all-reduce takes on top of ``latency``.
        gather_extra: Seconds that an all-gather takes on top of ``latency``.
    """

    latency: float
    exchange: float
    reduce: float
    gather: float
    reduce_extra: float = 0.0
    gather_extra: float = 0.0

    def __post_init__(self) -> None:
        _check(asdict(self))

    def all_to_all(self, sent: float, received: float) -> float:
        """Seconds of an all-to-all, of bytes that leave a rank and that reach it; both ways are used at a time."""
        return self.latency + self.exchange * max(sent, received)

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds of an all-reduce of ``nbytes``, of which ``2 (ranks - 1) / ranks`` leave each rank."""
        if ranks == 1:
            return 0.0
        return self.latency + self.reduce_extra + self.reduce * nbytes * 2 * (ranks - 1) / ranks

    def all_gather(self, nbytes: float, ranks: int) -> float:
        """Seconds to bring ``nbytes`` together of equal parts; ``(ranks - 1) / ranks`` reach each rank."""
        if ranks == 1:
            return 0.0
        return self.latency + self.gather_extra + self.gather * nbytes * (ranks - 1) / ranks

    @classmethod
    def of(cls, *, gigabytes: float, latency: float) -> Link:
        """An ideal link.

        Args:
            gigabytes: GB/s of a rank in each direction.
            latency: Seconds.
        """
        return cls(latency, *(1e-9 / gigabytes,) * 3)


@dataclass(frozen=True)
class Speeds:
    """What moving elements takes beside orthogonalizing them.

    Attributes:
        local: Links between ranks of one node.
        remote: Links between nodes.
        blend: Seconds an element of a shard whose momentum is blended into what travels.
        copy: Seconds an element of a matrix that is packed or unpacked.
        apply: Seconds an element of a shard that is decayed and takes its update.
        bucket: Seconds that a bucket takes beside what its matrices and bytes do: starts of kernels and copies.
    """

    local: Link
    remote: Link
    blend: float = 0.0
    copy: float = 0.0
    apply: float = 0.0
    bucket: float = 0.0

    def __post_init__(self) -> None:
        _check({key: getattr(self, key) for key in ("blend", "copy", "apply", "bucket")})

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> Speeds:
        """From parsed JSON, as :func:`dataclasses.asdict` writes it; other keys are ignored.

        Raises:
            ValueError: if something is missing or no number of seconds; names it.
        """
        passes = {key: _seconds(found, "speeds", key) for key in ("blend", "copy", "apply")}
        # tables from before have none
        bucket = _seconds(found, "speeds", "bucket") if "bucket" in found else 0.0
        return cls(_link(found, "local"), _link(found, "remote"), **passes, bucket=bucket)


def _link(found: object, name: str) -> Link:
    link = _get(found, "speeds", name)
    if not isinstance(link, Mapping):
        raise ValueError(f"speeds.{name}={link!r} is no link, which has a latency and rates")
    # what is not needed to be there has a default
    needed = [field.name for field in fields(Link) if field.default is MISSING]
    given = [field.name for field in fields(Link) if field.default is not MISSING and field.name in link]
    return Link(**{key: _seconds(link, f"speeds.{name}", key) for key in (*needed, *given)})


def _get(found: object, where: str, key: str) -> Any:
    if not isinstance(found, Mapping) or key not in found:
        raise ValueError(f"{where} has no {key!r}")
    return found[key]


def _seconds(found: object, where: str, key: str) -> float:
    value = _get(found, where, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}.{key}={value!r} is no number of seconds")
    _check({f"{where}.{key}": value})
    return float(value)


def _check(seconds: Mapping[str, float]) -> None:
    for key, value in seconds.items():
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{key}={value}: seconds are finite and not negative.")
