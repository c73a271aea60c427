"""A step before it is run: plan it, simulate it, and compare it with other ways to choose owners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.plan.baselines import lower_bound
from distmuon.plan.memory import memory
from distmuon.plan.plan import Plan
from distmuon.plan.schedule import Schedule
from distmuon.plan.simulate import Timeline, simulate
from distmuon.planning.figures import Owned, Prediction, RankFigures, Rival
from distmuon.planning.rivals import rivals_of
from distmuon.planning.specs import Setup, plan_of, specs_of
from distmuon.planning.states import states_of
from distmuon.speeds import Link, Speeds

# Of the peak, what forward and backward passes are taken to reach
MFU = 0.4
_FLOPS_PER_PARAMETER = 6
_NO_TIME = Link(0.0, 0.0, 0.0, 0.0)
_COMPUTE_ALONE = Speeds(_NO_TIME, _NO_TIME)


@dataclass(frozen=True)
class Makespan:
    """How long orthogonalization takes if all else took no time.

    Attributes:
        plan: Who owns what.
        seconds: Of the busiest ranks, talk in teams and waiting for them included.
        ideal: Work of single owners over the number of ranks.
        largest: Of the matrix that takes longest, on as many ranks as suit it best.
        rivals: What other ways of choosing owners take.
    """

    plan: Plan
    seconds: float
    ideal: float
    largest: float
    rivals: tuple[Rival, ...]


def makespan(setup: Setup) -> Makespan:
    """Plan a step, and simulate it with links and memory that take no time."""
    specs = specs_of(setup)
    layout = setup.layout
    plan = plan_of(setup, specs)
    # what teams say to each other is in the costs of the plan; nothing has to wait for its gather
    waves = len(plan.waves)
    at_once = Schedule(begun=(waves,) * waves, settled=(0,) * waves)
    alone = simulate(plan, _COMPUTE_ALONE, itemsize=setup.itemsize, schedule=at_once)
    bound = lower_bound(specs, layout.ranks)
    rivals = rivals_of(specs, layout.ranks)
    return Makespan(plan, alone.seconds, 1e-9 * bound.ideal, 1e-9 * bound.longest, rivals)


def predict(setup: Setup, *, tokens_per_gpu: int = 8192, spans: bool | Sequence[int] = False) -> Prediction:
    """Plan and simulate a step.

    Args:
        setup: What is stepped, where.
        tokens_per_gpu: Tokens of a training step for each rank; a token takes 6 FLOPs for each active parameter
            (Kaplan et al. 2020), at :data:`MFU` of the device's peak.
        spans: Whether to note what each rank does when, or of which ranks.
    """
    found = makespan(setup)
    timeline = simulate(
        found.plan, setup.device.speeds, itemsize=setup.itemsize, spans=spans, transport=setup.transport
    )
    flops = _FLOPS_PER_PARAMETER * setup.model.active * tokens_per_gpu
    return Prediction(
        setup=setup,
        plan=found.plan,
        ranks=_ranks(setup, found.plan, timeline),
        seconds=timeline.seconds,
        makespan=found.seconds,
        ideal=found.ideal,
        largest=found.largest,
        rivals=found.rivals,
        training=flops / (MFU * setup.device.peak),
        spans=timeline.spans,
    )


def _ranks(setup: Setup, plan: Plan, timeline: Timeline) -> tuple[RankFigures, ...]:
    owned = owned_by(plan)
    held = memory(plan, all_gather=setup.transport.all_gather)
    states = states_of(setup.model, setup.layout)
    found = []
    for rank in plan.ranks:
        traffic = timeline.bytes[rank]
        found.append(
            RankFigures(
                rank=rank,
                owned=owned[rank],
                ns=timeline.ns[rank],
                waiting=timeline.waiting[rank],
                finish=timeline.finish[rank],
                sent=(traffic.local_out, traffic.remote_out),
                received=(traffic.local_in, traffic.remote_in),
                links=traffic.seconds(setup.device.speeds),
                buffers=setup.itemsize * held[rank].buffers,
                states=states[rank],
            )
        )
    return tuple(found)


def owned_by(plan: Plan) -> dict[int, tuple[tuple[Owned, int], ...]]:
    """How many matrices of each kind each rank orthogonalizes, by rank; the largest kinds first."""
    counts: dict[int, Counter[Owned]] = {rank: Counter() for rank in plan.ranks}
    for bucket in plan.buckets:
        kind = Owned(bucket.rows, bucket.cols, bucket.parts)
        for assignment in bucket.assignments:
            counts[assignment.owner][kind] += assignment.count
    return {
        rank: tuple(sorted(found.items(), key=lambda item: (-item[0].rows * item[0].cols, item[0].rows, item[0].parts)))
        for rank, found in counts.items()
    }
