"""Whether a plan fits the memory of a rank, and what would."""

from __future__ import annotations

from collections.abc import Iterator

from distmuon.plan.memory import memory
from distmuon.planning.figures import Prediction
from distmuon.planning.layouts import KINDS, Layout, make_layout
from distmuon.planning.specs import Setup, plan_of, specs_of
from distmuon.planning.states import InfeasibleError, states_of
from distmuon.usage import UsageError

# Doublings of the number of nodes that are tried
_DOUBLINGS = 12


def check_states(setup: Setup) -> None:
    """Refuse a layout whose weights, gradients and states alone do not fit.

    Raises:
        InfeasibleError: saying what would fit.
    """
    needed = _state_gib(setup, setup.layout)
    if setup.device.memory is not None and needed > setup.device.memory:
        raise InfeasibleError(_sentence(setup, needed, 0.0))


def check_peak(prediction: Prediction) -> None:
    """Refuse a plan whose buffers do not fit beside the states.

    Raises:
        InfeasibleError: saying what would fit.
    """
    setup = prediction.setup
    states, buffers = _peak_gib(prediction)
    if not peak_fits(prediction):
        raise InfeasibleError(_sentence(setup, states, buffers))


def peak_fits(prediction: Prediction) -> bool:
    """Whether states and buffers fit; of an unknown memory they do."""
    most = prediction.setup.device.memory
    return most is None or sum(_peak_gib(prediction)) <= most


def _peak_gib(prediction: Prediction) -> tuple[float, float]:
    """States and buffers of the rank that needs most."""
    worst = max(prediction.ranks, key=lambda figures: figures.states.total + figures.buffers)
    return worst.states.total / 2**30, worst.buffers / 2**30


def _state_gib(setup: Setup, layout: Layout) -> float:
    return max(states.total for states in states_of(setup.model, layout)) / 2**30


def _sentence(setup: Setup, states: float, buffers: float) -> str:
    layout, device = setup.layout, setup.device
    beside = f" and buffers of {buffers:,.2f} GiB" if buffers else ""
    return (
        f"{setup.model.name} as {layout} on {layout.world} ranks takes {states:,.2f} GiB of weights, gradients and "
        f"states{beside} on a rank, and {device.name} has {device.memory:g} GiB: {_way_out(setup, buffers)}."
    )


def _way_out(setup: Setup, buffers: float) -> str:
    assert setup.device.memory is not None
    if buffers:
        for size in (setup.bucket_mib / 4, setup.bucket_mib / 16):
            needed = _gib_in_buckets(setup, size)
            if needed <= setup.device.memory:
                return f"--bucket-mib {size:g} takes {needed:,.2f} GiB"
    for layout in _others(setup.layout):
        needed = _state_gib(setup, layout) + buffers
        # activations take their part too
        if needed <= 0.8 * setup.device.memory:
            same = layout.nodes == setup.layout.nodes
            nodes = "" if same else f" --nodes {layout.nodes}"
            return f"--parallel {layout.kind}{nodes} takes {needed:,.2f} GiB"
    return "take a smaller model, or a device with more memory (--memory-gib)"


def _gib_in_buckets(setup: Setup, size: float) -> float:
    """GiB of states and buffers if buckets were smaller."""
    other = setup.but(bucket_mib=size)
    layout = other.layout
    plan = plan_of(other, specs_of(other))
    held = memory(plan, all_gather=other.transport.all_gather)
    states = states_of(other.model, layout)
    return max(states[rank].total + other.itemsize * held[rank].buffers for rank in plan.ranks) / 2**30


def _others(layout: Layout) -> Iterator[Layout]:
    """Layouts that store less on a rank, those on the same nodes first."""
    kinds = [kind for kind in reversed(KINDS) if KINDS.index(kind) <= KINDS.index(layout.kind)]
    for doublings in range(_DOUBLINGS):
        for kind in kinds:
            try:
                other = make_layout(kind, layout.nodes << doublings, layout.gpus_per_node, layout.expert_parallel)
            except UsageError:
                continue
            if other != layout:
                yield other
