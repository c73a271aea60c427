"""Who stores what: the boxes of each parameter under FSDP2, HSDP, DDP and expert parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distmuon.plan.boxes import Box, chunk
from distmuon.plan.nodes import Nodes
from distmuon.plan.parameters import Holding
from distmuon.usage import UsageError

KINDS = ("fsdp", "hsdp", "ddp")


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model.

    Attributes:
        kind: ``"fsdp"``: each parameter is cut along its first axis over all ranks, as :func:`torch.chunk` cuts;
            ``"hsdp"``: over the ranks of a node, and nodes are replicas; ``"ddp"``: every rank has all.
        nodes: Machines.
        gpus_per_node: Ranks of each.
        expert_parallel: Neighbouring ranks that share the experts of a layer; 1: experts are laid out as all else.
    """

    kind: str
    nodes: int
    gpus_per_node: int
    expert_parallel: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks."""
        return tuple(range(self.world))

    @property
    def node_ranks(self) -> Nodes:
        """The ranks of each node."""
        size = self.gpus_per_node
        return tuple(tuple(range(node * size, (node + 1) * size)) for node in range(self.nodes))

    @property
    def shards(self) -> int:
        """Ranks that store one copy of a dense parameter among them."""
        return {"fsdp": self.world, "hsdp": self.gpus_per_node, "ddp": 1}[self.kind]

    def __str__(self) -> str:
        experts = f", experts over {self.expert_parallel}" if self.expert_parallel > 1 else ""
        return f"{self.kind}{experts}"


def make_layout(kind: str, nodes: int, gpus_per_node: int, expert_parallel: int = 1) -> Layout:
    """A layout that can be.

    Raises:
        UsageError: if the numbers do not make a mesh; says which do.
    """
    if kind not in KINDS:
        raise UsageError(f"--parallel {kind} is unknown: give one of {', '.join(KINDS)}.")
    counts = {"nodes": nodes, "gpus-per-node": gpus_per_node, "expert-parallel": expert_parallel}
    for option, value in counts.items():
        if value < 1:
            raise UsageError(f"--{option} is {value}, and it counts: give 1 or more.")
    layout = Layout(kind, nodes, gpus_per_node, expert_parallel)
    if kind == "hsdp" and nodes == 1:
        raise UsageError(
            f"--parallel hsdp replicates over nodes, and there is one of {gpus_per_node} ranks: take --parallel fsdp, "
            "or --nodes 2 and more."
        )
    # experts are shared inside what holds a copy of the model
    among = gpus_per_node if kind == "hsdp" else layout.world
    if among % expert_parallel:
        fitting = [size for size in range(1, among + 1) if among % size == 0]
        near = sorted(sorted(fitting, key=lambda size: (abs(size - expert_parallel), size))[:3])
        raise UsageError(
            f"--expert-parallel {expert_parallel} does not divide the {among} ranks that hold the model under "
            f"{kind}: {', '.join(map(str, near))} {'does' if len(near) == 1 else 'do'}."
        )
    return layout


def holder(layout: Layout) -> Callable[[tuple[int, ...], bool], tuple[Holding, ...]]:
    """A function of a parameter's shape, and whether it is a stack of experts, that says who stores what.

    Holdings of equal shapes are one object, so that what is remembered of them is found by identity.
    """
    known: dict[tuple[tuple[int, ...], bool], tuple[Holding, ...]] = {}

    def hold(shape: tuple[int, ...], experts: bool) -> tuple[Holding, ...]:
        key = shape, experts and layout.expert_parallel > 1
        if key not in known:
            known[key] = tuple(_holding(layout, rank, shape, key[1]) for rank in layout.ranks)
        return known[key]

    return hold


def _holding(layout: Layout, rank: int, shape: tuple[int, ...], experts: bool) -> Holding:
    if experts:
        return _expert_holding(layout, rank, shape)
    replica, place = divmod(rank, layout.shards)
    return Holding(rank, _cut(Box.whole(shape), 0, place, layout.shards), _coordinates(layout, replica))


def _expert_holding(layout: Layout, rank: int, shape: tuple[int, ...]) -> Holding:
    """As TorchTitan lays experts out: expert parallel ranks are neighbours, and FSDP cuts what each has of them.

    It cuts along the experts, or along their rows where there are more ranks than experts.
    """
    parallel = layout.expert_parallel
    sharing = max(layout.shards, parallel)
    replica, place = divmod(rank, sharing)
    outer, inner = divmod(place, parallel)
    axis = 0 if sharing <= shape[0] else 1
    box = _cut(_cut(Box.whole(shape), 0, inner, parallel), axis, outer, sharing // parallel)
    return Holding(rank, box, _coordinates(layout, replica))


def _coordinates(layout: Layout, replica: int) -> tuple[int, ...]:
    """On the replicated axis of the mesh, which FSDP alone has not."""
    return () if layout.kind == "fsdp" else (replica,)


def _cut(box: Box, axis: int, part: int, parts: int) -> Box:
    start, size = chunk(box.sizes[axis], part, parts)
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[axis] += start
    sizes[axis] = size
    return Box(tuple(offsets), tuple(sizes))
