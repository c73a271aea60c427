"""Which rank stores what of a parameter: the input of a plan."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distmuon.plan.boxes import Box, chunk
from distmuon.plan.matrices import MatrixSpec


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank stores of a parameter.

    Attributes:
        rank: The global rank.
        box: Its elements; may be empty.
        replica: Coordinates on the replicated axes of the parameter's mesh. Ranks of equal ``replica``
            store the parameter once among them, and are the ones that it is gathered from.
    """

    rank: int
    box: Box
    replica: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TeamCost:
    """What a matrix costs when several ranks own it together, each a slab along its long side.

    Attributes:
        size: Number of ranks.
        cost: Time of each of them, in the unit of :attr:`ParameterSpec.cost`, talk among them included.
    """

    size: int
    cost: int


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter on Muon as a plan sees it.

    Attributes:
        matrices: Its name and the matrices in it.
        shape: Its global shape.
        holdings: Who stores what, by ascending rank; together the ranks of one replica cover it once.
        group: Index of its parameter group.
        kind: What must be equal inside a bucket beside the shape, such as dtype and iteration.
        cost: Time to orthogonalize one of its matrices, in any unit.
        teams: Teams that may own one of its matrices, by ascending size; none: a single rank does.
    """

    matrices: MatrixSpec
    shape: tuple[int, ...]
    holdings: tuple[Holding, ...]
    group: int = 0
    kind: str = ""
    cost: int = 1
    teams: tuple[TeamCost, ...] = ()

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.matrices.parameter

    @property
    def matrix_numel(self) -> int:
        """Elements of one matrix."""
        return self.matrices.rows * self.matrices.cols

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts matrices."""
        return len(self.shape) == 3 and self.shape[1:] == (self.matrices.rows, self.matrices.cols)

    @functools.cached_property
    def replicated(self) -> bool:
        """Whether elements are stored by more than one rank."""
        return len({holding.replica for holding in self.holdings}) > 1

    def digest(self) -> str:
        """SHA-256 of everything in it, the same in every process."""
        facts = (self.matrices, self.shape, self.group, self.kind, self.cost, self.teams, digest_of(self.holdings))
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @property
    def slab_axis(self) -> int:
        """The axis of the parameter that runs along the long side of its matrices."""
        return int(self.stacked) + int(self.matrices.cols >= self.matrices.rows)

    def cost_of(self, parts: int) -> int:
        """Time of each rank of a team of ``parts`` ranks for one matrix; 1: of a single owner."""
        return self.cost if parts == 1 else next(team.cost for team in self.teams if team.size == parts)

    def box_of(self, first: int, count: int, part: int = 0, parts: int = 1) -> Box:
        """The elements of ``count`` consecutive matrices, or of one of ``parts`` slabs of each."""
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        if self.stacked:
            offsets[0], sizes[0] = first, count
        if parts > 1:
            axis = self.slab_axis
            offsets[axis], sizes[axis] = chunk(self.shape[axis], part, parts)
        return Box(tuple(offsets), tuple(sizes))


@functools.lru_cache(maxsize=256)
def digest_of(holdings: tuple[Holding, ...]) -> str:
    """SHA-256 of who stores what; models repeat a few layouts hundreds of times."""
    return hashlib.sha256(repr(holdings).encode()).hexdigest()


@functools.lru_cache(maxsize=4096)
def stored_numel(holdings: tuple[Holding, ...], box: Box) -> Mapping[int, int]:
    """Elements of ``box`` by the rank that stores some of them; a stack of experts has many boxes, a matrix one."""
    shared = {holding.rank: holding.box.intersect(box) for holding in holdings}
    return {rank: part.numel for rank, part in shared.items() if part is not None}


def check_cover(spec: ParameterSpec) -> None:
    """Refuse holdings that are not one copy of the parameter for each replica.

    Raises:
        ValueError: naming the parameter, if boxes overlap, leave its shape, or miss elements.
    """
    whole = Box.whole(spec.shape)
    by_replica: dict[tuple[int, ...], list[Holding]] = {}
    for holding in spec.holdings:
        by_replica.setdefault(holding.replica, []).append(holding)
    for replica, holdings in by_replica.items():
        parts = [holding for holding in holdings if holding.box.numel]
        inside = all(whole.covers(holding.box) for holding in parts)
        if inside and sum(holding.box.numel for holding in parts) == whole.numel and _disjoint(parts):
            continue
        boxes = ", ".join(f"rank {h.rank}: {h.box.offsets} + {h.box.sizes}" for h in holdings[:8])
        raise ValueError(
            f"the shards of parameter {spec.name!r}, shape {spec.shape}, do not cover it once in replica "
            f"{replica} ({boxes}): this layout is not one that torch's DTensor shards describe."
        )


def _disjoint(holdings: Sequence[Holding]) -> bool:
    """Whether no two boxes meet; boxes are ordered by offset, so only those that touch on axis 0 are compared."""
    ordered = sorted((holding.box for holding in holdings), key=lambda box: box.offsets)
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                break
            if box.intersect(other) is not None:
                return False
    return True
