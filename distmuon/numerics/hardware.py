"""Which dtypes a device multiplies in hardware."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


@functools.cache
def has_native_bf16(device_type: str) -> bool:
    """Whether matrix products in bfloat16 run on units made for them.

    A CPU without such units emulates each product in scalar code: 768 x 768 Newton-Schulz in
    bfloat16 was seen to take 50 times the time of float32.

    Args:
        device_type: ``torch.device.type``, such as ``"cpu"`` or ``"cuda"``.

    Returns:
        True where bfloat16 products are at least as fast as float32 ones; of a device that this machine lacks, for
        which steps may be planned, too.
    """
    if device_type == "cpu":
        return _cpu_has(*_CPU_FLAGS)
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that iterates are held in when ``dtype`` was asked for.

    ``float32`` stands in for half precision where the device would emulate it; inputs and results
    are still rounded to ``dtype``, so what travels between ranks does not change.
    """
    if dtype is torch.bfloat16 and not has_native_bf16(device.type):
        return torch.float32
    # fp16 products on a CPU run at fp32 speed at best
    if dtype is torch.float16 and device.type == "cpu":
        return torch.float32
    return dtype


@functools.cache
def cpu_cache_bytes() -> int:
    """Size of a core's second-level cache, 1 MiB where torch does not tell."""
    return int(_cpu_capabilities().get("l2_cache_size") or 1 << 20)


def _cpu_has(*flags: str) -> bool:
    """Whether the CPU has one of the units."""
    capabilities = _cpu_capabilities()
    if capabilities:
        return any(capabilities.get(flag, False) for flag in flags)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return any(flag in words for flag in flags)


def _cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of this CPU; empty with versions that do not tell."""
    known = getattr(torch.cpu, "get_capabilities", None)
    return known() if known is not None else {}


def device_class(device: torch.device) -> str:
    """The kind of device whose speed is alike: the name of a built-in table of :mod:`distmuon.numerics.costs`.

    Returns:
        ``"cpu-amx"``, ``"cpu-bf16"`` (AVX512-BF16 and its like) or ``"cpu-float32"``; ``"cuda-sm90"`` and the
        like by compute capability; else ``device.type``.
    """
    if device.type == "cpu":
        if not has_native_bf16("cpu"):
            return "cpu-float32"
        return "cpu-amx" if _cpu_has("amx_bf16") else "cpu-bf16"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm{major}{minor}"
    return device.type
