"""The tables that ``distmuon calibrate`` prints."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from distmuon.calibrating.fit import Errors
from distmuon.calibrating.links import COLLECTIVES
from distmuon.calibrating.measure import Timing
from distmuon.calibrating.moving import Moving
from distmuon.calibrating.passes import PASSES
from distmuon.calibrating.shapes import Shape
from distmuon.numerics.costs import CostTable
from distmuon.numerics.recipe import Request, choose

# Median rounds of an engine this much slower than its fastest ones tell of other work on the machine
_RESTLESS = 0.25


def report(
    timings: Sequence[Timing],
    held_out: Collection[Shape],
    table: CostTable,
    found: Mapping[str, Errors],
    device: torch.device,
) -> str:
    """Milliseconds by shape and engine, the winners, and the errors of the fit.

    Args:
        timings: Of all engines and shapes.
        held_out: Shapes that were not fitted.
        table: The fit.
        found: Its errors on the shapes held out, by engine.
        device: What was measured.
    """
    engines = list(found)
    lines = ["", "".join(f"{title:>12}" for title in ("ms a matrix", *engines, "fastest", "chosen"))]
    losses = []
    for shape, seconds in _by_shape(timings, engines):
        mark = "*" if shape in held_out else " "
        cells = [f"{seconds[engine] * 1e3:.3f}" if engine in seconds else "-" for engine in engines]
        fastest = min(seconds, key=lambda engine: seconds[engine])
        chosen = choose(*shape, device, Request(torch.bfloat16), table).engine
        if chosen in seconds:
            losses.append(seconds[chosen] / seconds[fastest] - 1.0)
        lines.append(f"{f'{shape[0]} x {shape[1]}{mark}':>12}" + "".join(f"{c:>12}" for c in (*cells, fastest, chosen)))
    lines += ["* held out of the fit; on these shapes predictions are off by", ""]
    lines += [f"{e:>12}: {x.median:.0%} at the median, {x.worst:.0%} at worst ({x.shapes})" for e, x in found.items()]
    if losses and len(engines) > 1:
        lines += ["", f"What auto chooses by this table takes at most {max(losses):.0%} longer than the fastest."]
    # a burst may have hit one engine alone
    spread = max(statistics.median(t.spread for t in timings if t.engine == engine) for engine in engines)
    if not any(timing.spread for timing in timings):
        lines.append("Time was up after one round, so nothing tells whether others disturbed it: run this again.")
    if spread > _RESTLESS:
        lines.append(f"Times differed by {spread:.0%} between rounds: run this again when the machine is idle.")
    return "\n".join(lines)


def report_moving(moving: Moving) -> str:
    """Latency and rates of links, and of passes over memory, with the errors of the fit."""
    titles = ("", "latency ms", "GB/s", "median off", "worst off")
    lines = ["", f"{titles[0]:>18}" + "".join(f"{title:>12}" for title in titles[1:])]
    for name in ("local", "remote"):
        link = getattr(moving.speeds, name)
        for collective in COLLECTIVES:
            latency = link.latency + getattr(link, f"{collective}_extra", 0.0)
            cells = [f"{latency * 1e3:.3f}", _inverse(getattr(link, collective))]
            lines.append(_line(moving, f"{name} {collective}", cells, estimated=name in moving.estimated))
    lines += ["", f"{'':>18}" + "".join(f"{title:>12}" for title in ("", "Gelement/s", *titles[3:]))]
    for name in PASSES:
        cells = ["", _inverse(getattr(moving.speeds, name))]
        lines.append(_line(moving, name, cells, estimated=name not in moving.errors))
    told = [f"{name} links between {ranks} ranks" for name, ranks in moving.ranks.items()]
    told += [f"no {name} links, for which the built-in estimate stands" for name in moving.estimated]
    return "\n".join([*lines, f"Measured: {'; '.join(told)}. Errors are on sizes held out of the fit.", ""])


def _line(moving: Moving, name: str, cells: Sequence[str], *, estimated: bool) -> str:
    error = moving.errors.get(name)
    off = ["estimate", ""] if estimated else ["-", "-"]
    if error is not None:
        off = [f"{error.median:.0%}", f"{error.worst:.0%}"]
    return (f"{name:>18}" + "".join(f"{cell:>12}" for cell in (*cells, *off))).rstrip()


def _inverse(seconds: float) -> str:
    """Billions a second, of bytes or elements."""
    return f"{1e-9 / seconds:.3g}" if seconds else "-"


def _by_shape(timings: Sequence[Timing], engines: Sequence[str]) -> Iterator[tuple[Shape, dict[str, float]]]:
    for shape in dict.fromkeys(timing.shape for timing in timings if timing.engine in engines):
        yield shape, {t.engine: t.seconds for t in timings if t.shape == shape and t.engine in engines}
