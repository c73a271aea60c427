"""When waves of buckets set out and when their updates are applied: as far ahead as memory allows.

A rank that owns nothing of a wave has no reason to wait for those that do. So waves are gathered before their turn, and
updates applied after it, for as long as no rank holds more than it would with one arriving and one leaving at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.plan.plan import Plan


@dataclass(frozen=True)
class Schedule:
    """By wave, in the order in which they are orthogonalized.

    Attributes:
        begun: Gathers of so many waves are under way, or done, when this one is orthogonalized.
        settled: Updates of so many waves have been applied when this one's set out.
    """

    begun: tuple[int, ...]
    settled: tuple[int, ...]


def schedule(plan: Plan) -> Schedule:
    """How far ahead waves are gathered, and how long updates may be on their way.

    A pure function of the plan, so that all ranks start the same exchanges in the same order.
    """
    held = [wave.owned_numel() for wave in plan.waves]
    # what all ranks send together is what they own; each sends about its share
    sent = [
        sum(numels.values()) / len(plan.ranks) if wave.gathers else 0.0
        for numels, wave in zip(held, plan.waves, strict=True)
    ]
    begun = _reach(held, sent, 2)
    # updates leave in the order in which gathers arrive, so the same windows serve from behind; of several legs two are
    # on their way at a time
    moved = [
        (wave.returns + wave.sends) * min(2, wave.legs) / wave.legs if wave.scatters else 0.0 for wave in plan.waves
    ]
    backwards = _reach(held[::-1], moved[::-1], 1)[::-1]
    settled = tuple(len(held) - reach for reach in backwards)
    return Schedule(begun, settled)


def _reach(held: Sequence[Counter[int]], shares: Sequence[float], least: int) -> tuple[int, ...]:
    """For each wave the end of the longest run from it on that takes no more than ``least`` waves take anywhere."""
    count = len(held)
    most = max((_fullest(held, shares, first, first + least) for first in range(count)), default=0.0)
    ends = []
    end = 0
    window: Counter[int] = Counter()
    share = 0.0
    for first in range(count):
        while end < count:
            candidate = share + shares[end]
            fits = all(window[rank] + numel + candidate <= most for rank, numel in held[end].items())
            # others of the window hold no more of it, but send their share
            fits = fits and max(window.values(), default=0) + candidate <= most
            if end >= first + least and not fits:
                break
            window.update(held[end])
            share = candidate
            end += 1
        ends.append(end)
        window.subtract(held[first])
        share -= shares[first]
    return tuple(ends)


def _fullest(held: Sequence[Counter[int]], shares: Sequence[float], first: int, end: int) -> float:
    window: Counter[int] = Counter()
    for numels in held[first:end]:
        window.update(numels)
    return max(window.values(), default=0) + sum(shares[first:end])
