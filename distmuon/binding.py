"""From parameter groups to a plan: read what this rank stores, compare over the ranks, plan."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    prefers_all_gather,
    warm_up,
)
from distmuon.comm.layout import as_dtensor, read_layout
from distmuon.comm.team import form_teams
from distmuon.comm.verify import VerifiedExchange
from distmuon.costing import block_spec, owner_cost, pace_of
from distmuon.facts import (
    Fact,
    Key,
    Said,
    compare_settings,
    compare_versions,
    cut_sums,
    merge,
    moment_holdings,
    nodes_of,
)
from distmuon.groups import Group, group_names
from distmuon.moments import blank_moments, moments_dtype, moments_in, words
from distmuon.numerics.costs import CostTable
from distmuon.numerics.hardware import device_class
from distmuon.numerics.recipe import Request
from distmuon.numerics.variants import has_moments
from distmuon.options import Options
from distmuon.pipeline import Pipeline
from distmuon.plan.blocks import Block, Placing, blocks_of
from distmuon.plan.boxes import Box
from distmuon.plan.companions import Companion, Companions, Moments
from distmuon.plan.nodes import Nodes, one_node
from distmuon.plan.pace import plan_step
from distmuon.plan.parameters import Holding, ParameterSpec
from distmuon.plan.plan import Plan
from distmuon.plan.reading import READING_KEYS, Reading
from distmuon.plan.simulate import GLOO, NCCL
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


@dataclass(frozen=True)
class Entry:
    """A parameter of this rank, and what it says of it."""

    param: Tensor
    fact: Fact


@dataclass
class Part:
    """The parameters that the same ranks step together, or that this rank steps alone.

    Attributes:
        pipeline: Runs the matrices among them.
        keys: All parameters, those of other ranks too, in the order in which they are agreed on.
        shards: For each key, by global rank: a number that is equal for ranks that store the same elements.
        entries: This rank's parameters by place in ``keys``.
        planned: For each parameter of the plan its place in ``keys``.
        blocks: For each parameter of the plan what it is of the parameter in ``keys``.
        matrices: This rank's parameters on Muon, by place in the plan.
        group: The process group; None where this rank is alone.
        active: With ``static_grads``: which keys take part, once that is known.
        sums: For places in ``keys`` that have an ``lmo``: what its norms need of other ranks, where they do.
    """

    pipeline: Pipeline
    keys: tuple[Key, ...]
    shards: tuple[dict[int, int], ...]
    entries: dict[int, Entry]
    planned: tuple[int, ...]
    blocks: tuple[Block, ...]
    matrices: dict[int, Entry]
    group: ProcessGroup | None
    active: tuple[bool, ...] | None = None
    sums: dict[int, CutSum] = field(default_factory=dict)


@dataclass
class Binding:
    """What the optimizer found when it last looked at its parameters.

    Attributes:
        parts: Parameters of several ranks first, then those of this rank alone; either may be missing.
    """

    parts: list[Part]
    _seen: list[tuple[list[Tensor], list[Any]]] = field(default_factory=list)

    def fits(self, groups: Sequence[Group]) -> bool:
        """Whether the groups still hold the parameters that were bound."""
        return len(self._seen) == len(groups) and all(
            settings == _bound_settings(group)
            and len(params) == len(group["params"])
            and all(old is new for old, new in zip(params, group["params"], strict=True))
            for (params, settings), group in zip(self._seen, groups, strict=True)
        )


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
    parts = []
    if ranks:
        parts.append(_shared(entries, error, ranks, meshes, options, clock))
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
    return Binding(parts, [(list(group["params"]), _bound_settings(group)) for group in groups])


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
    return [tensors, *(group[key] for key in keys)]


def _shared(
    entries: Sequence[Entry],
    error: Exception | None,
    ranks: tuple[int, ...],
    meshes: Sequence[Mesh],
    options: Options,
    clock: StepClock,
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
    said = Said(code_version(), settings, table, host(), hardware, [entry.fact for entry in mine])
    told: list[Said] = from_every_rank(said, group)
    part: Part | None = None
    try:
        compare_versions(ranks, [theirs.version for theirs in told])
        compare_settings(_COMPARED, ranks, [theirs.settings for theirs in told])
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
    _compare_digests(group, ranks, part.pipeline.plan)
    warm_up(group, device)
    part.pipeline.teams = form_teams(part.pipeline.plan.teams, group, device)
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
    companions = Companions(words(options.wire_dtype))
    keys = tuple(merged)
    specs, planned, blocks = [], [], []
    placing = Placing()
    for number, (holdings, fact) in enumerate(merged.values()):
        if fact.use_muon:
            beside = functools.partial(_companion, companions, fact, moments.get(fact.key, ()))
            for spec, block in _specs(holdings, fact, placing, options, table, device, nodes, alike, beside):
                specs.append(spec)
                blocks.append(block)
                planned.append(number)
    all_gather = group is not None and prefers_all_gather(group, device)
    pace = pace_of(table, device, options.wire_dtype.itemsize, NCCL if all_gather else GLOO)
    plan = plan_step(specs, ranks=tuple(facts), nodes=nodes, bucket_bytes=options.bucket_bytes, pace=pace)
    by_key = {entry.fact.key: entry for entry in mine}
    entries = {number: by_key[key] for number, key in enumerate(keys) if key in by_key}
    rank = own_rank()
    return Part(
        pipeline=Pipeline(
            plan=plan,
            rank=rank,
            exchange=exchange,
            device=device,
            options=options,
            table=table,
            all_gather=all_gather,
            clock=clock,
            staging=Staging.of(device) if _offloaded(mine, device) else None,
        ),
        keys=keys,
        shards=tuple(_shard_numbers(holdings) for holdings, _ in merged.values()),
        entries=entries,
        planned=tuple(planned),
        blocks=tuple(blocks),
        matrices={
            place: entries[number]
            for place, (number, spec) in enumerate(zip(planned, specs, strict=True))
            if number in entries and any(holding.rank == rank for holding in spec.holdings)
        },
        group=group,
        sums=cut_sums(merged),
    )


def _entries(groups: Sequence[Group], options: Options, mesh: Mesh | None) -> Iterator[Entry]:
    for index, group in enumerate(groups):
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
            costs: tuple[int, ...] = ()
            reading = Reading.of(group)
            if request is not None:
                device = compute_device(_meshes_of([param]), torch.device(layout.device))
                costs = _nanoseconds(name, layout.shape, reading, request, options, device)
            fact = Fact(name, index, use_muon, reading, iteration, request, settings, costs, layout, lmo=group["lmo"])
            yield Entry(param, _with_moments(fact, moments_in(group, param), param, options, mesh))


def _with_moments(fact: Fact, moments: Moments | None, param: Tensor, options: Options, mesh: Mesh | None) -> Fact:
    if moments is None:
        return fact
    layout = fact.layout
    if moments.reduced:
        layout = read_layout(fact.name, blank_moments(param, moments, moments_dtype(options.wire_dtype)), mesh)
    return dataclasses.replace(fact, moments=moments, moments_layout=layout)


def _companion(
    companions: Companions, fact: Fact, moments: Sequence[Holding], block: Block, held: Sequence[Holding]
) -> Companion | None:
    """The second moments of a block on the ranks that share it."""
    if fact.moments is None:
        return None
    ranks = {holding.rank for holding in held}
    return companions.of(fact.moments, block, [holding for holding in moments if holding.rank in ranks])


def _nanoseconds(
    name: str, shape: tuple[int, ...], reading: Reading, request: Request, options: Options, device: torch.device
) -> tuple[int, ...]:
    """Predicted time of one matrix of each block of a parameter."""
    specs = [block.matrices for block in blocks_of(name, shape, reading)]
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


def _compare_digests(group: ProcessGroup, ranks: Sequence[int], plan: Plan) -> None:
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
        f"the plans of ranks {ranks[0]} and {ranks[other]} differ, first in {first}: run the same version of distmuon "
        "on every rank."
    )


def _specs(
    holdings: Sequence[Holding],
    fact: Fact,
    placing: Placing,
    options: Options,
    table: CostTable,
    device: torch.device,
    nodes: Nodes,
    alike: bool,
    beside: Callable[[Block, Sequence[Holding]], Companion | None],
) -> Iterator[tuple[ParameterSpec, Block]]:
    """What a plan is made of; ranks that are not ``alike`` would predict other costs, and take each other's word."""
    assert fact.request is not None
    layout = fact.layout
    # ranks have devices of other numbers, and one plan
    kind = torch.device(device.type)
    blocks = blocks_of(fact.name, layout.shape, fact.reading)
    by_replica: dict[tuple[int, ...], list[Holding]] = {}
    for holding in sorted(holdings, key=lambda holding: holding.rank):
        # an update that each replica computes for itself is that of a parameter of its own
        by_replica.setdefault(holding.replica if options.replicas == "repeat" else (), []).append(holding)
    for members in by_replica.values():
        for number, block, held in placing.place(fact.name, blocks, tuple(members)):
            spec = block_spec(
                block,
                held,
                group=fact.group,
                kind=f"{layout.device} {layout.dtype} {fact.iteration}",
                device=kind,
                request=fact.request,
                table=table,
                nodes=nodes if options.teams else None,
                cost=None if alike else fact.costs[number],
                companion=beside(block, held),
            )
            yield spec, block


def _shard_numbers(holdings: Sequence[Holding]) -> dict[int, int]:
    numbers: dict[Box | int, int] = {}
    # ranks that store nothing have no elements in common
    kept = {holding.rank: holding.box if holding.box.numel else holding.rank for holding in holdings}
    return {rank: numbers.setdefault(box, len(numbers)) for rank, box in kept.items()}
