"""What a check found, the same on every rank, and how it is printed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MOST_FAILURES = 8


@dataclass(frozen=True)
class Measure:
    """The largest difference that was found somewhere, against the largest that is allowed.

    Attributes:
        error: Largest difference, relative; infinite where a number is not finite or something is missing.
        bar: Largest allowed error; 0.0: the same bits.
        what: Which tensor, such as ``"weights"`` or ``"momentum_buffer"``.
        step: Where, counted from 1; 0: before the first step.
        rank: The rank that saw it.
        note: What else there is to say.
    """

    error: float
    bar: float
    what: str
    step: int = 0
    rank: int = 0
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the bar."""
        return self.error <= self.bar

    def __str__(self) -> str:
        wanted = "the same bits are wanted" if self.bar == 0.0 else f"the bar is {self.bar:.1e}"
        where = f" at step {self.step}" if self.step else ""
        note = f" ({self.note})" if self.note else ""
        return f"{self.what}{where} on rank {self.rank}: relative error {self.error:.1e}{note}, {wanted}"


def worst(measures: Iterable[Measure]) -> Measure:
    """The measure that decides: one that fails before one that passes, then the largest error."""
    return max(measures, key=lambda measure: (not measure.passed, measure.error, -measure.step, -measure.rank))


@dataclass(frozen=True)
class ParameterRow:
    """One parameter.

    Attributes:
        name: Its clean name.
        algorithm: ``"muon"`` or ``"adamw"``.
        layout: Its placements on the sharded side.
        owner: The ranks that orthogonalize its matrices, ``"each"`` where every rank does, empty for AdamW.
        exact: Weights and state of the exact path, all steps.
        weights: Weights with the options that were given; the same as ``exact`` if they ask for the exact path.
        state: Optimizer state with the options that were given.
    """

    name: str
    algorithm: str
    layout: str
    owner: str
    exact: Measure
    weights: Measure
    state: Measure


@dataclass(frozen=True)
class CheckLine:
    """One thing that was proved, or not.

    Attributes:
        name: What, in a word or two.
        passed: Whether it holds; None if it was not looked at.
        detail: What it means, or what to do.
        failures: For each parameter that fails one sentence, which names it.
    """

    name: str
    passed: bool | None
    detail: str
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """The result of :func:`distmuon.check`, equal on every rank; ``str()`` is a table.

    Attributes:
        setting: World size, device and versions, in words.
        lines: What was proved.
        rows: Every parameter, in the order of the model.
    """

    setting: str
    lines: tuple[CheckLine, ...]
    rows: tuple[ParameterRow, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(line.passed is not False for line in self.lines)

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each thing that fails: the parameter, what was found, and the bar."""
        return tuple(f"{line.name}: {failure}" for line in self.lines for failure in line.failures)

    def __str__(self) -> str:
        words = {True: "ok", False: "FAILED", None: "skipped"}
        lines = [("check", "result", ""), *((line.name, words[line.passed], line.detail) for line in self.lines)]
        header = ("parameter", "algorithm", "layout", "owner", "exact", "weights", "bar", "state")
        rows = [header]
        for row in self.rows:
            bar = f"{row.weights.bar:.1e}" if row.weights.bar else "0"
            errors = (_number(row.exact), _number(row.weights), bar, _number(row.state))
            rows.append((row.name, row.algorithm, row.layout, row.owner, *errors))
        failures = self.failures
        told = list(failures[:_MOST_FAILURES])
        if len(failures) > len(told):
            told.append(f"and {len(failures) - len(told)} more")
        parts = [
            f"distmuon check {'passed' if self.passed else 'FAILED'}: {self.setting}",
            _table(lines),
            _table(rows),
            "\n".join(told),
        ]
        return "\n\n".join(part for part in parts if part)


def line(name: str, detail: str, advice: str, measures: Sequence[tuple[str, Measure]]) -> CheckLine:
    """A line that holds if every measure does.

    Args:
        name: What is proved.
        detail: What it means, for a line that holds.
        advice: The way out, for one that fails.
        measures: By parameter; a parameter may have several.
    """
    failures = tuple(f"parameter {parameter!r}, {measure}." for parameter, measure in measures if not measure.passed)
    if not failures:
        return CheckLine(name, True, detail)
    failing = {parameter for parameter, measure in measures if not measure.passed}
    count = f"{len(failing)} of {len({parameter for parameter, _ in measures})} parameters fail: {advice}"
    return CheckLine(name, False, count, failures)


def _number(measure: Measure) -> str:
    text = "0" if measure.error == 0.0 else "inf" if math.isinf(measure.error) else f"{measure.error:.1e}"
    return text if measure.passed else f"{text} !"


def _table(cells: Sequence[Sequence[str]]) -> str:
    if len(cells) < 2:
        return ""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    rows.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(rows)
