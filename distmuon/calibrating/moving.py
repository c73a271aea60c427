"""The speeds of links and passes: fitted where they were measured, estimated where they were not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from distmuon.calibrating.fit import Errors, fit_link, fit_pass, link_errors, pass_errors
from distmuon.calibrating.links import COLLECTIVES
from distmuon.calibrating.passes import PASSES
from distmuon.calibrating.session import Findings
from distmuon.calibrating.shapes import Sizes
from distmuon.numerics.tables import builtin_speeds
from distmuon.speeds import Speeds


@dataclass(frozen=True)
class Moving:
    """What moving elements takes, and how sure that is.

    Attributes:
        speeds: Links and passes.
        errors: On the sizes held out, by ``"local exchange"`` and the like, and by name of a pass.
        ranks: Of the groups that a class of links was measured with.
        estimated: Of ``speeds``, what was not measured: the built-in estimate is there.
    """

    speeds: Speeds
    errors: dict[str, Errors]
    ranks: dict[str, int]
    estimated: tuple[str, ...]


def fit_moving(found: Findings, device: str, sizes: Sizes, sides: Sizes) -> Moving:
    """Fit each class of links and each pass.

    Args:
        found: The timings.
        device: Class of the device, for what was not measured.
        sizes: Which bytes are held out of the fit of links.
        sides: Which rows are held out of the fit of passes.
    """
    speeds = builtin_speeds(device)
    errors: dict[str, Errors] = {}
    ranks: dict[str, int] = {}
    for link in ("local", "remote"):
        own = [timing for timing in found.links if timing.link == link]
        known = [timing for timing in own if timing.size in sizes.fitted]
        if not known:
            continue
        fitted = fit_link(known)
        speeds = replace(speeds, local=fitted) if link == "local" else replace(speeds, remote=fitted)
        ranks[link] = own[0].ranks
        for collective in COLLECTIVES:
            unseen = [t for t in own if t.collective == collective and t.size in sizes.held_out]
            # a network may be too slow for all but the smallest size
            if unseen:
                errors[f"{link} {collective}"] = link_errors(unseen, fitted)
    seconds = {name: getattr(speeds, name) for name in PASSES}
    for name in PASSES:
        passes = [timing for timing in found.passes if timing.name == name]
        if passes:
            seconds[name] = fit_pass([timing for timing in passes if timing.side in sides.fitted])
            errors[name] = pass_errors([timing for timing in passes if timing.side in sides.held_out], seconds[name])
    speeds = replace(speeds, **seconds)
    return Moving(speeds, errors, ranks, tuple(link for link in ("local", "remote") if link not in ranks))
