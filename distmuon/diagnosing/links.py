"""How fast are the links within and between machines, and is one of them slow?

All ranks talk at the same time, as in a step. A collective is as slow as its slowest rank, so neighbours in a ring also
talk in pairs: a rank that is slow with all neighbours is slow itself, and one that is slow with one has a slow link.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from distmuon.calibrating.devices import wait
from distmuon.diagnosing.findings import WARNING, Facts, Finding, Problem, conclude
from distmuon.diagnosing.job import Job, slow
from distmuon.diagnosing.places import Places

WITHIN, BETWEEN = "within machines", "between machines"
# Bytes that leave a rank
_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# After a first that connects; of the rest the fastest counts
_SAMPLES = 4


def measure(job: Job) -> Facts:
    """Time collectives and pairs; all ranks call this together.

    Returns:
        For each class of links that this rank has: ``ranks`` of its group, seconds of ``exchange`` (all-to-all) and
        ``reduce`` (all-reduce), ``exchange_rate`` and ``reduce_rate`` (bytes a second that leave this rank), and
        ``pairs`` (seconds by partner).
    """
    found: Facts = {}
    for link, sets in classes(job.places).items():
        members = next((members for members in sets if job.here.rank in members), None)
        if members is None:
            continue
        everyone = len(members) == dist.get_world_size()
        # only its members are here to make it
        group = (
            None
            if everyone
            else dist.new_group(list(members), timeout=job.group_timeout(), use_local_synchronization=True)
        )
        found[link] = _measure(job, members, group)
        if group is not None:
            dist.destroy_process_group(group)
    return found


def classes(places: Places) -> dict[str, list[tuple[int, ...]]]:
    """The groups of ranks of each class of links: those of one machine, and the first, second, ... of all machines."""
    nodes = places.nodes
    found = {}
    if any(len(node) > 1 for node in nodes):
        found[WITHIN] = [node for node in nodes if len(node) > 1]
    if len(nodes) > 1:
        found[BETWEEN] = [tuple(node[place] for node in nodes) for place in range(min(map(len, nodes)))]
    return found


def _measure(job: Job, members: Sequence[int], group: dist.ProcessGroup | None) -> Facts:
    ranks = len(members)
    nbytes = _BYTES.get(job.device.type, _BYTES["cuda"])
    part = max(1, nbytes // (4 * (ranks - 1)))
    send, receive = (torch.zeros(part * ranks, device=job.device) for _ in range(2))
    # as many bytes leave each rank: 2 (n - 1) / n of the tensor by the usual algorithm
    summed = torch.zeros(part * ranks // 2, device=job.device)
    leaving = 4 * part * (ranks - 1)

    def exchange() -> None:
        dist.all_to_all_single(receive, send, group=group)

    def reduce() -> None:
        dist.all_reduce(summed, group=group)

    facts: Facts = {"ranks": ranks, "exchange": _fastest(job, group, exchange), "reduce": _fastest(job, group, reduce)}
    facts |= {f"{name}_rate": leaving / facts[name] for name in ("exchange", "reduce")}
    facts["pairs"] = {}
    for partner in rounds(members, job.here.rank):
        half = nbytes // 4

        def talk(partner: int | None = partner, half: int = half) -> None:
            if partner is not None:
                _talk(partner, send[:half], receive[:half], group)

        seconds = _fastest(job, group, talk)
        if partner is not None:
            facts["pairs"][str(partner)] = seconds
    return facts


def rounds(members: Sequence[int], rank: int) -> Iterator[int | None]:
    """The neighbour in the ring that a rank talks to in each round; None where it only waits.

    No rank has two neighbours in one round, and all ranks have as many rounds.
    """
    n, own = len(members), list(members).index(rank)
    edges = [(i, (i + 1) % n) for i in range(n)] if n > 2 else [(0, 1)]
    # edges of a ring of odd length need a third round
    turns = [2 if n % 2 and i == n - 1 else i % 2 for i in range(len(edges))]
    for turn in range(max(turns) + 1):
        now = [edge for edge, at in zip(edges, turns, strict=True) if at == turn and own in edge]
        yield members[sum(now[0]) - own] if now else None


def _talk(partner: int, send: torch.Tensor, receive: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    both = [dist.P2POp(dist.isend, send, partner, group), dist.P2POp(dist.irecv, receive, partner, group)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def _fastest(job: Job, group: dist.ProcessGroup | None, function: Callable[[], None]) -> float:
    """Seconds of this rank's fastest call, each of which all ranks begin together."""
    found = []
    for _ in range(1 + _SAMPLES):
        job.together(group)
        job.entered += 1
        start = time.perf_counter()
        function()
        wait(job.device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A warning for each rank and link that takes more than twice the median."""
    told: list[str] = []
    problems: list[Problem] = []
    for link in classes(places):
        own = {rank: fact[link] for rank, fact in facts.items() if link in fact}
        rates = [min(fact[f"{name}_rate"] for fact in own.values()) / 1e9 for name in ("exchange", "reduce")]
        most = max(fact["ranks"] for fact in own.values())
        told.append(f"{link} all-to-all {rates[0]:.3g} GB/s, all-reduce {rates[1]:.3g} GB/s a rank ({most} ranks)")
        problems += _slow(link, own, places)
    return conclude("links", "" if told else "one rank has none", problems, measured="; ".join(told))


def _slow(link: str, own: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    pairs: dict[tuple[int, int], float] = {}
    for rank, fact in own.items():
        for name, seconds in fact["pairs"].items():
            pair = (min(rank, int(name)), max(rank, int(name)))
            pairs[pair] = max(seconds, pairs.get(pair, 0.0))
    best: dict[int, float] = {}
    for pair, seconds in pairs.items():
        for rank in pair:
            best[rank] = min(seconds, best.get(rank, seconds))
    median = statistics.median_low(best.values())
    bad = slow(best, median)
    for rank in bad:
        found = f"{link} {places.text([rank])} takes {best[rank] / median:.1f} times the median with each neighbour"
        yield Problem(
            WARNING, found, "look at the adapter, cable and load of that machine (ethtool, nvidia-smi topo -m)"
        )
    for pair, seconds in pairs.items():
        if seconds > 2.0 * median and not set(pair) & set(bad):
            found = f"{link} {places.text(pair)} take {seconds / median:.1f} times the median with each other"
            yield Problem(WARNING, found, "look at the switch and cables between them")
