"""The same model over layouts and numbers of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distmuon.planning.figures import Prediction
from distmuon.planning.layouts import KINDS, make_layout
from distmuon.planning.memory import check_peak, check_states
from distmuon.planning.predict import makespan, predict
from distmuon.planning.rivals import BY_COST, ROUND_ROBIN
from distmuon.planning.specs import Setup
from distmuon.planning.states import InfeasibleError
from distmuon.usage import UsageError


@dataclass(frozen=True)
class Scaling:
    """Makespans of one number of ranks, over the ideal.

    Attributes:
        ranks: Number of ranks.
        planned: With teams, if the setup has them.
        single: Of single owners, longest first.
        round_robin: Shape by shape, as microsoft/dion does.
    """

    ranks: int
    planned: float
    single: float
    round_robin: float


def scaling(setup: Setup, nodes: Sequence[int]) -> list[Scaling]:
    """Points of the scaling curve, whether or not they fit the memory.

    Args:
        setup: Of which the number of nodes is varied.
        nodes: How many.
    """
    points = []
    for count in nodes:
        try:
            layout = make_layout(setup.layout.kind, count, setup.layout.gpus_per_node, setup.layout.expert_parallel)
        except UsageError:
            continue  # such as HSDP on one node
        found = makespan(setup.but(layout=layout))
        rivals = {rival.name: rival.makespan / found.ideal for rival in found.rivals}
        points.append(Scaling(layout.world, found.seconds / found.ideal, rivals[BY_COST], rivals[ROUND_ROBIN]))
    return points


def node_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to ``most``, which is the last."""
    powers = [1 << place for place in range(most.bit_length()) if 1 << place < most]
    return (*powers, most)


def compare(
    setup: Setup, nodes: Sequence[int], *, kinds: Sequence[str] = KINDS, tokens_per_gpu: int = 8192
) -> list[Prediction | str]:
    """Predictions by layout and number of nodes; the reason where a plan does not fit the memory.

    Args:
        setup: Of which layout and nodes are varied.
        nodes: How many.
        kinds: Which layouts.
        tokens_per_gpu: See :func:`distmuon.planning.predict.predict`.
    """
    rows: list[Prediction | str] = []
    for kind in kinds:
        for count in nodes:
            try:
                layout = make_layout(kind, count, setup.layout.gpus_per_node, setup.layout.expert_parallel)
            except UsageError:
                continue  # such as HSDP on one node
            other = setup.but(layout=layout)
            try:
                check_states(other)
                prediction = predict(other, tokens_per_gpu=tokens_per_gpu)
                check_peak(prediction)
            except InfeasibleError as error:
                rows.append(str(error))
                continue
            rows.append(prediction)
    return rows
