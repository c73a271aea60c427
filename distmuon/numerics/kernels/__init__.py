"""Triton kernels for symmetric products on GPU; importing this package does not import Triton.

``symmetric`` holds the products and needs Triton, ``tiles`` says how they are cut, and ``external``
wraps a package of others. Ask `available` first, then import what you need:

    from distmuon.numerics import kernels
    if kernels.available(x.device):
        from distmuon.numerics.kernels import symmetric
        r = symmetric.gram(x)
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# the first capability with bfloat16 units and asynchronous copies to shared memory
_CAPABILITY = (8, 0)


def available(device: torch.device | str) -> bool:
    """Whether the kernels of ``symmetric`` run on ``device``.

    Args:
        device: the device of the tensors, such as ``x.device`` or ``"cuda:1"``.

    Returns:
        True on an NVIDIA GPU of capability 8.0 (A100) or later where Triton can be imported, and on every
        device where ``TRITON_INTERPRET=1`` asks for Triton's interpreter, which checks results and is slow.
    """
    device = torch.device(device)
    if not _installed():
        return False
    if interpreting():
        return True
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET`` asks for the interpreter; Triton reads it when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
