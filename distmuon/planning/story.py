"""Which rank is the bottleneck, and why: in words, for pictures."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from distmuon.planning.figures import Prediction, RankFigures

if TYPE_CHECKING:
    from distmuon.planning.advice import Advice

# A busiest rank with so much more than an even share has a reason that is worth telling
_UNEVEN = 1.05
# And a step of which so much is not orthogonalization
EXPOSED = 0.25


def title(prediction: Prediction, advice: Advice | None = None, width: int = 125) -> str:
    """What the picture shows, in sentences: where, who is last, and what would change it, if ``advice`` says so."""
    p, layout = prediction, prediction.setup.layout
    where = (
        f"{p.setup.model.name}, {layout} on {layout.world:,} x {p.setup.device.name}: the step takes "
        f"{ms(p.seconds)} ms ({p.share:.1%} of a training step)."
    )
    return "\n".join([where, *textwrap.wrap(f"{bottleneck(p)} {why(p)} {_better(p, advice)}", width)])


def bottleneck(prediction: Prediction) -> str:
    """Which rank has most to do."""
    busiest = prediction.busiest
    if prediction.exposed > prediction.makespan:
        return _moving(prediction)
    if prediction.even:
        share = f"{busiest.ns / prediction.ideal:.2f} times an even share"
        return f"All ranks are busy for {ms(busiest.ns)} ms, {share}: rank {busiest.rank} with {work(busiest)}."
    alike = sum(1 for figures in prediction.ranks if figures.owned == busiest.owned) - 1
    ranks = f"Rank {busiest.rank}" if not alike else f"Rank {busiest.rank} (like {alike:,} more)"
    return (
        f"{ranks} is the bottleneck: it orthogonalizes {work(busiest)} for {ms(busiest.ns)} ms, "
        f"{busiest.ns / prediction.ideal:.2f} times an even share."
    )


def _moving(p: Prediction) -> str:
    """Which rank moves most, where that takes longer than orthogonalization."""
    if p.links < 0.25 * p.exposed:
        return (
            f"Passes over memory and waiting take most of it, {ms(p.exposed)} ms: orthogonalization is "
            f"{ms(p.makespan)} ms on rank {p.busiest.rank}, with {work(p.busiest)}."
        )
    rank = max(p.ranks, key=lambda figures: figures.links)
    near, far = (max(rank.sent[where], rank.received[where]) for where in (0, 1))
    kind, nbytes = ("between nodes", far) if far > near else ("inside the node", near)
    return (
        f"The links {kind} are the bottleneck: rank {rank.rank} moves {nbytes / 2**20:,.0f} MiB over its own, "
        f"{ms(p.links)} ms if it never pauses, and orthogonalizes for {ms(rank.ns)} ms; the busiest, rank "
        f"{p.busiest.rank}, for {ms(p.busiest.ns)} ms, with {work(p.busiest)}."
    )


def _better(p: Prediction, advice: Advice | None) -> str:
    """What would shorten the step: as simulated, or without advice what surely moves less."""
    if advice is not None:
        changes = " ".join(advice.changes)
        return f"Faster: {changes}, {ms(advice.best.seconds)} ms." if changes else ""
    if p.setup.layout.kind != "fsdp" and p.exposed > p.makespan:
        return "Every replica is sent all updates: --parallel fsdp has one."
    return ""


def why(prediction: Prediction) -> str:
    """What keeps the step from being shorter."""
    p = prediction
    reasons = []
    if p.makespan > _UNEVEN * p.ideal:
        if not any(size > 1 for size in p.teams()):
            single = max(spec.cost for spec in p.plan.parameters) * 1e-9
            if single >= 0.95 * p.makespan:
                reasons.append("One matrix alone takes it that long: only a team could share it")
            else:
                reasons.append("Whole matrices cannot be shared out more evenly")
        elif p.largest >= 0.95 * p.makespan:
            reasons.append("Its largest matrix is no faster on a larger team")
        else:
            reasons.append("Ranks of a team talk and repeat small products: their work adds up to more")
    if p.exposed > EXPOSED * p.seconds:
        links = f"the busiest link needs {ms(p.links)} ms"
        reasons.append(
            f"{ms(p.exposed)} ms more are exchange, passes over memory and waiting for other ranks ({links})"
        )
    return " ".join(f"{reason}." for reason in reasons)


def work(figures: RankFigures, most: int = 3) -> str:
    """What a rank orthogonalizes."""
    found = [
        f"{count:,} of {kind.rows} x {kind.cols}" + (f" in teams of {kind.parts}" if kind.parts > 1 else "")
        for kind, count in figures.owned
    ]
    if not found:
        return "nothing"
    if len(found) > most:
        others = sum(count for _, count in figures.owned[most - 1 :])
        found = [*found[: most - 1], f"{others:,} others"]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


def ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
