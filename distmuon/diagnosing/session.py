"""The course of an examination: each rank looks, rank 0 hears, then all measure together as far as they can."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distmuon.diagnosing import devices
from distmuon.diagnosing.checks import LOOKS, MEASUREMENTS, Judge, Measurement
from distmuon.diagnosing.findings import FAILURE, OK, WARNING, Facts, Finding, conclude
from distmuon.diagnosing.job import Job, stalled
from distmuon.diagnosing.places import Here, Places, places_of
from distmuon.diagnosing.post import Post
from distmuon.diagnosing.within import within

Connect = Callable[[torch.device], None]
"""Makes the process group of all ranks, for tensors of a device."""

# Where in the source of gloo an error was raised
_SOURCE = re.compile(r"\[[^\]]*\.(cc|cpp):\d+\]")
_UNCONNECTED = "not measured, as the ranks are not connected"


@dataclass
class Report:
    """What all checks found.

    Attributes:
        places: The ranks that have come.
        size: How many there should be.
        findings: In the order of the checks.
        facts: What they were made of: by check, then by rank.
    """

    places: Places
    size: int
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, dict[int, Facts]] = field(default_factory=dict)

    def code(self, *, strict: bool) -> int:
        """The exit code: 1 after a failure, and with ``strict`` after a warning."""
        bad = (WARNING, FAILURE) if strict else (FAILURE,)
        return int(any(finding.status in bad for finding in self.findings))


def examine(here: Here, post: Post, connect: Connect) -> Report | None:
    """Check everything; all ranks call this, and none waits for long for one that does not.

    Args:
        here: This rank.
        post: To the others.
        connect: Called if all ranks have come and there are several.

    Returns:
        The report on rank 0, None on others.

    Raises:
        distmuon.diagnosing.post.SilenceError: on another rank, if rank 0 stalls or ends.
    """
    post.send("facts", look(here))
    report: Report | None = None
    if here.rank == 0:
        report = _hear(post.collect("facts"), here.size)
    plan = post.decide("plan", lambda: _plan(report))
    job = Job(here, _places(plan), _device(plan["device"], here))
    connected = plan["complete"]
    if here.size > 1:
        connected = _connect(job, post, connect, report, plan["complete"])
    for name, measurement in MEASUREMENTS.items():
        if not _applies(name, job):
            continue
        if measurement.collective and not connected:
            if report is not None:
                report.findings.append(Finding(name, WARNING, _UNCONNECTED, "repair what failed above"))
            continue
        done = _measure(name, measurement, job, post, report)
        connected = connected and (done or not measurement.collective)
    return report


def look(here: Here) -> dict[str, Facts]:
    """What this rank sees by itself, by check; waits for no other rank."""
    found: dict[str, Facts] = {"place": {"node": here.node, "hostname": here.hostname}}
    # a mount that is gone answers nobody; others hear of it before they give this rank up
    patience = here.timeout_s / 2
    for name, check in LOOKS.items():
        try:
            found[name] = within(patience, functools.partial(check.look, here))
        except Exception as error:  # what cannot be looked at is a finding too, and others wait for this rank
            found[name] = {"unseen": f"{type(error).__name__}: {error}"}
    return found


def alone(here: Here, facts: Mapping[str, Facts]) -> Report:
    """The report of what one rank sees by itself."""
    return _hear({here.rank: dict(facts)}, here.size)


def _hear(facts: dict[int, dict[str, Facts]], size: int) -> Report:
    nodes = {rank: fact["place"]["node"] for rank, fact in facts.items()}
    hosts = {rank: fact["place"]["hostname"] for rank, fact in facts.items()}
    report = Report(places_of(nodes, hosts), size)
    for name, check in LOOKS.items():
        own = {rank: fact.get(name, {"unseen": "another version"}) for rank, fact in facts.items()}
        report.facts[name] = own
        report.findings.append(_judged(name, check.judge, own, report.places))
    return report


def _judged(name: str, judge: Judge, facts: dict[int, Facts], places: Places) -> Finding:
    blind = {rank: fact["unseen"] for rank, fact in facts.items() if "unseen" in fact}
    if blind:
        reason = next(iter(blind.values()))
        return Finding(name, WARNING, f"could not be looked at by {places.text(blind)} ({reason})", "look by hand")
    try:
        return judge(facts, places)
    except (KeyError, TypeError) as error:  # facts of ranks that run other code
        todo = "install the same environment on all machines"
        return Finding(name, WARNING, f"cannot be compared, as ranks tell different things ({error})", todo)


def _plan(report: Report | None) -> dict[str, Any]:
    """What rank 0 tells all: who is there, and what they measure on."""
    assert report is not None
    places = report.places
    device = "cuda" if devices.usable(report.facts["devices"]) else "cpu"
    hosts = [[rank, host] for rank, host in places.hosts.items()]
    came = sum(map(len, places.nodes))
    return {"nodes": places.nodes, "hosts": hosts, "device": device, "complete": came == report.size}


def _places(plan: Mapping[str, Any]) -> Places:
    return Places(tuple(map(tuple, plan["nodes"])), {int(rank): host for rank, host in plan["hosts"]})


def _device(name: str, here: Here) -> torch.device:
    return torch.device(name) if name == "cpu" else torch.device(name, here.local_rank)


def _applies(name: str, job: Job) -> bool:
    """Whether there is anything to measure."""
    if name == "folder":
        return job.here.folder is not None
    return job.here.size > 1 or name == "compute"


def _connect(job: Job, post: Post, connect: Connect, report: Report | None, complete: bool) -> bool:
    """Make the group where everybody has come; returns whether it stands, the same on all ranks."""
    if not complete:
        if report is not None:
            report.findings.append(_absent(report, job.here.timeout_s))
        return False
    began = time.perf_counter()
    facts = _attempt(job, lambda: _connected(connect, job.device))
    post.send("connected", {**facts, "seconds": time.perf_counter() - began})
    if report is not None:
        heard = post.collect("connected")
        problems = stalled(heard, report.places)
        seconds = max(fact["seconds"] for fact in heard.values())
        # those that were started here are connected before
        fine = f"all {report.size} ranks have come" + f", and connected in {seconds:.2f} s" * job.here.launched
        report.findings.append(conclude("meeting", fine, problems))
    return bool(post.decide("stands", lambda: report is not None and report.findings[-1].status == OK))


def _connected(connect: Connect, device: torch.device) -> Facts:
    connect(device)
    return {}


def _absent(report: Report, seconds: float) -> Finding:
    came = {rank for node in report.places.nodes for rank in node}
    missing = [rank for rank in range(report.size) if rank not in came]
    found = f"{report.places.text(missing)} of {report.size} did not come within {seconds:g} s"
    todo = "look at what they have said and whether their machine is up, and raise --timeout if they start slowly"
    return Finding("meeting", FAILURE, found, todo)


def _measure(name: str, measurement: Measurement, job: Job, post: Post, report: Report | None) -> bool:
    """Do one of the measurements; returns whether every rank could finish it, the same on all."""
    with measurement.prepare(job.here) as value:
        job.given, job.entered = post.decide(f"given {name}", lambda: value), 0
        post.send(name, _attempt(job, lambda: measurement.measure(job)))
        present = [rank for node in job.places.nodes for rank in node]
        heard = post.collect(name, present) if report is not None else {}
        if report is not None:
            report.findings.append(_found(name, measurement, heard, report))
            report.facts[name] = heard
        done = post.decide(f"done {name}", lambda: len(heard) == len(present) and _finished(heard))
    return bool(done)


def _found(name: str, measurement: Measurement, heard: dict[int, Facts], report: Report) -> Finding:
    problems = stalled(heard, report.places)
    if problems:
        return conclude(name, "", problems)
    return _judged(name, measurement.judge, heard, report.places)


def _finished(heard: Mapping[int, Facts]) -> bool:
    return not any("error" in fact for fact in heard.values())


def _attempt(job: Job, function: Callable[[], Facts]) -> Facts:
    """What a function gives in time, or why it does not."""

    def call() -> Facts:
        if job.device.type != "cpu":  # each thread has one of its own
            torch.get_device_module(job.device).set_device(job.device)
        return function()

    try:
        return within(job.here.timeout_s, call)
    except TimeoutError as error:
        return {"error": str(error), "late": True, "entered": job.entered}
    except Exception as error:  # whatever it is, others hear of it
        # gloo's advice after it is worse than the way out that is given here
        reason = " ".join(_SOURCE.sub("", str(error)).split()).split(". ", 1)[0].rstrip(".")
        return {"error": f"{type(error).__name__}: {reason}", "entered": job.entered}
