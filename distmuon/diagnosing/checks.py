"""All checks, in the order of the report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from distmuon.diagnosing import (
    clocks,
    compute,
    devices,
    disks,
    folder,
    interfaces,
    limits,
    links,
    rendezvous,
    shared_memory,
    threads,
    versions,
)
from distmuon.diagnosing.findings import Facts, Finding
from distmuon.diagnosing.job import Job
from distmuon.diagnosing.places import Here, Places

Judge = Callable[[Mapping[int, Facts], Places], Finding]


@dataclass(frozen=True)
class Look:
    """A check of what each rank sees by itself.

    Attributes:
        look: Gives this rank's facts; it waits for no other rank.
        judge: Makes a finding of the facts of all ranks.
    """

    look: Callable[[Here], Facts]
    judge: Judge


@dataclass(frozen=True)
class Measurement:
    """A check that all ranks do at the same time.

    Attributes:
        measure: Gives this rank's facts.
        judge: Makes a finding of the facts of all ranks.
        collective: Whether ranks talk to each other in it.
        prepare: What rank 0 holds meanwhile; its value is given to all ranks.
    """

    measure: Callable[[Job], Facts]
    judge: Judge
    collective: bool = False
    prepare: Callable[[Here], AbstractContextManager[Any]] = lambda here: contextlib.nullcontext()


LOOKS = {
    "versions": Look(versions.look, versions.judge),
    "threads": Look(threads.look, threads.judge),
    "devices": Look(devices.look, devices.judge),
    "rendezvous": Look(rendezvous.look, rendezvous.judge),
    "interfaces": Look(interfaces.look, interfaces.judge),
    "shared memory": Look(shared_memory.look, shared_memory.judge),
    "limits": Look(limits.look, limits.judge),
    "disks": Look(disks.look, disks.judge),
}

# Those that may hang come last: nothing can be trusted to a group that one of them has broken
MEASUREMENTS = {
    "folder": Measurement(folder.measure, folder.judge, prepare=folder.token),
    "compute": Measurement(compute.measure, compute.judge),
    "clocks": Measurement(clocks.measure, clocks.judge, collective=True),
    "links": Measurement(links.measure, links.judge, collective=True),
}
