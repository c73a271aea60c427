"""What a prediction says: of each rank, and of the step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from distmuon.plan.plan import Plan
from distmuon.plan.simulate import Span
from distmuon.planning.specs import Setup
from distmuon.planning.states import States


@dataclass(frozen=True)
class Owned:
    """A kind of work of a rank.

    Attributes:
        rows: Of the matrices.
        cols: Of the matrices.
        parts: Ranks of the team that owns each; 1: a single owner.
    """

    rows: int
    cols: int
    parts: int

    def __str__(self) -> str:
        share = f" (1/{self.parts})" if self.parts > 1 else ""
        return f"{self.rows} x {self.cols}{share}"


@dataclass(frozen=True)
class RankFigures:
    """What one rank does in a step.

    Attributes:
        rank: The global rank.
        owned: How many matrices of each kind it orthogonalizes, alone or in a team.
        ns: Seconds of orthogonalization, talk in teams included.
        waiting: Seconds in which it has nothing to do before it is done.
        finish: When it is done, seconds.
        sent: Bytes that leave it, for its node and for other nodes.
        received: Bytes that reach it, from its node and from others.
        links: Seconds that its busiest link is at it, if it never pauses.
        buffers: Most bytes of matrices in flight at once.
        states: What it holds through training.
    """

    rank: int
    owned: tuple[tuple[Owned, int], ...]
    ns: float
    waiting: float
    finish: float
    sent: tuple[int, int]
    received: tuple[int, int]
    links: float
    buffers: int
    states: States

    @property
    def whole(self) -> int:
        """Matrices that it owns alone."""
        return sum(count for kind, count in self.owned if kind.parts == 1)

    @property
    def shared(self) -> int:
        """Matrices that it owns a slab of."""
        return sum(count for kind, count in self.owned if kind.parts > 1)


@dataclass(frozen=True)
class Rival:
    """Another way to choose owners, of whole matrices.

    Attributes:
        name: What it is called.
        makespan: Seconds of orthogonalization of its busiest rank.
    """

    name: str
    makespan: float


@dataclass(frozen=True)
class Prediction:
    """A step that was not run.

    Attributes:
        setup: What it is a prediction of.
        plan: Who owns what.
        ranks: By rank.
        seconds: Of the step.
        makespan: Of orthogonalization alone, if all else took no time: talk in teams and waiting for them included.
        ideal: Of orthogonalization by single owners, if it could be divided evenly over the ranks.
        largest: Of the matrix that takes longest, on as many ranks as suit it best: no plan is faster.
        rivals: What other ways of choosing owners take.
        training: Of a forward and backward pass.
        spans: What ranks do when, of those that were asked for.
    """

    setup: Setup
    plan: Plan
    ranks: tuple[RankFigures, ...]
    seconds: float
    makespan: float
    ideal: float
    largest: float
    rivals: tuple[Rival, ...]
    training: float
    spans: tuple[Span, ...] = ()

    @property
    def over_ideal(self) -> float:
        """Makespan over the ideal, 1.0 at best."""
        return self.makespan / self.ideal

    @property
    def bound(self) -> float:
        """Seconds that no plan of these matrices stays under."""
        return max(self.ideal, self.largest)

    @property
    def over_bound(self) -> float:
        """Makespan over the lower bound, 1.0 at best."""
        return self.makespan / self.bound

    @property
    def exposed(self) -> float:
        """Seconds of the step beyond the makespan: exchange, passes over memory and waiting that nothing hides."""
        return max(0.0, self.seconds - self.makespan)

    @property
    def share(self) -> float:
        """Of a whole training step."""
        return self.seconds / (self.seconds + self.training)

    @property
    def links(self) -> float:
        """Seconds that the busiest link of all is at it, if it never pauses."""
        return max(figures.links for figures in self.ranks)

    @property
    def between(self) -> int:
        """Bytes that cross between nodes in a step, of all ranks, the talk of teams aside."""
        return sum(figures.sent[1] for figures in self.ranks)

    @property
    def even(self) -> bool:
        """Whether all ranks have about as much to orthogonalize."""
        return self.busiest.ns <= 1.01 * min(figures.ns for figures in self.ranks)

    @property
    def busiest(self) -> RankFigures:
        """The rank with the most to orthogonalize; the lowest of equals."""
        # to a nanosecond, as sums in another order differ in their last digits
        return max(self.ranks, key=lambda figures: (round(figures.ns, 9), -figures.rank))

    def teams(self) -> dict[int, int]:
        """How many matrices are owned by teams of each size; 1: by single owners."""
        counts: Counter[int] = Counter()
        for figures in self.ranks:
            for kind, count in figures.owned:
                counts[kind.parts] += count
        return {size: round(count / size) for size, count in sorted(counts.items())}

    def summary(self) -> dict[str, Any]:
        """The figures of the step, for JSON: seconds and bytes."""
        layout, busiest = self.setup.layout, self.busiest
        return {
            "model": self.setup.model.name,
            "layout": layout.kind,
            "nodes": layout.nodes,
            "gpus_per_node": layout.gpus_per_node,
            "ranks": layout.world,
            "expert_parallel": layout.expert_parallel,
            "device": self.setup.device.name,
            "bucket_mib": self.setup.bucket_mib,
            "buckets": len(self.plan.buckets),
            "teams": {str(size): count for size, count in self.teams().items()},
            "step_seconds": self.seconds,
            "makespan_seconds": self.makespan,
            "ideal_seconds": self.ideal,
            "bound_seconds": self.bound,
            "makespan_over_ideal": self.over_ideal,
            "makespan_over_bound": self.over_bound,
            "exposed_seconds": self.exposed,
            "busiest_link_seconds": self.links,
            "training_seconds": self.training,
            "share_of_training_step": self.share,
            "busiest_rank": busiest.rank,
            "sent_bytes": {"node": sum(r.sent[0] for r in self.ranks), "between": self.between},
            "buffer_bytes": max(r.buffers for r in self.ranks),
            "momentum_bytes": max(r.states.momentum for r in self.ranks),
            "state_bytes": max(r.states.total for r in self.ranks),
            "rivals": {rival.name: rival.makespan for rival in self.rivals},
        }
