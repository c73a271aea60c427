"""What step_time.py reads off the machine: bytes on loopback, use of the cores, memory of the allocator."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_NETWORK, _CPU = pathlib.Path("/proc/net/dev"), pathlib.Path("/proc/stat")
# A sample is thrown away if other processes used more than this share of the cores while it ran
_DISTURBANCE = 0.06
# The kernel counts in hundredths of a second, so shorter samples cannot be judged alone
_JUDGED_S = 0.1


def judge(seconds: Sequence[float], others: Sequence[float], cores: int) -> list[bool]:
    """Which samples of a round were quiet.

    Args:
        seconds: Wall time of each sample.
        others: Core seconds that other processes used meanwhile.
        cores: Of the machine.
    """
    whole = sum(others) <= _DISTURBANCE * sum(seconds) * cores
    return [
        whole if elapsed < _JUDGED_S else foreign <= _DISTURBANCE * elapsed * cores
        for elapsed, foreign in zip(seconds, others, strict=True)
    ]


def least_bytes(numels: Sequence[int], ranks: int, layout: str, itemsize: int = 2) -> int:
    """Bytes that one step must send, all ranks together, if each matrix has one owner.

    Replicated: the owner sends the update to every other rank. FSDP2: the other ranks send their shards to
    the owner, and get back as much. ``itemsize`` 2 is bfloat16, the dtype that Newton-Schulz begins with.
    """
    total = sum(numels) * itemsize
    return total * (ranks - 1) if layout == "replicated" else round(2 * total * (ranks - 1) / ranks)


def counts_bytes() -> bool:
    """Whether the system tells the bytes on its loopback."""
    return _NETWORK.exists()


def sent_bytes() -> int:
    """Bytes sent on the loopback interface since boot; 0 where the system does not tell."""
    return loopback_bytes(_NETWORK.read_text()) if _NETWORK.exists() else 0


def loopback_bytes(text: str) -> int:
    """Bytes sent on the loopback interface, from the text of ``/proc/net/dev``."""
    for line in text.splitlines():
        name, colon, counters = line.partition(":")
        if colon and name.strip() == "lo":
            return int(counters.split()[8])
    raise ValueError("/proc/net/dev has no interface lo, wanted the loopback that gloo uses between processes.")


def busy_seconds() -> float:
    """Core seconds that all processes used since boot; 0 where the system does not tell."""
    return cpu_seconds(_CPU.read_text()) if _CPU.exists() else 0.0


def cpu_seconds(text: str) -> float:
    """Core seconds that processes and other guests used since boot, from the text of ``/proc/stat``.

    Interrupts are left out: traffic on the loopback makes them, and no process is charged for them.
    """
    user, nice, system, _idle, _wait, _irq, _softirq, steal = map(int, text.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Core seconds that this process and its threads used."""
    times = os.times()
    return times.user + times.system


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Bytes that the allocator of this rank holds at most above what it held before.

    On a CPU the profiler tells, gloo's threads included; scratch of the math library itself does not show.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as folder, _silent_stderr():
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            step()
        trace = pathlib.Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        return peak_of_events(json.loads(trace.read_text())["traceEvents"])


def peak_of_events(events: Sequence[dict[str, Any]]) -> int:
    """Peak of the allocator above its first value, from the ``[memory]`` events of a torch.profiler trace."""
    ordered = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    if not ordered:
        return 0
    start = ordered[0]["args"]["Total Allocated"] - ordered[0]["args"]["Bytes"]
    return max(0, max(event["args"]["Total Allocated"] for event in ordered) - start)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send file descriptor 2 nowhere: the profiler writes to it from C++, whatever its log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
