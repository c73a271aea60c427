"""What the whole optimizer, rather than a group, is set to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The keyword arguments of :class:`distmuon.Muon` that are not group keys; see there.

    Raises:
        TypeError: for a dtype that holds no floating-point numbers of 16 bits or more.
        ValueError: for values that exclude each other.
    """

    adamw_lr: float | Tensor | None
    adamw_weight_decay: float
    adamw_eps: float
    momentum_dtype: torch.dtype | None
    ns_dtype: torch.dtype
    foreach: bool | None
    fused: bool | None
    compile: bool
    bucket_bytes: int
    wire_dtype: torch.dtype
    replicas: str
    static_grads: bool
    step_stats: bool

    def __post_init__(self) -> None:
        for key in ("momentum_dtype", "ns_dtype", "wire_dtype"):
            dtype = getattr(self, key)
            if dtype is not None and not (dtype.is_floating_point and dtype.itemsize >= 2):
                raise TypeError(f"{key}={dtype}: take torch.bfloat16, torch.float16, torch.float32 or torch.float64.")
        if self.replicas not in ("share", "repeat"):
            raise ValueError(f"replicas={self.replicas!r}: it is 'share' or 'repeat'.")
        if self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={self.bucket_bytes}: give the bytes of at least one element.")
        if self.compile and not self.batched:
            raise ValueError("compile=True and foreach=False exclude each other: batches are what is compiled.")
        if self.fused and self.foreach is not None:
            raise ValueError(f"fused=True and foreach={self.foreach} exclude each other: leave foreach out.")

    @property
    def batched(self) -> bool:
        """Whether matrices of one shape are multiplied together."""
        return self.foreach is not False
