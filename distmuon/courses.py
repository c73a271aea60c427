"""The plans of a part of the parameters: one of whole matrices, others in which some are cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from distmuon.comm.agree import raise_on_all
from distmuon.comm.buffers import BufferPool
from distmuon.comm.exchange import Exchange
from distmuon.comm.group import ProcessGroup, from_every_rank, own_rank, prefers_all_gather
from distmuon.comm.team import form_teams
from distmuon.costing import block_spec, pace_of
from distmuon.facts import Entry, Fact, Key
from distmuon.moments import words
from distmuon.numerics.costs import CostTable
from distmuon.options import Options
from distmuon.pipeline import Pipeline
from distmuon.plan.blocks import Block, Placing, blocks_of, row_blocks
from distmuon.plan.companions import Companion, Companions
from distmuon.plan.nodes import Nodes
from distmuon.plan.pace import plan_step
from distmuon.plan.parameters import Holding, ParameterSpec
from distmuon.plan.plan import Plan
from distmuon.plan.simulate import GLOO, NCCL
from distmuon.staging import Staging
from distmuon.stats import StepClock


@dataclass(frozen=True)
class Course:
    """One plan of a part of the parameters, and what runs it.

    Attributes:
        pipeline: Runs the matrices.
        planned: For each parameter of the plan its place among the keys of the part.
        blocks: For each parameter of the plan what it is of the parameter with that key.
        matrices: This rank's parameters on Muon, by place in the plan.
    """

    pipeline: Pipeline
    planned: tuple[int, ...]
    blocks: tuple[Block, ...]
    matrices: dict[int, Entry]


@dataclass(frozen=True)
class Planner:
    """What all plans of a part have in common.

    Attributes:
        merged: Who stores what of each parameter, and what is known of it.
        moments: Who stores what of the second moments of each parameter that has some.
        entries: This rank's parameters by place in ``merged``.
        nodes: Which ranks share a node, all ranks of the part.
        exchange: Moves packed buffers.
        device: Where matrices are multiplied.
        group: The process group; None where this rank is alone.
        options: The settings of the optimizer.
        table: Speed of the engines, the same on all ranks.
        clock: Times the phases of a step.
        alike: Whether the ranks have devices of one kind; unlike ones would predict other costs, and take each
            other's word.
        staging: Copies between ``device`` and the host; None: no parameter is offloaded to it.
        pool: Lends buffers to the one course that is run at a time.
    """

    merged: Mapping[Key, tuple[list[Holding], Fact]]
    moments: Mapping[Key, Sequence[Holding]]
    entries: Mapping[int, Entry]
    nodes: Nodes
    exchange: Exchange
    device: torch.device
    group: ProcessGroup | None
    options: Options
    table: CostTable
    clock: StepClock
    alike: bool
    staging: Staging | None
    pool: BufferPool = field(default_factory=BufferPool)

    def plan(self, in_blocks: frozenset[int] = frozenset()) -> Course:
        """Plan without a word to other ranks, who make the same plan.

        Args:
            in_blocks: Groups whose matrices are cut into blocks, by index.

        Raises:
            ValueError: for shards that do not make up a parameter.
        """
        specs, planned, blocks = [], [], []
        placing, companions = Placing(), Companions(words(self.options.wire_dtype))
        for number, (holdings, fact) in enumerate(self.merged.values()):
            if fact.use_muon:
                for spec, block in self._specs(holdings, fact, placing, companions, cut=fact.group in in_blocks):
                    specs.append(spec)
                    blocks.append(block)
                    planned.append(number)
        options, rank = self.options, own_rank()
        all_gather = self.group is not None and prefers_all_gather(self.group, self.device)
        pace = pace_of(self.table, self.device, options.wire_dtype.itemsize, NCCL if all_gather else GLOO)
        ranks = tuple(sorted(rank for node in self.nodes for rank in node))
        plan = plan_step(specs, ranks=ranks, nodes=self.nodes, bucket_bytes=options.bucket_bytes, pace=pace)
        return Course(
            pipeline=Pipeline(
                plan=plan,
                rank=rank,
                exchange=self.exchange,
                device=self.device,
                options=options,
                table=self.table,
                all_gather=all_gather,
                clock=self.clock,
                pool=self.pool,
                staging=self.staging,
                in_blocks=in_blocks,
            ),
            planned=tuple(planned),
            blocks=tuple(blocks),
            matrices={
                place: self.entries[number]
                for place, (number, spec) in enumerate(zip(planned, specs, strict=True))
                if number in self.entries and any(holding.rank == rank for holding in spec.holdings)
            },
        )

    def meet(self, course: Course) -> None:
        """Compare a plan with those of the other ranks, and form its teams; all call this together.

        Raises:
            ValueError: on every rank, naming the first difference.
        """
        if self.group is not None:
            plan = course.pipeline.plan
            _compare_digests(self.group, plan)
            course.pipeline.teams = form_teams(plan.teams, self.group, self.device)

    def plan_together(self, in_blocks: frozenset[int]) -> Course:
        """:meth:`plan` and :meth:`meet`; what goes wrong anywhere is raised everywhere."""
        course, error = None, None
        try:
            course = self.plan(in_blocks)
        except ValueError as raised:
            error = raised
        if self.group is not None:
            raise_on_all(self.group, error)
        elif error is not None:
            raise error
        assert course is not None, "an error was raised on all ranks"
        self.meet(course)
        return course

    def _specs(
        self, holdings: Sequence[Holding], fact: Fact, placing: Placing, companions: Companions, *, cut: bool
    ) -> Iterator[tuple[ParameterSpec, Block]]:
        """What a plan is made of."""
        assert fact.request is not None
        layout = fact.layout
        # ranks have devices of other numbers, and one plan
        kind = torch.device(self.device.type)
        blocks, costs = blocks_of(fact.name, layout.shape, fact.reading), fact.costs
        if cut:
            blocks, costs = row_blocks(fact.name, layout.shape, fact.reading, fact.blocks), fact.costs_between
        by_replica: dict[tuple[int, ...], list[Holding]] = {}
        for holding in sorted(holdings, key=lambda holding: holding.rank):
            # an update that each replica computes for itself is that of a parameter of its own
            by_replica.setdefault(holding.replica if self.options.replicas == "repeat" else (), []).append(holding)
        for members in by_replica.values():
            for number, block, held in placing.place(fact.name, blocks, tuple(members)):
                spec = block_spec(
                    block,
                    held,
                    group=fact.group,
                    kind=f"{layout.device} {layout.dtype} {fact.iteration}",
                    device=kind,
                    request=fact.request,
                    table=self.table,
                    # blocks are there to stay where they lie, whatever a team would save
                    nodes=self.nodes if self.options.teams and not cut else None,
                    cost=None if self.alike else costs[number],
                    companion=self._companion(companions, fact, block, held),
                )
                yield spec, block

    def _companion(self, companions: Companions, fact: Fact, block: Block, held: Sequence[Holding]) -> Companion | None:
        """The second moments of a block on the ranks that share it."""
        if fact.moments is None:
            return None
        ranks = {holding.rank for holding in held}
        moments = [holding for holding in self.moments.get(fact.key, ()) if holding.rank in ranks]
        return companions.of(fact.moments, block, moments)


def _compare_digests(group: ProcessGroup, plan: Plan) -> None:
    """Plans are made from the same facts, so they differ only between different versions of this package."""
    digests = from_every_rank(plan.digest(), group)
    if len(set(digests)) == 1:
        return
    # every rank has the same digests, so all ask for more or none
    details = from_every_rank([(spec.name, spec.digest()) for spec in plan.parameters], group)
    other = next(number for number, digest in enumerate(digests) if digest != digests[0])
    differing = [a for a, b in zip(details[0], details[other], strict=False) if a != b]
    first = f"parameter {differing[0][0]!r}" if differing else "the owners"
    raise ValueError(
        f"the plans of ranks {plan.ranks[0]} and {plan.ranks[other]} differ, first in {first}: run the same version of "
        "distmuon on every rank."
    )
