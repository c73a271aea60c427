"""Peak memory of a run."""

from __future__ import annotations

import sys

import torch


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory held so far, GiB: reserved by torch on CUDA, resident for the process on a CPU.

    Returns:
        None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
