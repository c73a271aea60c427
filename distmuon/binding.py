"""From parameter groups to a plan: read what this rank stores, compare over the ranks, plan."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distmuon.comm.agree import raise_on_all
from distmuon.comm.exchange import Exchange, GroupExchange, LocalExchange
from distmuon.comm.group import (
    Mesh,
    ProcessGroup,
    common_ranks,
    compute_device,
    distributed,
    from_every_rank,
    group_of,
    host,
    mesh_ranks,
    own_rank,
    warm_up,
)
from distmuon.comm.layout import as_dtensor, read_layout
from distmuon.comm.verify import VerifiedExchange
from distmuon.costing import owner_cost
from distmuon.courses import Course, Planner
from distmuon.facts import (
    Entry,
    Fact,
    Key,
    Said,
    compare_settings,
    compare_steps,
    compare_versions,
    cut_sums,
    merge,
    moment_holdings,
    nodes_of,
)
from distmuon.groups import Group, check_group, group_names
from distmuon.moments import blank_moments, moments_dtype, moments_in
from distmuon.numerics.costs import CostTable
from distmuon.numerics.hardware import device_class
from distmuon.numerics.recipe import Request
from distmuon.numerics.variants import has_moments
from distmuon.options import Options
from distmuon.periods import advance, counted
from distmuon.pipeline import Pipeline
from distmuon.plan.blocks import Block, blocks_of, row_blocks
from distmuon.plan.boxes import Box
from distmuon.plan.companions import Moments
from distmuon.plan.nodes import Nodes, one_node
from distmuon.plan.parameters import Holding
from distmuon.plan.reading import READING_KEYS, Reading
from distmuon.plan.sums import CutSum
from distmuon.staging import Staging
from distmuon.stats import StepClock
from distmuon.values import FAMILY_KEYS
from distmuon.versions import code_version

logger = logging.getLogger("distmuon")

# Settings that decide what is exchanged and computed, so that ranks must agree on them
_COMPARED = (
    "bucket_bytes",
    "ns_dtype",
    "ns_engine",
    "wire_dtype",
    "foreach",
    "compile",
    "replicas",
    "teams",
    "static_grads",
    "on_nonfinite",
    "verify_exchange",
)


@dataclass
class Part:
    """The parameters that the same ranks step together, or that this rank steps alone.

    Attributes:
        planner: Makes its plans.
        whole: The course of steps in which all matrices are whole.
        keys: All parameters, those of other ranks too, in the order in which they are agreed on.
        shards: For each key, by global rank: a number that is equal for ranks that store the same elements.
        entries: This rank's parameters by place in ``keys``.
        group: The process group; None where this rank is alone.
        active: With ``static_grads``: which keys take part, once that is known.
        sums: For places in ``keys`` that have an ``lmo``: what its norms need of other ranks, where they do.
        latest: The course that was asked for last.
    """

    planner: Planner
    whole: Course
    keys: tuple[Key, ...]
    shards: tuple[dict[int, int], ...]
    entries: dict[int, Entry]
    group: ProcessGroup | None
    active: tuple[bool, ...] | None = None
    sums: dict[int, CutSum] = field(default_factory=dict)
    _courses: dict[frozenset[int], Course] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.latest = self._courses[frozenset()] = self.whole

    @property
    def pipeline(self) -> Pipeline:
        """That of whole matrices."""
        return self.whole.pipeline

    def course(self, in_blocks: frozenset[int]) -> Course:
        """What runs a step; all ranks call this together the first time, with the same groups.

        Args:
            in_blocks: Groups whose matrices are orthogonalized in blocks, by index.
        """
        if in_blocks not in self._courses:
            self._courses[in_blocks] = self.planner.plan_together(in_blocks)
        self.latest = self._courses[in_blocks]
        return self.latest


@dataclass
class Binding:
    """What the optimizer found when it last looked at its parameters.

    Attributes:
        parts: Parameters of several ranks first, then those of this rank alone; either may be missing.
    """

    parts: list[Part]
    _seen: list[tuple[list[Tensor], list[Any]]] = field(default_factory=list)
    _counted: dict[str, str] = field(default_factory=dict)

    def fits(self, groups: Sequence[Group]) -> bool:
        """Whether the groups still hold the parameters that were bound, and count steps from where they were."""
        same = len(self._seen) == len(groups) and all(
            settings == _bound_settings(group)
            and len(params) == len(group["params"])
            and all(old is new for old, new in zip(params, group["params"], strict=True))
            for (params, settings), group in zip(self._seen, groups, strict=True)
        )
        return same and self._counted == counted(groups)

    def advance(self, groups: Sequence[Group]) -> None:
        """Count a step that was made."""
        advance(groups)
        self._counted = counted(groups)


def bind(groups: Sequence[Group], options: Options, mesh: Mesh | None, clock: StepClock) -> Binding:
    """Read the parameters of all groups and plan their step.

    The ranks that share parameters call this together: what each stores is exchanged once, and compared.

    Args:
        groups: The parameter groups.
        options: The settings of the optimizer.
        mesh: Over which plain parameters are replicated; None: they are this rank's own.
        clock: Times the phases of a step.

    Raises:
        ValueError: on every rank, if ranks disagree about a parameter or a setting, or a layout cannot be
            planned; names the parameter and the ranks.
    """
    entries: list[Entry] = []
    error: Exception | None = None
    try:
        entries = list(_entries(groups, options, mesh))
    except Exception as raised:  # whatever it is, the other ranks wait to hear of it
        error = raised
    meshes = [*_meshes(groups), *([] if mesh is None else [mesh])]
    ranks = common_ranks({mesh_ranks(known) for known in meshes}) if distributed() else ()
    parts, steps = [], counted(groups)
    if ranks:
        parts.append(_shared(entries, error, ranks, meshes, options, clock, steps))
    elif error is not None:
        raise error
    alone = [entry for entry in entries if len(entry.fact.layout.ranks) == 1]
    if alone:
        facts = {own_rank(): [entry.fact for entry in alone]}
        device = compute_device(_meshes_of(entry.param for entry in alone), alone[0].param.device)
        options.check_table(device)
        table = options.table(device)
        nodes = one_node((own_rank(),))
        parts.append(_part(alone, facts, nodes, LocalExchange(), device, None, options, table, clock))
    return Binding(parts, [(list(group["params"]), _bound_settings(group)) for group in groups], steps)


def check_stages(groups: Sequence[Group], mesh: Mesh | None, stages: ProcessGroup | None) -> None:
    """Refuse for the stages of a pipeline an axis whose ranks share parameters, as that of data parallelism.

    Args:
        groups: The parameter groups.
        mesh: Over which plain parameters are replicated.
        stages: The ranks that are to be one of each stage; None: there is no pipeline.

    Raises:
        ValueError: naming the ranks.
    """
    if stages is None:
        return
    for known in [*_meshes(groups), *([] if mesh is None else [mesh])]:
        common = sorted({*mesh_ranks(known)} & {*mesh_ranks(stages)})
        if len(common) > 1:
            raise ValueError(
                f"stages is of ranks {list(mesh_ranks(stages))}, and ranks {common} share parameters: stages takes the "
                "axis of the mesh that holds one rank of each stage of the pipeline, as mesh['pp']."
            )


def _bound_settings(group: Group) -> list[Any]:
    """What a plan depends on: matrices of one bucket share their iteration, and ``model.to`` moves parameters."""
    tensors = [(param.dtype, param.device) for param in group["params"]]
    keys = ("use_muon", "lmo", *READING_KEYS, "ns_coefficients", "ns_steps", "eps", "variant", "muon_beta2")
    keys += ("block_period", "blocks")
    return [tensors, *(group[key] for key in keys)]


def _shared(
    entries: Sequence[Entry],
    error: Exception | None,
    ranks: tuple[int, ...],
    meshes: Sequence[Mesh],
    options: Options,
    clock: StepClock,
    steps: dict[str, str],
) -> Part:
    """Exchange facts with the other ranks, and plan; whatever goes wrong anywhere is raised everywhere."""
    group = group_of(ranks, meshes)
    device = compute_device(meshes, next((e.param.device for e in entries if len(e.fact.layout.ranks) > 1), None))
    try:
        options.check_table(device)
    except ValueError as raised:
        error = error or raised
    raise_on_all(group, error)
    mine = [entry for entry in entries if len(entry.fact.layout.ranks) > 1]
    settings = repr(tuple(getattr(options, key) for key in _COMPARED))
    table, hardware = options.table(device), device_class(device)
    said = Said(code_version(), settings, table, host(), hardware, [entry.fact for entry in mine], steps)
    told: list[Said] = from_every_rank(said, group)
    part: Part | None = None
    try:
        compare_versions(ranks, [theirs.version for theirs in told])
        compare_settings(_COMPARED, ranks, [theirs.settings for theirs in told])
        compare_steps(ranks, [theirs.steps for theirs in told])
        facts = {rank: theirs.facts for rank, theirs in zip(ranks, told, strict=True)}
        nodes = nodes_of(ranks, [theirs.host for theirs in told])
        alike = len({theirs.hardware for theirs in told}) == 1
        if options.teams and not alike:
            # a team's ranks have to multiply alike, and these would choose other dtypes for the same matrix
            logger.warning("no matrix is owned by a team, as the devices of the ranks are of several kinds")
            options = dataclasses.replace(options, teams=False)
        # one rank's table for all: engines chosen by their own could differ between unlike machines
        exchange: Exchange = GroupExchange(group, device)
        if options.verify_exchange:
            exchange = VerifiedExchange(exchange, group)
        part = _part(mine, facts, nodes, exchange, device, group, options, told[0].table, clock, alike)
    except ValueError as raised:
        error = raised
    raise_on_all(group, error)
    assert part is not None, "an error was raised on all ranks"
    warm_up(group, device)
    part.planner.meet(part.whole)
    return part


def _part(
    mine: Sequence[Entry],
    facts: dict[int, list[Fact]],
    nodes: Nodes,
    exchange: Exchange,
    device: torch.device,
    group: ProcessGroup | None,
    options: Options,
    table: CostTable,
    clock: StepClock,
    alike: bool = True,
) -> Part:
    merged, moments = merge(facts), moment_holdings(facts)
    by_key = {entry.fact.key: entry for entry in mine}
    entries = {number: by_key[key] for number, key in enumerate(merged) if key in by_key}
    staging = Staging.of(device) if _offloaded(mine, device) else None
    planner = Planner(merged, moments, entries, nodes, exchange, device, group, options, table, clock, alike, staging)
    shards = tuple(_shard_numbers(holdings) for holdings, _ in merged.values())
    return Part(planner, planner.plan(), tuple(merged), shards, entries, group, sums=cut_sums(merged))


def _entries(groups: Sequence[Group], options: Options, mesh: Mesh | None) -> Iterator[Entry]:
    for index, group in enumerate(groups):
        # groups may have been edited by hand since they were added
        check_group(group, f"group {index}", options)
        use_muon, settings, iteration = group["use_muon"], "adamw", ""
        request: Request | None = None
        if use_muon:
            request = options.request(group)
            iteration = f"{group['ns_coefficients']} {group['ns_steps']} {group['eps']}"
            if has_moments(group["variant"]):
                # rows of output features run along the other axis where a matrix is stored transposed
                iteration += f" {group['variant']} {group['muon_beta2']} {group['transposed']}"
            keys = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")
            settings = "muon, " + ", ".join(f"{key}={group[key]!r}" for key in (*keys, *FAMILY_KEYS, *READING_KEYS))
        elif group["lmo"] is not None:
            keys = ("lmo", "momentum", "nesterov", "eps", "flatten", "transposed")
            settings = ", ".join(f"{key}={group[key]!r}" for key in keys)
        # replicas that decay or step by other rates would drift apart
        settings += "".join(f", {key}={float(group[key])!r}" for key in ("lr", "weight_decay"))
        settings += f", cautious_wd={group['cautious_wd']}"
        for name, param in zip(group_names(group, f"group {index}"), group["params"], strict=True):
            layout = read_layout(name, param, mesh)
            reading = Reading.of(group)
            fact = Fact(name, index, use_muon, reading, iteration, request, settings, (), layout, lmo=group["lmo"])
            if request is not None:
                device = compute_device(_meshes_of([param]), torch.device(layout.device))
                costs = _nanoseconds(blocks_of(name, layout.shape, reading), request, options, device)
                fact = dataclasses.replace(fact, costs=costs)
                if group["block_period"] > 1:
                    parts = row_blocks(name, layout.shape, reading, group["blocks"])
                    costs = _nanoseconds(parts, request, options, device)
                    fact = dataclasses.replace(fact, blocks=group["blocks"], costs_between=costs)
            yield Entry(param, _with_moments(fact, moments_in(group, param), param, options, mesh))


def _with_moments(fact: Fact, moments: Moments | None, param: Tensor, options: Options, mesh: Mesh | None) -> Fact:
    if moments is None:
        return fact
    layout = fact.layout
    if moments.reduced:
        layout = read_layout(fact.name, blank_moments(param, moments, moments_dtype(options.wire_dtype)), mesh)
    return dataclasses.replace(fact, moments=moments, moments_layout=layout)


def _nanoseconds(blocks: Sequence[Block], request: Request, options: Options, device: torch.device) -> tuple[int, ...]:
    """Predicted time of one matrix of each block of a parameter."""
    specs = [block.matrices for block in blocks]
    return tuple(owner_cost(spec.rows, spec.cols, device, request, options.table(device)) for spec in specs)


def _offloaded(entries: Sequence[Entry], device: torch.device) -> bool:
    """Whether matrices are stored on the host and multiplied elsewhere."""
    stored = {entry.param.device.type for entry in entries if entry.fact.use_muon}
    return device.type != "cpu" and "cpu" in stored


def _meshes(groups: Sequence[Group]) -> Iterator[Mesh]:
    return _meshes_of(param for group in groups for param in group["params"])


def _meshes_of(params: Iterable[Tensor]) -> Iterator[Mesh]:
    seen = set()
    for param in params:
        dtensor = as_dtensor(param)
        if dtensor is not None and id(dtensor.device_mesh) not in seen:
            seen.add(id(dtensor.device_mesh))
            yield dtensor.device_mesh


def _shard_numbers(holdings: Sequence[Holding]) -> dict[int, int]:
    numbers: dict[Box | int, int] = {}
    # ranks that store nothing have no elements in common
    kept = {holding.rank: holding.box if holding.box.numel else holding.rank for holding in holdings}
    return {rank: numbers.setdefault(box, len(numbers)) for rank, box in kept.items()}
