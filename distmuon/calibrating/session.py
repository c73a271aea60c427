"""What one process measures, and what many that measured at the same time found together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from distmuon.calibrating.links import LinkTiming, measure_links
from distmuon.calibrating.measure import Timing, measure
from distmuon.calibrating.passes import PassTiming, measure_passes
from distmuon.calibrating.ranks import Ranks, alone, launched, start
from distmuon.calibrating.shapes import Shape

_T = TypeVar("_T", Timing, PassTiming)
# With the start of processes, which import torch one after the other where cores are few
_LINKS_S, _ALL_S = 120.0, 300.0


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        shapes: Of matrices; empty: no engines.
        engines: Names.
        sides: Of shards that passes go over; empty: none.
        numel: Elements of all shards of one size.
        sizes: Bytes that travel; empty: no links.
    """

    shapes: tuple[Shape, ...] = ()
    engines: tuple[str, ...] = ()
    sides: tuple[int, ...] = ()
    numel: int = 1
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What was measured, case by case."""

    engines: list[Timing] = field(default_factory=list)
    passes: list[PassTiming] = field(default_factory=list)
    links: list[LinkTiming] = field(default_factory=list)


def session(ranks: Ranks, job: Job) -> Findings:
    """Measure on one process; all of them call this together, and every case has all of them busy."""
    say: Callable[[str], object] = print if ranks.rank == 0 else _quiet
    # links first: a group that does not work ends it all before the long part
    links = measure_links(ranks, job.sizes, say=say) if job.sizes else []
    passes = measure_passes(ranks.device, job.sides, job.numel, agree=ranks.agree) if job.sides else []
    engines = measure(job.shapes, job.engines, device=ranks.device, say=say, agree=ranks.agree) if job.shapes else []
    return Findings(engines, passes, links)


def combined(found: Sequence[Findings]) -> Findings:
    """The median over processes of each case; of links the first one's, as they agreed on those."""
    engines = [_median(same) for same in zip(*(each.engines for each in found), strict=True)]
    passes = [_median(same) for same in zip(*(each.passes for each in found), strict=True)]
    return Findings(engines, passes, found[0].links)


def run(job: Job, *, device: torch.device, count: int, threads: int, in_launch: bool) -> Findings | None:
    """Measure alone, on new processes, or on those that torchrun started.

    Args:
        job: What.
        device: What each process measures.
        count: Processes that measure engines and passes at the same time; not looked at with ``in_launch``.
        threads: Of each new process.
        in_launch: Whether torchrun started this one.

    Returns:
        What was found; None on other processes of torchrun than the first.

    Raises:
        distmuon.calibrating.ranks.RanksError: if processes cannot meet or finish.
    """
    if in_launch:
        with launched(device) as ranks:
            found = ranks.gather(session(ranks, job))
            return combined(found) if ranks.rank == 0 else None
    if count > 1:
        return combined(start(count, session, job, device=device, threads=threads, timeout_s=_ALL_S))
    links: list[LinkTiming] = []
    if job.sizes:
        pair = start(2, session, Job(sizes=job.sizes), device=device, threads=1, timeout_s=_LINKS_S)
        links = pair[0].links
    return replace(session(alone(device), replace(job, sizes=())), links=links)


def _median(same: Sequence[_T]) -> _T:
    """One case's timings of all processes."""
    seconds = statistics.median(timing.seconds for timing in same)
    return replace(same[0], seconds=seconds, spread=statistics.median(timing.spread for timing in same))


def _quiet(line: str) -> None:
    pass
