"""Which rank stores what of a parameter: the input of a plan."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

from distmuon.plan.boxes import Box, chunk
from distmuon.plan.companions import Companion
from distmuon.plan.layouts import Holding as Holding
from distmuon.plan.layouts import Layout, Shares, check_holdings, layout_of
from distmuon.plan.matrices import MatrixSpec


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
    """A parameter on Muon, or a block of one, as a plan sees it.

    Attributes:
        matrices: Its name and the matrices in it.
        shape: Its global shape.
        holdings: Who stores what, by ascending rank; together the ranks of one replica cover it once.
        group: Index of its parameter group.
        kind: What must be equal inside a bucket beside the shape, such as dtype and iteration.
        cost: Time to orthogonalize one of its matrices, in any unit.
        teams: Teams that may own one of its matrices, by ascending size; none: a single rank does.
        whole: Whether it is all of a parameter; else a block of one, whose other blocks may have other owners.
        companion: Second moments that travel with its matrices; no team owns these then.
    """

    matrices: MatrixSpec
    shape: tuple[int, ...]
    holdings: tuple[Holding, ...]
    group: int = 0
    kind: str = ""
    cost: int = 1
    teams: tuple[TeamCost, ...] = ()
    whole: bool = True
    companion: Companion | None = None

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.matrices.parameter

    @property
    def matrix_numel(self) -> int:
        """Elements of one matrix."""
        return self.matrices.rows * self.matrices.cols

    @functools.cached_property
    def stacked(self) -> bool:
        """Whether the first axis counts matrices."""
        return self.matrices.stacked_in(self.shape)

    @property
    def replicated(self) -> bool:
        """Whether elements are stored by more than one rank."""
        return self.layout.replicated

    @functools.cached_property
    def layout(self) -> Layout:
        """Its holdings, indexed."""
        return layout_of(self.holdings)

    def digest(self) -> str:
        """SHA-256 of everything in it, the same in every process."""
        facts = (
            self.matrices,
            self.shape,
            self.group,
            self.kind,
            self.cost,
            self.teams,
            self.whole,
            self.layout.digest,
            self.companion and self.companion.digest(),
        )
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

    def shares(self, first: int, part: int = 0, parts: int = 1) -> Shares:
        """Who stores how much of one matrix, or of a slab of it; matrices of a stack that are stored alike share it."""
        start = self.layout.run_of(first) if self.stacked else 0
        return self.layout.shares(self.box_of(start, 1, part, parts))


def check_cover(spec: ParameterSpec) -> None:
    """Refuse holdings that are not one copy of the parameter for each replica.

    Raises:
        ValueError: naming the parameter, if boxes overlap, leave its shape, or miss elements.
    """
    check_holdings(spec.name, spec.shape, spec.holdings)
