"""How long the passes over memory take that come before and after the orthogonalization."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distmuon.calibrating.devices import wait
from distmuon.numerics.update import apply_direction, blend_momentum

PASSES = ("blend", "copy", "apply")
_WIRE = torch.bfloat16


@dataclass(frozen=True)
class PassTiming:
    """Time of one pass over square shards of one size.

    Attributes:
        name: One of :data:`PASSES`.
        side: Rows, and columns, of a shard.
        seconds: An element, in the fastest round.
        spread: How much longer the median round took, as a fraction of ``seconds``.
    """

    name: str
    side: int
    seconds: float
    spread: float


def measure_passes(
    device: torch.device,
    sides: Sequence[int],
    numel: int,
    *,
    rounds: int = 7,
    limit_s: float = 8.0,
    agree: Callable[[float], float] = float,
) -> list[PassTiming]:
    """Time the passes as the optimizer makes them, with the threads that torch uses now.

    Parameters, gradients and momentum are of float32, what travels is bfloat16. A copy puts a shard, half of a
    matrix, from a packed buffer into its place.

    Args:
        device: Where.
        sides: Rows, and columns, of the shards.
        numel: Elements of all shards of a case, of one shard at least.
        rounds: Samples of each case, after a first that does not count.
        limit_s: No round is begun later than this many seconds after the start; one always is.
        agree: The largest number of all ranks that measure at the same time, once all are here.
    """
    started = time.perf_counter()
    samples: dict[tuple[str, int], list[float]] = {}
    cases = [(side, *case) for side in sides for case in _cases(device, side, max(1, numel // side**2))]
    for attempt in range(1 + rounds):
        if attempt > 1 and agree(time.perf_counter() - started) > limit_s:
            break
        for side, name, run, count in cases:
            wait(device)
            agree(0.0)
            start = time.perf_counter()
            run()
            wait(device)
            seconds = (time.perf_counter() - start) / count
            if attempt:
                samples.setdefault((name, side), []).append(seconds)
    return [
        PassTiming(name, side, min(found), statistics.median(found) / min(found) - 1.0)
        for (name, side), found in samples.items()
    ]


def _cases(device: torch.device, side: int, count: int) -> list[tuple[str, Callable[[], None], int]]:
    """Each pass over ``count`` shards, with the elements that it passes over."""
    foreach = device.type != "cpu"
    # of ones, as an operating system keeps zeros nowhere
    params, grads, momenta = (list(torch.ones(count, side, side, device=device)) for _ in range(3))
    packed = torch.ones(count * side * side, dtype=_WIRE, device=device)
    shards = list(packed.view(count, side, side))
    stack = torch.ones(count, 2 * side, side, dtype=_WIRE, device=device)

    def blend() -> None:
        blend_momentum(grads, momenta, shards, momentum=0.95, nesterov=True, foreach=foreach)

    def copy() -> None:
        for number, shard in enumerate(shards):
            stack[number, side:].copy_(shard)

    def apply() -> None:
        apply_direction(params, shards, lr=0.02, weight_decay=0.1, scale=1.0, foreach=foreach)

    return [("blend", blend, packed.numel()), ("copy", copy, packed.numel()), ("apply", apply, packed.numel())]
