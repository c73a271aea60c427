"""What the whole optimizer, rather than a group, is set to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmuon.numerics.costs import CostTable
from distmuon.numerics.kernels import external
from distmuon.numerics.recipe import ENGINES, EXTERNAL, NOT_COMPILED, Request
from distmuon.numerics.tables import table_for


@dataclass(frozen=True)
class Options:
    """The keyword arguments of :class:`distmuon.Muon` that are not group keys; see there.

    Raises:
        TypeError: for a dtype that holds no floating-point numbers of 16 bits or more, and what is no cost table.
        ImportError: if the package of the engine is not installed.
        ValueError: for values that exclude each other.
    """

    adamw_lr: float | Tensor | None
    adamw_weight_decay: float
    adamw_eps: float
    momentum_dtype: torch.dtype | None
    ns_dtype: torch.dtype
    ns_engine: str
    cost_table: CostTable | None
    foreach: bool | None
    fused: bool | None
    compile: bool | str
    bucket_bytes: float
    wire_dtype: torch.dtype
    replicas: str
    teams: bool
    static_grads: bool
    on_nonfinite: str | None
    verify_exchange: bool
    step_stats: bool

    def __post_init__(self) -> None:
        for key in ("momentum_dtype", "ns_dtype", "wire_dtype"):
            dtype = getattr(self, key)
            if dtype is not None and not (dtype.is_floating_point and dtype.itemsize >= 2):
                raise TypeError(f"{key}={dtype}: take torch.bfloat16, torch.float16, torch.float32 or torch.float64.")
        if self.ns_engine not in ENGINES:
            raise ValueError(f"ns_engine={self.ns_engine!r} is unknown; known: {', '.join(ENGINES)}.")
        if self.ns_engine == EXTERNAL and not external.installed():
            raise ImportError(
                f"ns_engine={EXTERNAL!r} needs the packages gram-newton-schulz and quack-kernels: install them, or "
                "take another engine."
            )
        if self.cost_table is not None and not isinstance(self.cost_table, CostTable):
            raise TypeError(f"cost_table is a {type(self.cost_table).__name__}: pass a path or a CostTable.")
        if not self.batched and self.ns_engine not in ("auto", "standard"):
            raise ValueError(
                "foreach=False takes the operations of torch.optim.Muon in their order, and "
                f"ns_engine={self.ns_engine!r} others: drop one of them."
            )
        if not isinstance(self.teams, bool):
            raise TypeError(f"teams={self.teams!r}: it is True or False; the cost table decides how large teams are.")
        if self.replicas not in ("share", "repeat"):
            raise ValueError(f"replicas={self.replicas!r}: it is 'share' or 'repeat'.")
        if self.on_nonfinite not in (None, "raise", "skip"):
            raise ValueError(f"on_nonfinite={self.on_nonfinite!r}: it is 'raise', 'skip' or None.")
        if not self.bucket_bytes >= 1:
            raise ValueError(f"bucket_bytes={self.bucket_bytes}: give the bytes of at least one element.")
        if self.compile and (not self.batched or self.ns_engine in NOT_COMPILED):
            engine = "foreach=False" if not self.batched else f"ns_engine={self.ns_engine!r}"
            raise ValueError(
                f"compile={self.compile!r} and {engine} exclude each other: batches of products are what is compiled."
            )
        if self.fused and self.foreach is not None:
            raise ValueError(f"fused=True and foreach={self.foreach} exclude each other: leave foreach out.")

    @property
    def batched(self) -> bool:
        """Whether tensors are taken together, rather than one by one as in torch.optim.Muon."""
        return self.foreach is not False

    def request(self, group: Mapping[str, Any]) -> Request:
        """What the matrices of a parameter group are orthogonalized by.

        Raises:
            ValueError: if its coefficients and steps do not go together, or not with the engine.
        """
        engine = self.ns_engine if self.batched else "standard"
        coefficients, steps = group["ns_coefficients"], group["ns_steps"]
        return Request(self.ns_dtype, engine, coefficients, steps, compile=self.compile)

    def table(self, device: torch.device) -> CostTable:
        """The cost table that the user named, or the built-in one of the device."""
        return self.cost_table or table_for(device, self.ns_dtype)

    def check_table(self, device: torch.device) -> None:
        """Refuse a table of another kind of device than matrices are multiplied on.

        Raises:
            ValueError: saying how to make one.
        """
        if self.cost_table is not None and self.cost_table.device.split("-")[0] != device.type:
            raise ValueError(
                f"cost_table is of {self.cost_table.device!r}, and matrices are multiplied on {device.type!r}: make "
                f"one with `distmuon calibrate --device {device.type}`."
            )
