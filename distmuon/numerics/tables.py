"""Built-in cost tables by kind of device: what ``engine="auto"`` goes by until ``distmuon calibrate`` was run."""

from __future__ import annotations

from distmuon.numerics.costs import CostTable, Rates


def builtin_table(device: str) -> CostTable:
    """The table of a class of devices; that of the nearest kind where it has none.

    Args:
        device: See :func:`distmuon.numerics.hardware.device_class`.
    """
    if device in _TABLES:
        return _TABLES[device]
    return _TABLES["cpu-float32" if device.startswith("cpu") else "cuda-sm90"]


_TABLES = {
    "cpu-float32": CostTable(
        "cpu-float32",
        "placeholder",
        (
            ("rational", Rates(fixed=5e-5, big=1.6e-11, small=3e-11)),
            ("composed", Rates(fixed=5e-5, big=1.8e-11, small=1.8e-11)),
            ("gram", Rates(fixed=5e-5, big=1.8e-11, small=1.8e-11)),
        ),
    ),
    "cpu-amx": CostTable(
        "cpu-amx",
        "placeholder",
        (
            ("composed", Rates(fixed=5e-5, big=1.8e-11, small=1.8e-11)),
            ("gram", Rates(fixed=5e-5, big=1.8e-11, small=1.8e-11)),
        ),
    ),
    "cuda-sm90": CostTable(
        "cuda-sm90",
        "placeholder",
        (
            ("composed", Rates(fixed=5e-5, big=1.8e-11, small=1.8e-11)),
            ("gram", Rates(fixed=5e-5, big=1.8e-11, small=1.8e-11)),
        ),
    ),
}
