"""What ranks tell each other of their parameters before they plan, put together and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from distmuon.comm.layout import LocalLayout
from distmuon.numerics.costs import CostTable
from distmuon.numerics.lmo import norm_axes
from distmuon.numerics.recipe import Request
from distmuon.plan.companions import Moments
from distmuon.plan.nodes import Nodes
from distmuon.plan.parameters import Holding
from distmuon.plan.reading import Reading
from distmuon.plan.sums import CutSum, cut_sum

Key: TypeAlias = "tuple[str, tuple[int, ...]]"


@dataclass(frozen=True)
class Fact:
    """What one rank says of one parameter. All but ``costs``, ``layout.replica`` and ``layout.box`` must agree.

    Attributes:
        name: The parameter's name.
        group: Index of its group.
        use_muon: Whether it is on Muon.
        reading: What its axes mean.
        iteration: What matrices of one bucket have in common beside shape and dtype.
        request: How its matrices are orthogonalized; None for AdamW.
        settings: What decides its update, for comparison.
        costs: Nanoseconds that a matrix of each of its blocks takes on this rank; among unlike ranks the lowest one's
            word counts.
        layout: Where it lies.
        moments: Its second moments.
        moments_layout: Where these lie.
        lmo: In which norm its step is of unit size; None on Muon and AdamW.
        blocks: How many parts of its rows are orthogonalized by themselves in some steps; 1: none.
        costs_between: As ``costs``, of the blocks of these steps.
    """

    name: str
    group: int
    use_muon: bool
    reading: Reading
    iteration: str
    request: Request | None
    settings: str
    costs: tuple[int, ...]
    layout: LocalLayout
    moments: Moments | None = None
    moments_layout: LocalLayout | None = None
    lmo: str | None = None
    blocks: int = 1
    costs_between: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        """What tells parameters apart: experts of two meshes may share a name."""
        return self.name, self.layout.ranks

    @property
    def norm_axes(self) -> tuple[int, ...]:
        """The axes that the norm of its ``lmo`` runs over."""
        assert self.lmo is not None
        reading, ndim = self.reading, len(self.layout.shape)
        return norm_axes(self.lmo, ndim, flatten=reading.flatten, transposed=reading.transposed)


@dataclass(frozen=True)
class Entry:
    """A parameter of this rank, and what it says of it."""

    param: Tensor
    fact: Fact


@dataclass(frozen=True)
class Said:
    """What one rank tells all others when they plan.

    Attributes:
        version: Of its code.
        settings: Of its optimizer, for comparison.
        table: Its cost table.
        host: What ranks of its node have in common.
        hardware: The class of its device.
        facts: Of its parameters.
        steps: Of its groups whose matrices are whole in some steps only, by label: :func:`distmuon.periods.counted`.
    """

    version: str
    settings: str
    table: CostTable
    host: str
    hardware: str
    facts: list[Fact]
    steps: dict[str, str]


def merge(facts: Mapping[int, Sequence[Fact]]) -> dict[Key, tuple[list[Holding], Fact]]:
    """Put together what the ranks say of each parameter, in the order in which the lowest ranks list them.

    Raises:
        ValueError: if a parameter is missing on a rank that should store some of it, or differs.
    """
    merged: dict[Key, tuple[list[Holding], Fact]] = {}
    first_rank: dict[Key, int] = {}
    for rank, said in facts.items():
        for fact in said:
            holdings, first = merged.setdefault(fact.key, ([], fact))
            first_rank.setdefault(fact.key, rank)
            _compare(first, first_rank[fact.key], fact, rank)
            holdings.append(Holding(rank, fact.layout.box, fact.layout.replica))
    for (name, ranks), (holdings, fact) in merged.items():
        present = {holding.rank for holding in holdings}
        for rank in ranks:
            if rank not in present:
                there = first_rank[name, ranks]
                near = [other.name for other in facts.get(rank, ()) if other.name == name]
                how = "on another mesh" if near else "missing"
                raise ValueError(
                    f"parameter {name!r} of shape {fact.layout.shape} is on rank {there}, shared by ranks "
                    f"{ranks}, and {how} on rank {rank}: build the same model and the same groups on every rank."
                )
    return merged


def moment_holdings(facts: Mapping[int, Sequence[Fact]]) -> dict[Key, list[Holding]]:
    """Who stores what of the second moments of the parameters that have them."""
    found: dict[Key, list[Holding]] = {}
    for rank, said in facts.items():
        for fact in said:
            layout = fact.moments_layout
            if layout is not None:
                found.setdefault(fact.key, []).append(Holding(rank, layout.box, layout.replica))
    return found


def cut_sums(merged: Mapping[Key, tuple[list[Holding], Fact]]) -> dict[int, CutSum]:
    """What the norms of lmo groups need of other ranks, by place of the parameter in ``merged``."""
    found = {}
    for number, (holdings, fact) in enumerate(merged.values()):
        if fact.lmo is not None:
            sums = cut_sum(fact.layout.shape, fact.norm_axes, holdings)
            if sums is not None:
                found[number] = sums
    return found


def _compare(first: Fact, first_rank: int, fact: Fact, rank: int) -> None:
    for what, a, b in (
        ("shape", first.layout.shape, fact.layout.shape),
        ("dtype", first.layout.dtype, fact.layout.dtype),
        ("device type", first.layout.device, fact.layout.device),
        ("group", first.group, fact.group),
        ("settings", first.settings, fact.settings),
    ):
        if a != b:
            raise ValueError(
                f"parameter {fact.name!r} has the {what} {a} on rank {first_rank} and {b} on rank {rank}: build the "
                "same model, with named parameters, and the same groups on every rank."
            )


def compare_versions(ranks: Sequence[int], versions: Sequence[str]) -> None:
    """Refuse ranks that run other code than the first.

    Args:
        ranks: Who tells.
        versions: What each runs.

    Raises:
        ValueError: naming two ranks and their versions.
    """
    for rank, theirs in zip(ranks, versions, strict=True):
        if theirs != versions[0]:
            raise ValueError(
                f"rank {ranks[0]} runs {versions[0]} and rank {rank} runs {theirs}: install the same on every rank, "
                "and restart all of them."
            )


def compare_settings(names: Sequence[str], ranks: Sequence[int], settings: Sequence[str]) -> None:
    """Refuse settings that differ between ranks.

    Args:
        names: Of the settings.
        ranks: Who tells.
        settings: What each tells.

    Raises:
        ValueError: naming two ranks and what they were given.
    """
    for rank, theirs in zip(ranks, settings, strict=True):
        if theirs != settings[0]:
            raise ValueError(
                f"({', '.join(names)}) are "
                f"{settings[0]} on rank {ranks[0]} and {theirs} on rank {rank}: pass the same on every rank."
            )


def compare_steps(ranks: Sequence[int], told: Sequence[Mapping[str, str]]) -> None:
    """Refuse ranks that do not orthogonalize whole matrices in the same steps.

    Args:
        ranks: Who tells.
        told: Where each is in the periods of its groups.

    Raises:
        ValueError: naming the group, and the ranks by where they are.
    """
    for label in dict.fromkeys(label for theirs in told for label in theirs):
        found: dict[str, list[int]] = {}
        for rank, theirs in zip(ranks, told, strict=True):
            found.setdefault(theirs.get(label, "no block_period"), []).append(rank)
        if len(found) > 1:
            where = " and ".join(f"{text} on ranks {members}" for text, members in found.items())
            raise ValueError(
                f"{label} has {where}, so that whole matrices would be due in other steps: load the same state dict on "
                "every rank, and build the same groups."
            )


def nodes_of(ranks: Sequence[int], hosts: Sequence[str]) -> Nodes:
    """The ranks of each host."""
    found: dict[str, list[int]] = {}
    for rank, name in zip(ranks, hosts, strict=True):
        found.setdefault(name, []).append(rank)
    return tuple(tuple(members) for members in found.values())
