"""The device that is measured: its name, and waiting for it."""

from __future__ import annotations

import pathlib
import platform

import torch


def wait(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cpu":
        return _cpu_name()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
