"""How long an orthogonalization takes, by engine: a small table that is measured once.

    seconds = fixed + big * B s^2 l + small * S s^3 + entries * s l + square * s^2

for a matrix of short side ``s`` and long side ``l`` that takes ``B`` products of ``s x s`` by ``s x l`` and ``S`` of
``s x s`` by ``s x s`` (:class:`distmuon.numerics.recipe.Recipe` counts them). In a batch, where one call serves many
matrices, ``batched`` takes the place of ``fixed``. ``distmuon calibrate`` fits the numbers on the machine at hand; the
built-in tables are of :mod:`distmuon.numerics.tables`.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distmuon.speeds import Speeds


@dataclass(frozen=True)
class Rates:
    """Seconds; none is negative.

    Attributes:
        fixed: For a matrix on its own, whatever its size.
        big: For a multiply-add of a product of ``s x s`` by ``s x l``.
        small: For a multiply-add of a product of ``s x s`` by ``s x s``.
        entries: For an entry of the matrix.
        square: For an entry of a square of its short side.
        batched: For a matrix in a batch, whatever its size; None: as ``fixed``.
    """

    fixed: float
    big: float
    small: float
    entries: float = 0.0
    square: float = 0.0
    batched: float | None = None

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{key}={value}: seconds are finite and not negative.")

    def seconds(self, rows: int, cols: int, *, big: int, small: int, batched: bool = False) -> float:
        """Time of one ``rows x cols`` matrix that takes so many products."""
        short, long = sorted((rows, cols))
        products = big * short**2 * long * self.big + small * short**3 * self.small
        fixed = self.batched if batched and self.batched is not None else self.fixed
        return fixed + products + short * long * self.entries + short**2 * self.square


@dataclass(frozen=True)
class CostTable:
    """The rates of each engine on one kind of device.

    Attributes:
        device: Class of the device (:func:`distmuon.numerics.hardware.device_class`).
        source: Where the numbers come from: a measurement, or an estimate.
        engines: Pairs of an engine's name and its rates. ``engine="auto"`` chooses among these.
        speeds: Of links and memory; None: not measured.
    """

    device: str
    source: str
    engines: tuple[tuple[str, Rates], ...]
    speeds: Speeds | None = None

    def __post_init__(self) -> None:
        if not self.engines:
            raise ValueError(f"the cost table of {self.device!r} has no engine: measure at least one.")

    def rates(self, engine: str) -> Rates:
        """The rates of ``engine``; those of the first one where it was not measured, which is right to a factor."""
        return dict(self.engines).get(engine, self.engines[0][1])

    def save(self, path: str | os.PathLike[str], **notes: Any) -> None:
        """Write the table as JSON, with other keys beside it that :meth:`load` does not look at."""
        found: dict[str, Any] = {
            "device": self.device,
            "source": self.source,
            "engines": {k: asdict(v) for k, v in self.engines},
        }
        if self.speeds is not None:
            found["speeds"] = asdict(self.speeds)
        found |= notes
        pathlib.Path(path).write_text(json.dumps(found, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostTable:
        """Read a table that :meth:`save` or ``distmuon calibrate`` wrote.

        Raises:
            ValueError: if the file is not such a table; names the file and what is wrong.
        """
        try:
            return cls.of(json.loads(pathlib.Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cost_table={str(path)!r} cannot be read ({error}): write a table with `distmuon calibrate`."
            ) from error

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> CostTable:
        """The table in parsed JSON; other keys are ignored."""
        engines = tuple((str(name), Rates(**rates)) for name, rates in found["engines"].items())
        speeds = Speeds.parse(found["speeds"]) if "speeds" in found else None
        return cls(str(found["device"]), str(found["source"]), engines, speeds)
