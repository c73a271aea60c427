"""Which device a plan is for: its cost table, links, memory and peak."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

import torch

from distmuon.costing import speeds_of
from distmuon.numerics.costs import CostTable, Rates
from distmuon.numerics.tables import builtin_table, table_for
from distmuon.speeds import Link, Speeds
from distmuon.usage import UsageError


@dataclass(frozen=True)
class _Kind:
    """A device that can be named: class, memory (GiB), and dense peak in the half precisions (FLOP/s)."""

    device: str
    memory: float | None
    peak: float | None


# Memory as the driver shows it and peaks, of the SXM versions, from NVIDIA's data sheets
_KINDS = {
    "a100": _Kind("cuda-sm80", 79.0, 312e12),
    "h100": _Kind("cuda-sm90", 79.0, 989e12),
    "h200": _Kind("cuda-sm90", 140.0, 989e12),
    "b200": _Kind("cuda-sm100", 179.0, 2250e12),
    "cpu": _Kind("cpu", None, None),
}
NAMES = tuple(sorted(_KINDS))


@dataclass(frozen=True)
class Device:
    """A rank's device.

    Attributes:
        name: What to call it.
        table: Speed of the engines.
        speeds: Of links and memory.
        memory: GiB; None: not known, and not checked.
        peak: FLOP/s of dense products, of which a forward and backward pass reaches a part.
    """

    name: str
    table: CostTable
    speeds: Speeds
    memory: float | None
    peak: float

    @property
    def torch_device(self) -> torch.device:
        """What numerics choose recipes by."""
        return torch.device(self.table.device.split("-")[0])


def find_device(
    name: str | None,
    *,
    cost_table: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tflops: float | None = None,
    local_gb_s: float | None = None,
    remote_gb_s: float | None = None,
    memory_gib: float | None = None,
) -> Device:
    """The device that was asked for.

    Args:
        name: One of :data:`NAMES`; None: that of the cost table, or else ``"h100"``.
        cost_table: A file of ``distmuon calibrate``; None: the built-in table.
        dtype: Of the iteration.
        tflops: What products reach, 1e12 FLOP/s; None: as in the table.
        local_gb_s: GB/s of a rank inside a node; None: as in the table.
        remote_gb_s: GB/s of a rank between nodes.
        memory_gib: Of a rank.

    Raises:
        UsageError: for an unknown device, a table that cannot be read or is of another device, or a speed that is not
            above zero.
    """
    given = {"tflops": tflops, "local-gb-s": local_gb_s, "remote-gb-s": remote_gb_s, "memory-gib": memory_gib}
    for option, value in given.items():
        # not of NaN either
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{option} is {value}, and it must be above 0: correct it or leave it out.")
    table = None if cost_table is None else _read(cost_table)
    if name is None:
        name = "h100" if table is None else _named_by(table)
    if name not in _KINDS:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1)
        advice = f"did you mean {near[0]}?" if near else f"give one of {', '.join(NAMES)}, or --cost-table FILE."
        raise UsageError(f"--device {name} is unknown: {advice}")
    kind = _KINDS[name]
    if table is None:
        table = table_for(torch.device("cpu"), dtype) if name == "cpu" else builtin_table(kind.device)
    else:
        _check(table, cost_table, name)
    if tflops is not None:
        table = _at(table, tflops)
    elif cost_table is None and name != "cpu" and dtype.itemsize > 2:
        raise UsageError(
            f"--dtype {str(dtype).removeprefix('torch.')} has no built-in rates on --device {name}: give --tflops, or "
            "a --cost-table that was measured so."
        )
    if not any(rates.big for _, rates in table.engines):
        raise UsageError(
            f"--cost-table {cost_table} says that products take no time: calibrate again, or give --tflops."
        )
    speeds = _linked(speeds_of(table), local_gb_s, remote_gb_s)
    # teams are costed by the links in the table
    table = dataclasses.replace(table, speeds=speeds)
    peak = kind.peak or max(2 / rates.big for _, rates in table.engines if rates.big)
    return Device(name, table, speeds, memory_gib or kind.memory, peak)


def _read(path: str) -> CostTable:
    try:
        return CostTable.load(path)
    except ValueError as error:
        raise UsageError(str(error).replace("cost_table=", "--cost-table ", 1)) from error


def _named_by(table: CostTable) -> str:
    """The first device of the table's class."""
    for name, kind in _KINDS.items():
        if _fits(table, kind):
            return name
    raise UsageError(f"the cost table is of {table.device!r}, which is none of {', '.join(NAMES)}: give --device.")


def _fits(table: CostTable, kind: _Kind) -> bool:
    # tables of all CPUs serve "cpu"
    return table.device == kind.device or (kind.device == "cpu" and table.device.startswith("cpu"))


def _check(table: CostTable, path: str | None, name: str) -> None:
    if _fits(table, _KINDS[name]):
        return
    fitting = [other for other, kind in _KINDS.items() if _fits(table, kind)]
    other = f"take --device {' or '.join(fitting)}, or " if fitting else ""
    where = "--device cpu`" if name == "cpu" else f"--device cuda` on one {name}"
    raise UsageError(
        f"--cost-table {path} is of {table.device!r}, and --device {name} is {_KINDS[name].device!r}: {other}measure "
        f"a table by `distmuon calibrate {where}."
    )


def _at(table: CostTable, tflops: float) -> CostTable:
    """The table with products, symmetric ones too, at one rate."""
    whole = 2e-12 / tflops

    def rated(rates: Rates) -> Rates:
        return dataclasses.replace(rates, big=whole, small=whole)

    engines = tuple((name, rated(rates)) for name, rates in table.engines)
    return dataclasses.replace(table, source=f"{table.source}; products at {tflops:g} TFLOP/s", engines=engines)


def _linked(speeds: Speeds, local_gb_s: float | None, remote_gb_s: float | None) -> Speeds:
    local, remote = speeds.local, speeds.remote
    if local_gb_s is not None:
        local = Link.of(gigabytes=local_gb_s, latency=local.latency)
    if remote_gb_s is not None:
        remote = Link.of(gigabytes=remote_gb_s, latency=remote.latency)
    return dataclasses.replace(speeds, local=local, remote=remote)
