"""What would be better: layouts and bucket sizes, tried by simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distmuon.planning.figures import Prediction
from distmuon.planning.layouts import KINDS, make_layout
from distmuon.planning.memory import check_states, peak_fits
from distmuon.planning.predict import predict
from distmuon.planning.specs import Setup
from distmuon.planning.states import InfeasibleError
from distmuon.usage import UsageError

BUCKETS_MIB = (16.0, 64.0, 256.0)
# A step that is so little faster is no reason to change anything
_WORTH = 0.02


@dataclass(frozen=True)
class Advice:
    """The best of what was tried.

    Attributes:
        given: The prediction of what was asked for.
        best: The fastest step.
        tried: Predictions, in the order in which they were made.
    """

    given: Prediction
    best: Prediction
    tried: tuple[Prediction, ...]

    @property
    def changes(self) -> tuple[str, ...]:
        """Options that differ from what was asked for."""
        given, best = self.given.setup, self.best.setup
        found = []
        if best.layout.kind != given.layout.kind:
            found.append(f"--parallel {best.layout.kind}")
        if best.bucket_mib != given.bucket_mib:
            found.append(f"--bucket-mib {best.bucket_mib:g}")
        if best.teams != given.teams:
            found.append("teams" if best.teams else "--no-teams")
        return tuple(found)

    def __str__(self) -> str:
        sizes = [size for size in self.best.teams() if size > 1]
        teams = f"teams of {_list(sizes)}" if sizes else "no teams"
        best, setup = 1e3 * self.best.seconds, self.best.setup
        what = f"{setup.layout.kind}, buckets of {setup.bucket_mib:g} MiB, {teams}"
        if not self.changes:
            return f"Recommended: as it is ({what}); {len(self.tried)} combinations were simulated and none is faster."
        return (
            f"Recommended: {' '.join(self.changes)} ({what}): the optimizer's step takes {best:,.2f} ms instead of "
            f"{1e3 * self.given.seconds:,.2f}. Layouts also change what forward and backward passes communicate, which "
            "is not counted."
        )


def advise(given: Prediction, again: Callable[[Setup], Prediction] = predict) -> Advice:
    """Try other layouts, then other bucket sizes for the best one.

    Args:
        given: The prediction of what was asked for.
        again: Predicts another setup.
    """
    tried = [given]
    setup = given.setup
    for kind in KINDS:
        if kind == setup.layout.kind:
            continue
        layout = setup.layout
        try:
            other = make_layout(kind, layout.nodes, layout.gpus_per_node, layout.expert_parallel)
        except UsageError:
            continue  # a mesh that cannot be
        _try(setup.but(layout=other), again, tried)
    best = _fastest(given, tried)
    for size in BUCKETS_MIB:
        if size != best.setup.bucket_mib:
            _try(best.setup.but(bucket_mib=size), again, tried)
    return Advice(given, _fastest(best, tried), tuple(tried))


def _try(setup: Setup, again: Callable[[Setup], Prediction], tried: list[Prediction]) -> None:
    try:
        check_states(setup)
        prediction = again(setup)
    except InfeasibleError:
        return
    if peak_fits(prediction):
        tried.append(prediction)


def _fastest(given: Prediction, tried: list[Prediction]) -> Prediction:
    """The fastest, or what was given where nothing is clearly faster."""
    best = min(tried, key=lambda prediction: prediction.seconds)
    return best if best.seconds < (1 - _WORTH) * given.seconds else given


def _list(sizes: list[int]) -> str:
    return " and ".join([", ".join(map(str, sizes[:-1])), str(sizes[-1])]) if len(sizes) > 1 else str(sizes[0])
