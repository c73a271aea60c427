"""How many ranks own each matrix: team sizes under which the makespan is least (moldable tasks)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from distmuon.plan.packing import Counts, Packing, Rule, deal, pack, singles
from distmuon.plan.pieces import Batch
from distmuon.plan.search import refine

# The search ends when target and bound are this close
_CLOSE = 0.001
# Another packing must shorten the makespan by more than this: a plan with less work is worth as much
_WORTH = 0.005
# And teams by more than this, since predictions are no better
_TEAMS_WORTH = 0.02
# Units looked at and pieces put down in all: a count, so that every rank stops at the same place
_EFFORT = 300_000
_EFFORT_A_PIECE = 20


@dataclass
class _Search:
    batches: Sequence[Batch]
    world: int
    ranks: int
    effort: int

    def pack(self, counts: Counts, rule: Rule) -> Packing:
        packing = pack(self.batches, counts, rule, self.world)
        self.effort -= packing.effort
        return packing

    def even(self, counts: Counts, rule: Rule, target: int) -> Iterator[Packing]:
        """Packings as short as ``target``, ever more even ones."""
        # the later entries are small, and the more of them go to the emptiest rank, the more even is the rest
        low, high = 0, sum(map(bool, itertools.chain.from_iterable(counts)))
        while low < high:
            middle = (low + high) // 2
            tried = self.pack(counts, replace(rule, last=middle))
            if tried.makespan <= target:
                high = middle
                yield tried
            else:
                low = middle + 1

    def work(self, counts: Counts) -> int:
        return sum(
            number * way.size * way.cost
            for batch, row in zip(self.batches, counts, strict=True)
            for way, number in zip(batch.ways, row, strict=True)
        )

    def smallest(self, target: int) -> Counts | None:
        """The smallest teams with which each piece alone stays within ``target``."""
        rows = []
        for batch in self.batches:
            fits = [w for w, way in enumerate(batch.ways) if way.cost <= target]
            if not fits:
                return None
            rows.append(tuple(len(batch.pieces) * (w == fits[0]) for w in range(len(batch.ways))))
        return tuple(rows)

    def reach(self, rule: Rule) -> Counts | None:
        """Counts with which everything fits, as far as a search from the smallest teams finds any."""
        target = rule.target
        counts = self.smallest(target)
        if counts is None or self.work(counts) > target * self.ranks:
            return None
        excess = self.pack(counts, rule).excess(target)
        improved = True
        while excess and improved and self.effort > 0:
            improved = False
            for b, a, z in list(_moves(self.batches, counts, target)):
                number = counts[b][a]
                while number and excess and self.effort > 0:
                    tried = _moved(counts, b, a, z, min(number, counts[b][a]))
                    if tried != counts and self.work(tried) <= target * self.ranks:
                        beyond = self.pack(tried, rule).excess(target)
                        if beyond < excess:
                            counts, excess, improved = tried, beyond, True
                            number = min(number, counts[b][a])
                            continue
                    number //= 2
        return None if excess else counts


def _moves(batches: Sequence[Batch], counts: Counts, target: int) -> Iterator[tuple[int, int, int]]:
    """Batch, way and another way of it; the costliest batches first, teams that grow before those that shrink."""
    for b, batch in enumerate(batches):
        fits = [w for w, way in enumerate(batch.ways) if way.cost <= target]
        pairs = [(a, z) for a in fits for z in fits if a != z]
        for a, z in sorted(pairs, key=lambda pair: (pair[1] < pair[0], abs(pair[1] - pair[0]), pair)):
            yield b, a, z


def _moved(counts: Counts, b: int, a: int, z: int, number: int) -> Counts:
    row = list(counts[b])
    row[a] -= number
    row[z] += number
    return (*counts[:b], tuple(row), *counts[b + 1 :])


def mold(batches: Sequence[Batch], *, world: int, ranks: int) -> Packing:
    """Choose team sizes, and who owns what.

    A target is bisected: matrices that exceed it go to the smallest team that does not, and where the rest does not
    fit, more of them go to teams for as long as less is left over. Never worse than single owners by longest
    processing time first, nor than dealing them out in turn; within two percent of the best plan found without
    teams, that one is taken.

    Args:
        batches: What is to be owned.
        world: All ranks are below this.
        ranks: Number of ranks.
    """
    # the same search without teams first, so that they are only taken where they pay
    bare = [replace(batch, ways=batch.ways[:1]) for batch in batches]
    best = _shortest(bare, [pack(bare, singles(bare), Rule(0), world), deal(bare, world)], world, ranks)
    if all(len(batch.ways) == 1 for batch in batches):
        return best
    teamed = _shortest(batches, [best], world, ranks)
    return teamed if best.makespan > teamed.makespan * (1 + _TEAMS_WORTH) else best


def _shortest(batches: Sequence[Batch], known: Sequence[Packing], world: int, ranks: int) -> Packing:
    """The best packing that the search finds, or one of those known."""
    alone = singles(batches)
    pieces = sum(len(batch.pieces) for batch in batches)
    search = _Search(batches, world, ranks, max(_EFFORT, _EFFORT_A_PIECE * pieces))
    found = list(known)
    high = bar = min(packing.makespan for packing in found)
    low = max(-(-search.work(alone) // ranks), max((batch.ways[-1].cost for batch in batches), default=0))
    narrow = len({len(batch.ways[0].units) for batch in batches if not batch.pinned}) > 1
    shortest: tuple[Counts, Rule] | None = None
    while high > low * (1 + _CLOSE) and search.effort > 0:
        target = (low + high) // 2
        if target in (low, high):
            break
        for rule in (Rule(target, narrow=narrow, teams=False), Rule(target, narrow=narrow), Rule(target))[: 2 + narrow]:
            counts = search.reach(rule)
            if counts is not None:
                found.append(search.pack(counts, rule))
                shortest = counts, rule
                high = found[-1].makespan
                break
        else:
            low = target
    limit = min(bar, int(min(packing.makespan for packing in found) * (1 + _WORTH)))
    if shortest is not None:
        found += search.even(*shortest, limit)
    fair = [packing for packing in found if packing.makespan <= limit]
    return refine(batches, min(fair, key=lambda packing: (packing.work, packing.most_numel, packing.makespan)))
