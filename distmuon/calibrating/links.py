"""How long collectives take between ranks of one machine, and between machines.

Every rank takes part at once, as in training: on all machines the local groups talk at the same time, and so do all
groups of one rank of each machine, which share what adapters there are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distmuon.calibrating.devices import wait
from distmuon.calibrating.ranks import Ranks
from distmuon.comm.group import all_gather, default_group, warm_up

COLLECTIVES = ("exchange", "reduce", "gather")
_WIRE, _SUMMED = torch.bfloat16, torch.float32
# A sample moves as many bytes as this, by 32 collectives at most, so that what a network lets through in a burst does
# not pass for its rate
_SAMPLE_BYTES, _MOST_TIMES = 1 << 21, 32
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class LinkTiming:
    """Time of one collective of one size.

    Attributes:
        link: ``"local"`` or ``"remote"``.
        collective: One of :data:`COLLECTIVES`: an all-to-all, an all-reduce or an all-gather.
        ranks: Of a group.
        size: Bytes that were asked for; ``nbytes`` but for the rounding to whole elements.
        nbytes: That leave each rank by the usual algorithm, as :class:`distmuon.speeds.Link` counts them.
        seconds: Until the last rank had finished: a quarter of the rounds took less.
        spread: How much longer the median round took, as a fraction of ``seconds``.
    """

    link: str
    collective: str
    ranks: int
    size: int
    nbytes: int
    seconds: float
    spread: float


@dataclass
class _Case:
    collective: str
    size: int
    nbytes: int
    run: Callable[[], None]
    samples: list[float]


def measure_links(
    ranks: Ranks,
    sizes: Sequence[int],
    *,
    rounds: int = 25,
    limit_s: float = 12.0,
    longest_s: float = 1.5,
    say: Callable[[str], object] = print,
) -> list[LinkTiming]:
    """Time the collectives of a step; all ranks call this together.

    An all-to-all moves an equal part to each other rank and nothing to oneself, in bfloat16, as does an all-gather; an
    all-reduce adds up float32. Each is awaited before the next begins.

    Args:
        ranks: Who talks.
        sizes: Bytes that leave each rank, but for rounding.
        rounds: Samples of each case, after a first that does not count.
        limit_s: No round of a class of links begins later than this many seconds after the first, but for the first 3.
        longest_s: A size that would take more seconds than this, going by smaller ones, is left out.
        say: Called with a line for each case that is left out.

    Returns:
        The timings of each class of links that there is, the same on all ranks.
    """
    found = []
    for link, group in _groups(ranks).items():
        most = round(ranks.agree(0 if group is None else dist.get_world_size(group)))
        if group is not None:
            warm_up(group, ranks.device)
        cases = []
        for collective in COLLECTIVES:
            cases += _warm(ranks, link, collective, group, sizes, longest_s, say)
        started = time.perf_counter()
        for attempt in range(rounds):
            if attempt >= _FEWEST_ROUNDS and ranks.agree(time.perf_counter() - started) > limit_s:
                break
            for case in cases:
                case.samples.append(_once(ranks, case))
        found += [_timing(link, most, case) for case in cases]
    return found


def _groups(ranks: Ranks) -> dict[str, dist.ProcessGroup | None]:
    """The groups of this rank by class of links; None where others have one and this rank has not."""
    nodes = ranks.nodes
    if len(nodes) == 1:
        return {"local": default_group()} if ranks.size > 1 else {}
    found: dict[str, dist.ProcessGroup | None] = {}
    if max(map(len, nodes)) > 1:
        found["local"] = _own(ranks.rank, [node for node in nodes if len(node) > 1])
    across = [tuple(node[place] for node in nodes) for place in range(min(map(len, nodes)))]
    found["remote"] = _own(ranks.rank, across)
    return found


def _own(rank: int, sets: Sequence[tuple[int, ...]]) -> dist.ProcessGroup | None:
    """Make a group of each set, which takes every rank of the job, and give this rank's own."""
    own = None
    for members in sets:
        group = dist.new_group(list(members))
        if rank in members:
            own = group
    return own


def _warm(
    ranks: Ranks,
    link: str,
    collective: str,
    group: dist.ProcessGroup | None,
    sizes: Sequence[int],
    longest_s: float,
    say: Callable[[str], object],
) -> list[_Case]:
    """Cases of a collective, smallest first, each run once; those that would take too long are told and left out."""
    cases: list[_Case] = []
    seen = 0.0
    for size in sorted(sizes):
        predicted = seen * size / cases[-1].size if cases else 0.0
        if predicted > longest_s:
            say(f"left out: {collective} of {size} bytes over {link} links would take about {predicted:.1f} s.")
            continue
        case = _case(collective, group, size, ranks.device)
        # what leaves differs by a few bytes between groups of different sizes
        case.nbytes = round(ranks.agree(case.nbytes))
        seen = _once(ranks, case)
        cases.append(case)
    return cases


def _case(collective: str, group: dist.ProcessGroup | None, size: int, device: torch.device) -> _Case:
    if group is None:
        return _Case(collective, size, 0, _nothing, [])
    own, ranks = dist.get_rank(group), dist.get_world_size(group)
    if collective == "reduce":
        numel = max(1, size * ranks // (2 * (ranks - 1) * _SUMMED.itemsize))
        summed = torch.zeros(numel, dtype=_SUMMED, device=device)
        leaving = numel * _SUMMED.itemsize * 2 * (ranks - 1) // ranks

        def reduce() -> None:
            dist.all_reduce(summed, group=group)

        return _Case(collective, size, leaving, reduce, [])
    part = max(1, size // ((ranks - 1) * _WIRE.itemsize))
    leaving = part * (ranks - 1) * _WIRE.itemsize
    if collective == "gather":
        mine = torch.ones(part, dtype=_WIRE, device=device)
        all_parts = torch.zeros(part * ranks, dtype=_WIRE, device=device)

        def gather() -> None:
            work = all_gather(all_parts, mine, group)
            assert work is not None
            work.wait()

        return _Case(collective, size, leaving, gather, [])
    send, receive = (torch.ones(part * (ranks - 1), dtype=_WIRE, device=device) for _ in range(2))
    splits = [0 if rank == own else part for rank in range(ranks)]

    def exchange() -> None:
        work = dist.all_to_all_single(receive, send, splits, splits, group=group, async_op=True)
        work.wait()

    return _Case(collective, size, leaving, exchange, [])


def _nothing() -> None:
    pass


def _once(ranks: Ranks, case: _Case) -> float:
    """Seconds of a collective, until the last rank has finished, all of which set out together."""
    times = min(_MOST_TIMES, max(1, _SAMPLE_BYTES // case.size))
    wait(ranks.device)
    ranks.agree(0.0)
    start = time.perf_counter()
    for _ in range(times):
        case.run()
    wait(ranks.device)
    return ranks.agree(time.perf_counter() - start) / times


def _timing(link: str, ranks: int, case: _Case) -> LinkTiming:
    # the threads of a collective meet late now and then, so its fastest round is luck; slow ones tell of others' work
    seconds = sorted(case.samples)[len(case.samples) // 4]
    spread = statistics.median(case.samples) / seconds - 1.0
    return LinkTiming(link, case.collective, ranks, case.size, case.nbytes, seconds, spread)
