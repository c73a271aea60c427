"""``distmuon doctor`` on real processes: what all see together, faults on one of them, and the ways to start it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from harness import Pool

from distmuon import cli
from distmuon.diagnosing.checks import LOOKS, MEASUREMENTS
from distmuon.diagnosing.findings import FAILURE, OK, WARNING

SIZE = 3
_STARTS = itertools.count()


@pytest.fixture(scope="module")
def pool():
    with Pool(SIZE) as pool:
        yield pool


def nothing(rank):
    return contextlib.nullcontext()


def visit(start, fault, folders=None, timeout_s=20.0, machines=("a", "a", "a")):
    """Examine the ranks of the pool, with ``fault(rank)`` as a context around each of them; findings on rank 0."""
    import torch.distributed as dist

    from distmuon.comm.group import default_group
    from distmuon.diagnosing import compute, folder, links
    from distmuon.diagnosing.places import Here
    from distmuon.diagnosing.post import Post
    from distmuon.diagnosing.session import examine

    rank = dist.get_rank()
    path = None if folders is None else Path(folders[rank])
    name = machines[rank]
    here = Here(rank, SIZE, rank, "cpu", path, timeout_s, node=name, hostname=name)
    store = dist.PrefixStore(f"doctor {start}", default_group().get_group_store())
    # the speed of this machine is not what is tested
    calm = mock.patch.multiple(compute, _SECONDS=0.0), mock.patch.multiple(folder, _SLOW=0.0, _ENOUGH=0)
    small = mock.patch.dict(links._BYTES, cpu=1 << 16)
    slack = mock.patch("distmuon.diagnosing.post._SLACK_S", 1.0)
    with contextlib.ExitStack() as stack:
        for context in (*calm, small, slack, fault(rank)):
            if stack.enter_context(context) == "absent":
                return None
        report = examine(here, Post(store, rank, SIZE, timeout_s), lambda device: None)
    if report is None:
        return None
    return {finding.check: dataclasses.astuple(finding)[1:] for finding in report.findings}, report.facts


def examined(pool, fault=nothing, **kwargs):
    first, *others = pool.run(functools.partial(visit, **kwargs), next(_STARTS), fault)
    assert others == [None] * (SIZE - 1)
    return first


def test_all_ranks_of_a_machine(pool, tmp_path):
    found, facts = examined(pool, folders=[str(tmp_path)] * SIZE)
    assert list(found) == [*LOOKS, "meeting", *MEASUREMENTS]
    for name in ("versions", "devices", "interfaces", "limits", "meeting", "folder", "clocks"):
        assert found[name][0] == OK, found[name]
    assert found["meeting"][1] == "all 3 ranks have come"
    assert found["clocks"][1] == "one machine, one clock"
    assert "within machines all-to-all " in found["links"][1] and "between" not in found["links"][1]
    for name in (*LOOKS, *MEASUREMENTS):
        assert sorted(facts[name]) == [0, 1, 2]
    assert [facts["folder"][rank]["shared"] for rank in range(SIZE)] == [True] * SIZE
    # the lock of rank 0 holds against the other processes, and against another opening in its own
    assert [facts["folder"][rank]["locks"] for rank in range(SIZE)] == [True] * SIZE
    pairs = [sorted(facts["links"][rank]["within machines"]["pairs"]) for rank in range(SIZE)]
    assert pairs == [["1", "2"], ["0", "2"], ["0", "1"]]
    assert list(tmp_path.iterdir()) == []


def late_clock(rank):
    from distmuon.diagnosing import clocks

    return mock.patch.object(clocks, "now", lambda: time.time() - 100.0 * (rank == 2))


def test_ranks_of_two_machines(pool):
    found, facts = examined(pool, late_clock, machines=("a", "a", "b"))
    status, text, todo = found["clocks"]
    assert status == FAILURE and "the clock of rank 2 (b) is 100.0" in text and "behind that of rank 0" in text
    assert "chrony" in todo
    assert facts["clocks"][0] == facts["clocks"][1] == {}
    assert facts["clocks"][2]["ahead"] == pytest.approx(-100.0, abs=5.0)
    # a and b are no names that anybody knows, and gloo then takes the loopback address
    assert found["interfaces"][0] == FAILURE and "where others cannot come" in found["interfaces"][1]
    assert set(facts["links"][0]) == {"within machines", "between machines"}
    assert set(facts["links"][1]) == {"within machines"} and set(facts["links"][2]) == {"between machines"}
    assert "between machines all-to-all " in found["links"][1]


def other_version(rank):
    from distmuon.diagnosing import versions

    return (
        mock.patch.object(versions, "code_version", lambda: "distmuon 9 (code ff), torch 2")
        if rank == 1
        else nothing(0)
    )


def test_another_version_on_one_rank(pool):
    found, _ = examined(pool, other_version)
    assert found["versions"][0] == FAILURE
    assert "9 (code ff) on rank 1" in found["versions"][1]


def slow_product(rank):
    from distmuon.diagnosing import compute

    return mock.patch.object(compute, "_timed", lambda x: 3.0 if rank == 2 else 0.1)


def test_a_rank_that_computes_slowly_is_named(pool):
    found, _ = examined(pool, slow_product)
    assert found["compute"][0] == WARNING
    rates = "0.000302 to 0.00906 TFLOP/s a rank in "
    assert found["compute"][1].startswith(rates) and found["compute"][1].endswith(
        "; rank 2 takes 30.0 times the median"
    )


@contextlib.contextmanager
def slow_link(rank):
    from distmuon.diagnosing import links

    talk = links._talk

    def slowly(*args):
        time.sleep(0.4)
        talk(*args)

    with mock.patch.object(links, "_talk", slowly) if rank == 1 else nothing(0):
        with mock.patch.object(links, "_SAMPLES", 1):
            yield


def test_a_rank_that_talks_slowly_is_named(pool):
    found, _ = examined(pool, slow_link)
    assert found["links"][0] == WARNING
    assert "within machines all-to-all " in found["links"][1] and "; within machines rank 1 takes " in found["links"][1]
    assert "rank 0" not in found["links"][1] and "rank 2" not in found["links"][1]


def test_a_folder_that_is_not_shared(pool, tmp_path):
    own = [tmp_path / "shared", tmp_path / "shared", tmp_path / "other"]
    for path in own[1:]:
        path.mkdir()
    found, facts = examined(pool, impatient, folders=list(map(str, own)))
    assert found["folder"][0] == FAILURE
    assert f"{own[2]} on rank 2 is not the folder of rank 0" in found["folder"][1]
    assert [facts["folder"][rank]["shared"] for rank in range(SIZE)] == [True, True, False]
    assert [list(path.iterdir()) for path in own] == [[], [], []]
    found, _ = examined(pool, folders=[*map(str, own[:2]), str(tmp_path / "none")])
    assert found["folder"][0] == FAILURE and f"{tmp_path}/none is no folder on rank 2" in found["folder"][1]


def impatient(rank):
    from distmuon.diagnosing import folder

    return mock.patch.object(folder, "_SEEN_S", 0.3)


def blind(rank):
    from distmuon.diagnosing import disks

    return mock.patch.object(disks, "_disk", side_effect=OSError(5, "Input/output error")) if rank == 1 else nothing(0)


def test_a_rank_that_cannot_look_takes_part_in_the_rest(pool):
    found, facts = examined(pool, blind)
    assert found["disks"][0] == WARNING and "could not be looked at by rank 1 (OSError" in found["disks"][1]
    assert found["meeting"][0] == OK and sorted(facts["links"]) == [0, 1, 2]


def absent(rank):
    return contextlib.nullcontext("absent" if rank == 2 else None)


def test_a_rank_that_never_comes_is_named(pool):
    found, facts = examined(pool, absent, timeout_s=0.5)
    assert found["meeting"][0] == FAILURE
    assert found["meeting"][1] == "rank 2 of 3 did not come within 0.5 s"
    # the others are examined as far as they go
    assert sorted(facts["versions"]) == sorted(facts["compute"]) == [0, 1]
    assert found["links"][:2] == found["clocks"][:2] == (WARNING, "not measured, as the ranks are not connected")


@contextlib.contextmanager
def stall(rank):
    from distmuon.diagnosing import compute

    slowly = mock.patch.object(compute, "_timed", lambda x: time.sleep(30.0))
    with slowly if rank == 1 else nothing(0):
        yield


def test_a_rank_that_stalls_by_itself_is_named_and_the_links_are_measured(pool):
    found, _ = examined(pool, stall, timeout_s=2.0)
    assert found["compute"][0] == FAILURE
    assert found["compute"][1] == "rank 1 stalled (not finished after 2 s)"
    assert found["links"][0] != FAILURE


def run(command, **environment):
    """A command with the processes that it starts, none of which outlives this."""
    base = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "MASTER_ADDR")}
    process = subprocess.Popen(
        command,
        env={**base, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def test_under_torchrun_rank_0_tells_what_all_found(tmp_path):
    out = tmp_path / "found.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, told, errors = run([*torchrun, "-m", "distmuon.cli", "doctor", "--device", "cpu", "--json", str(out)])
    tree = json.loads(out.read_text())
    assert told.count("2 ranks on 1 machine: ") == 1 and "Traceback" not in told, errors
    assert code == tree["exit_code"] == int(any(finding["status"] == FAILURE for finding in tree["findings"]))
    found = {finding["check"]: finding for finding in tree["findings"]}
    assert list(found) == [*LOOKS, "meeting", "compute", "clocks", "links"]
    assert "all 2 ranks have come, and connected in " in found["meeting"]["found"]
    assert tree["nodes"] == [{"host": socket.gethostname(), "ranks": [0, 1]}]
    assert sorted(tree["facts"]["links"]) == ["0", "1"]


def test_processes_that_are_started_here(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["doctor", "--ranks", "2", "--device", "cpu"]) in (0, 1)
    told = capsys.readouterr().out
    assert "2 ranks on 1 machine: " in told
    assert "ok       meeting        all 2 ranks have come" in told
    assert "within machines all-to-all" in told


@contextlib.contextmanager
def stall_between_ranks(rank):
    from distmuon.diagnosing.job import Job

    with mock.patch.object(Job, "together", lambda *args: time.sleep(60.0)) if rank == 1 else nothing(0):
        yield


def test_a_rank_that_stalls_in_a_collective_is_named(pool):
    """The last one, as nothing can be trusted to the group of the pool after that."""
    found, _ = examined(pool, stall_between_ranks, timeout_s=2.0)
    assert found["links"][:2] == (FAILURE, "rank 1 stalled (not finished after 2 s)")
