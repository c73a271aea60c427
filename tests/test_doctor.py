"""What each check of ``distmuon doctor`` says of good and bad facts, and that facts are seen as they are."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import resource
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distmuon import cli
from distmuon.calibrating.ranks import RanksError
from distmuon.diagnosing import (
    adapters,
    clocks,
    command,
    compute,
    devices,
    disks,
    folder,
    interfaces,
    job,
    limits,
    links,
    meeting,
    names,
    rendezvous,
    shared_memory,
    threads,
    versions,
)
from distmuon.diagnosing.checks import LOOKS, MEASUREMENTS
from distmuon.diagnosing.command import run_command
from distmuon.diagnosing.findings import FAILURE, OK, WARNING, Finding, ranks_text
from distmuon.diagnosing.places import Here, Places, places_of
from distmuon.diagnosing.post import Post, SilenceError
from distmuon.diagnosing.session import Report, alone, examine, look
from distmuon.diagnosing.within import within

ONE = Places(((0, 1),), {0: "a", 1: "a"})
TWO = Places(((0,), (1,)), {0: "a", 1: "b"})
HERE = Here(0, 1, 0, "cpu", None, 5.0, node="a", hostname="a")


def both(fact, **second):
    """The same facts on two ranks, but for what is said of the second."""
    return {0: fact, 1: {**fact, **second}}


def says(finding, status, *words):
    assert finding.status == status, finding
    assert all(word in finding.found + " -> " + finding.todo for word in words), finding
    assert bool(finding.todo) == (status != OK)


def answers(table):
    """A name server that knows only these."""

    def getaddrinfo(name, port, **kwargs):
        if name not in table:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in table[name]]

    return mock.patch("socket.getaddrinfo", getaddrinfo)


VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "nccl": "2.27.3", "distmuon": "0.1 (code aa)"}


@pytest.mark.parametrize(
    ("other", "status", "words"),
    [
        ({}, OK, ["Python 3.11.7, torch 2.13.0, NCCL 2.27.3, distmuon 0.1 (code aa)"]),
        ({"torch": "2.9.0"}, FAILURE, ["torch differs: 2.13.0 on rank 0, 2.9.0 on rank 1", "same environment"]),
        ({"nccl": "2.21.5"}, FAILURE, ["NCCL differs"]),
        ({"distmuon": "0.1 (code bb)"}, FAILURE, ["distmuon differs: 0.1 (code aa) on rank 0 (a), 0.1 (code bb)"]),
        ({"python": "3.12.7"}, FAILURE, ["Python differs"]),
        ({"python": "3.11.9"}, WARNING, ["Python differs: 3.11.7 on rank 0 (a), 3.11.9 on rank 1 (b)"]),
    ],
)
def test_versions(other, status, words):
    places = ONE if "torch" in other else TWO
    says(versions.judge(both(VERSIONS, **other), places), status, *words)


def test_versions_of_this_process():
    own = versions.look(HERE)
    assert own["torch"] == torch.__version__ and own["python"] == sys.version.split()[0]
    assert own["distmuon"].startswith("0.") and "(code " in own["distmuon"] and "torch" not in own["distmuon"]


THREADS = {"cores": 8, "threads": 4, "omp": "4", "device": "cpu"}


@pytest.mark.parametrize(
    ("fact", "status", "words"),
    [
        ({}, OK, ["2 ranks with 4 threads each, 8 cores"]),
        ({"threads": 8, "omp": None}, WARNING, ["share 8 cores, and OMP_NUM_THREADS is not set", "NUM_THREADS=4"]),
        ({"threads": 5, "omp": "5"}, WARNING, ["2 ranks with 5 threads each share 8 cores", "OMP_NUM_THREADS=4"]),
        ({"cores": 1, "threads": 1}, WARNING, ["share 1 cores", "start 1 ranks on a machine at most"]),
        ({"threads": 1, "omp": "1"}, WARNING, ["leave more than half of 8 cores idle", "OMP_NUM_THREADS=4"]),
        ({"threads": 1, "omp": "1", "device": "cuda"}, OK, ["8 cores"]),
        ({"omp": "all"}, WARNING, ["OMP_NUM_THREADS is 'all'"]),
    ],
)
def test_threads(fact, status, words):
    says(threads.judge(both({**THREADS, **fact}, **fact), ONE), status, *words)


def test_cores_are_those_of_the_container(tmp_path):
    with mock.patch.object(os, "sched_getaffinity", return_value=set(range(16))):
        for text, cores in (("max 100000", 16), ("400000 100000", 4), ("50000 100000", 1)):
            (tmp_path / "cpu.max").write_text(text)
            with mock.patch.object(threads, "_QUOTA", tmp_path / "cpu.max"):
                assert threads.cores() == cores


GPU = {"device": "cuda", "count": 2, "local_rank": 0, "visible": None, "name": "H100", "bf16": True}
GPU |= {"uuid": "x", "free": 79 << 30, "total": 80 << 30}
CPU = {"device": "cpu", "count": 0, "local_rank": 0, "visible": None, "name": "EPYC", "bf16": False}
BLIND = {key: GPU[key] for key in ("device", "count", "visible")} | {"local_rank": 3, "count": 1, "visible": "0"}


@pytest.mark.parametrize(
    ("second", "status", "words"),
    [
        ({**GPU, "uuid": "y"}, OK, ["H100, with bfloat16 units; at least 79.0 GiB free"]),
        ({**GPU, "uuid": "y", "name": "A100"}, WARNING, ["kinds differ: H100 on rank 0, A100 on rank 1"]),
        (GPU, FAILURE, ["ranks 0, 1 have the same GPU"]),
        ({**GPU, "uuid": "y", "free": 40 << 30}, WARNING, ["GPU of rank 1 40.0 GiB of 80.0 GiB are free"]),
        (CPU, FAILURE, ["no GPU is seen by rank 1"]),
        (BLIND, FAILURE, ["rank 1 needs GPU 3 and sees 1, with CUDA_VISIBLE_DEVICES=0"]),
        ({**BLIND, "error": "out of memory"}, FAILURE, ["the GPU of rank 1 cannot be used (out of memory)"]),
    ],
)
def test_devices(second, status, words):
    facts = {0: GPU, 1: second}
    says(devices.judge(facts, ONE), status, *words)
    assert devices.usable(facts) == ("free" in second)


def test_devices_of_this_process():
    fact = devices.look(HERE)
    assert fact["device"] == "cpu" and fact["name"]
    says(devices.judge({0: fact}, places_of({0: "a"}, {0: "a"})), OK, fact["name"], "bfloat16 units")
    with mock.patch("torch.cuda.device_count", return_value=1):
        fact = devices.look(dataclasses.replace(HERE, device="cuda", local_rank=1))
    says(devices.judge({0: fact}, ONE), FAILURE, "rank 0 needs GPU 1 and sees 1")


def test_shared_memory():
    fake = collections.namedtuple("fake", "f_blocks f_frsize f_bavail")
    for blocks, free, status, words in [
        (1 << 20, 1 << 19, OK, ["2.0 GiB of 4.0 GiB of /dev/shm are free"]),
        (1 << 14, 1 << 14, FAILURE, ["64 MiB of 64 MiB", "--shm-size"]),
        (1 << 17, 1 << 17, WARNING, ["512 MiB of 512 MiB", "--shm-size"]),
        (1 << 20, 100, FAILURE, ["0 MiB of 4.0 GiB", "remove what other jobs left"]),
    ]:
        with mock.patch("os.statvfs", return_value=fake(blocks, 4096, free)):
            fact = shared_memory.look(HERE)
        says(shared_memory.judge(both(fact), ONE), status, *words)
    good = {"size": 4 << 30, "free": 4 << 30}
    says(shared_memory.judge(both(good, free=1 << 20), TWO), FAILURE, "1 MiB of 4.0 GiB of /dev/shm are free on b")


@pytest.mark.parametrize(
    ("files", "locked", "adapters_there", "status", "words"),
    [
        (1024, 8192, [], OK, ["1024 open files; RDMA: no adapter"]),
        (271, 8192, [], FAILURE, ["ranks 0, 1 may open 271 files, and about 272 are needed", "ulimit -n"]),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, ["mlx5_0"], OK, ["no limit of open files; RDMA: mlx5_0"]),
        (1024, 1 << 16, ["mlx5_0"], WARNING, ["may lock 64 KiB", "ulimit -l unlimited"]),
    ],
)
def test_limits(tmp_path, files, locked, adapters_there, status, words):
    for name in adapters_there:
        (tmp_path / name).mkdir()
    limit = {resource.RLIMIT_NOFILE: (files, files), resource.RLIMIT_MEMLOCK: (locked, locked)}
    with mock.patch("resource.getrlimit", limit.get), mock.patch.object(limits, "_ADAPTERS", tmp_path):
        fact = limits.look(dataclasses.replace(HERE, size=2))
    says(limits.judge(both(fact), ONE), status, *words)


def test_disks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    usage = collections.namedtuple("usage", "free")
    for free, status, words in [
        (20 << 30, OK, ["temporary files (", "HF_HOME (", "20.0 GiB free"]),
        (5 << 30, WARNING, ["HF_HOME: 5.0 GiB are free on ranks 0, 1", "name another disk with HF_HOME"]),
        (10 << 20, FAILURE, ["temporary files: 10 MiB are free", "TMPDIR"]),
    ]:
        with mock.patch("shutil.disk_usage", return_value=usage(free)):
            says(disks.judge(both(disks.look(HERE)), ONE), status, *words)
    assert list(tmp_path.iterdir()) == []
    denied = mock.patch("tempfile.TemporaryFile", side_effect=PermissionError(13, "Permission denied"))
    with denied, mock.patch("shutil.disk_usage", return_value=usage(20 << 30)):
        finding = disks.judge(both(disks.look(HERE)), ONE)
    says(finding, FAILURE, "not/yet cannot be written on ranks 0, 1 (Permission denied)", "with HF_HOME", "TMPDIR")


def meet_at(monkeypatch, address, port="29500"):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)


def rendezvous_of(places, **kwargs):
    here = dataclasses.replace(HERE, size=2, launched=True, **kwargs)
    fact = rendezvous.look(here)
    return rendezvous.judge({0: fact, 1: {**fact, "head": False}}, places)


def test_rendezvous_between_machines(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    meet_at(monkeypatch, "head")
    with mock.patch.object(rendezvous, "is_own", return_value=True):
        with answers({"a": ["10.0.0.1"], "head": ["10.0.0.1"]}):
            says(rendezvous_of(TWO), OK, "MASTER_ADDR head port 29500 is 10.0.0.1", "a is 10.0.0.1")
            monkeypatch.setenv("MASTER_PORT", "http")
            says(rendezvous_of(TWO), FAILURE, "MASTER_PORT is 'http' on rank 0", "such as 29500")
            monkeypatch.setenv("MASTER_PORT", "29500")
        with answers({"a": ["10.0.0.1"]}):
            says(rendezvous_of(TWO), FAILURE, "MASTER_ADDR head has no address on ranks 0, 1", "not known", "DNS")
        with answers({"a": ["10.0.0.1"], "head": ["127.0.0.1"]}):
            says(rendezvous_of(TWO), FAILURE, "MASTER_ADDR head is 127.0.0.1 on rank 1 (b)")
            assert rendezvous_of(ONE).status == OK
        with answers({"a": ["127.0.1.1"], "head": ["10.0.0.1"]}):
            says(rendezvous_of(TWO), FAILURE, "the machine's own name is 127.0.1.1 on ranks 0, 1 (a, b)", "/etc/hosts")
            assert rendezvous_of(ONE).status == OK
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
            says(rendezvous_of(TWO), WARNING, "the machine's own name is 127.0.1.1")
        with answers({"head": ["10.0.0.1"]}):
            says(rendezvous_of(ONE), WARNING, "the machine's own name has no address on rank 0")
    with (
        mock.patch.object(rendezvous, "is_own", return_value=False),
        answers({"a": ["10.0.0.1"], "head": ["10.0.0.9"]}),
    ):
        says(rendezvous_of(TWO), WARNING, "MASTER_ADDR head is 10.0.0.9, which rank 0's machine has not")


def test_rendezvous_before_a_launch(monkeypatch):
    places = places_of({0: "a"}, {0: "a"})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        meet_at(monkeypatch, "127.0.0.1", str(port))
        with answers({"a": ["127.0.0.1"], "127.0.0.1": ["127.0.0.1"]}):
            says(rendezvous.judge({0: rendezvous.look(HERE)}, places), FAILURE, f"port {port} of this machine is taken")
            listener.close()
            assert rendezvous.judge({0: rendezvous.look(HERE)}, places).status == OK
    silent = mock.patch("socket.create_connection", side_effect=TimeoutError("timed out"))
    with (
        silent,
        mock.patch.object(rendezvous, "is_own", return_value=False),
        answers({"a": ["10.0.0.1"], "h": ["1.2.3.4"]}),
    ):
        meet_at(monkeypatch, "h")
        says(
            rendezvous.judge({0: rendezvous.look(HERE)}, places), FAILURE, "h does not answer at port 29500", "firewall"
        )


def test_a_name_server_that_is_silent_is_not_waited_for():
    slow = mock.patch("socket.getaddrinfo", side_effect=lambda *args, **kwargs: time.sleep(20))
    with slow, mock.patch.object(names, "_SECONDS", 0.05), pytest.raises(TimeoutError, match="not finished after"):
        names.addresses("head")


ADAPTERS = {
    "lo": {"up": True, "addresses": ["127.0.0.1"]},
    "eth0": {"up": True, "addresses": ["10.0.0.1"]},
    "eth1": {"up": False, "addresses": ["10.1.0.1"]},
    "ib0": {"up": True, "addresses": []},
    "docker0": {"up": True, "addresses": ["172.17.0.1"]},
}


@pytest.mark.parametrize(
    ("gloo", "nccl", "own", "several", "status", "words"),
    [
        (None, None, "10.0.0.1", True, OK, ["gloo takes eth0, 10.0.0.1"]),
        (None, None, "127.0.0.1", False, OK, ["gloo takes lo, 127.0.0.1"]),
        (None, None, "127.0.1.1", True, FAILURE, ["rank 0 (a) would take 127.0.1.1 (lo)", "GLOO_SOCKET_IFNAME=NAME"]),
        (None, None, "172.17.0.1", True, FAILURE, ["would take 172.17.0.1 (docker0), where others cannot come"]),
        ("eth0", "eth", "127.0.0.1", True, OK, ["gloo takes eth0, 10.0.0.1"]),
        ("eth9", None, "10.0.0.1", False, FAILURE, ["IFNAME names eth9, and on rank 0 there are lo, eth0, eth1"]),
        ("eth1", None, "10.0.0.1", False, FAILURE, ["names eth1, which is down on rank 0", "ip link set eth1 up"]),
        ("ib0", None, "10.0.0.1", False, FAILURE, ["names ib0, which has no address"]),
        ("docker0", None, "10.0.0.1", True, FAILURE, ["names docker0 on rank 0 (a), which leads to no other machine"]),
        ("lo", None, "10.0.0.1", False, OK, ["gloo takes lo, 127.0.0.1"]),
        (None, "=eth", "10.0.0.1", False, WARNING, ["NCCL_SOCKET_IFNAME names =eth", "NCCL_SOCKET_IFNAME=NAME"]),
        (None, "^docker,lo", "10.0.0.1", True, OK, ["eth0"]),
        (None, "lo", "10.0.0.1", True, WARNING, ["NCCL_SOCKET_IFNAME names lo"]),
    ],
)  # fmt: skip
def test_interfaces(monkeypatch, gloo, nccl, own, several, status, words):
    for name, value in (("GLOO_SOCKET_IFNAME", gloo), ("NCCL_SOCKET_IFNAME", nccl)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    there = mock.patch.object(interfaces, "adapters", return_value=ADAPTERS)
    with there, answers({"a": [own]}), mock.patch.object(interfaces, "is_own", return_value=True):
        fact = interfaces.look(HERE)
    nowhere = {"address": "10.0.0.2", "names": ["eth0"], "gloo": None, "nccl": None}
    places = TWO if several else places_of({0: "a"}, {0: "a"})
    facts = {0: fact, 1: {**fact, **nowhere}} if several else {0: fact}
    says(interfaces.judge(facts, places), status, *words)
    if "NCCL" in words[0]:
        says(interfaces.judge({rank: {**f, "device": "cuda"} for rank, f in facts.items()}, places), FAILURE, *words)


def test_what_many_ranks_have_in_common_is_told_once():
    fact = {"adapters": {}, "gloo": None, "nccl": "eth", "device": "cuda", "names": ["lo"], "address": "127.0.0.1"}
    facts = {rank: {**fact, "adapters": {f"en{rank}": ADAPTERS["eth0"]}} for rank in range(50)}
    finding = interfaces.judge(facts, places_of({r: f"n{r}" for r in facts}, {r: f"n{r}" for r in facts}))
    assert "gloo on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 42 more would take 127.0.0.1 (lo)" in finding.found
    assert "NCCL_SOCKET_IFNAME names eth, and on rank 3 (n3) there are en3; and 46 more" in finding.found


def test_machines_that_have_one_address_each_for_itself():
    fact = {
        "adapters": ADAPTERS,
        "gloo": None,
        "nccl": None,
        "device": "cpu",
        "names": ["net0"],
        "address": "10.0.2.15",
    }
    says(interfaces.judge(both(fact), TWO), FAILURE, "ranks 0, 1 (a, b) are on different machines", "10.0.2.15 on each")
    assert interfaces.judge(both(fact), ONE).status == OK


def test_interfaces_of_this_machine():
    there = adapters.adapters()
    assert set(there) == {name for _, name in socket.if_nameindex()}
    assert "127.0.0.1" in there["lo"]["addresses"] and there["lo"]["up"]
    assert adapters.leads_nowhere("virbr0") and not adapters.leads_nowhere("bond0")


def test_compute():
    fact = {"seconds": 0.01, "side": 1000, "dtype": "float32"}
    says(compute.judge(both(fact, seconds=0.019), ONE), OK, "0.105 to 0.2 TFLOP/s a rank in float32, 1000 x 1000")
    says(compute.judge(both(fact, seconds=0.03), ONE), WARNING, "rank 1 takes 3.0 times the median", "throttling")


def test_clocks():
    says(clocks.judge({0: {}, 1: {}}, ONE), OK, "one machine, one clock")
    for ahead, off, status, words in [
        (0.002, 0.001, OK, ["at most 2.00 ms apart, to within 1 ms"]),
        (-1.5, 0.01, WARNING, ["rank 1 (b) is 1.50 s (to within 0.01 s) behind that of rank 0", "chrony"]),
        (1.5, 0.6, OK, ["1500.00 ms"]),  # it may be less than a second
        (40.0, 0.01, FAILURE, ["ahead of"]),
    ]:
        says(clocks.judge({0: {}, 1: {"ahead": ahead, "off": off}}, TWO), status, *words)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_neighbours_talk_in_rounds_in_which_nobody_has_two(n):
    members = [10 * i for i in range(n)]
    talks = {rank: list(links.rounds(members, rank)) for rank in members}
    assert len({len(own) for own in talks.values()}) == 1
    for rank, own in talks.items():
        place = members.index(rank)
        ring = {members[place - 1], members[(place + 1) % n]}
        assert sorted(partner for partner in own if partner is not None) == sorted(ring)
        for turn, partner in enumerate(own):
            assert partner is None or talks[partner][turn] == rank


def ring(n, slow_pairs):
    """The facts of ranks in a ring, of whose pairs some take 5 times as long."""
    facts = {}
    for rank in range(n):
        pairs = {
            str(p): 0.1 if {rank, p} in slow_pairs else 0.02 for p in links.rounds(range(n), rank) if p is not None
        }
        facts[rank] = {links.WITHIN: {"ranks": n, "exchange_rate": 1e9, "reduce_rate": 2e9, "pairs": pairs}}
    return facts, Places((tuple(range(n)),), dict.fromkeys(range(n), "a"))


def test_links():
    says(links.judge(*ring(4, [])), OK, "within machines all-to-all 1 GB/s, all-reduce 2 GB/s a rank (4 ranks)")
    for n in (3, 4, 5):
        finding = links.judge(*ring(n, [{0, 1}, {1, 2}]))
        says(finding, WARNING, "rank 1 takes 5.0 times the median with each neighbour")
        assert "rank 0" not in finding.found and "rank 2" not in finding.found
    finding = links.judge(*ring(4, [{2, 3}]))
    says(finding, WARNING, "ranks 2, 3 take 5.0 times the median with each other", "cables")
    assert "neighbour" not in finding.found
    assert links.judge({0: {}}, places_of({0: "a"}, {0: "a"})).status == OK


def test_links_have_groups_within_and_between_machines():
    assert links.classes(ONE) == {links.WITHIN: [(0, 1)]}
    assert links.classes(TWO) == {links.BETWEEN: [(0, 1)]}
    uneven = Places(((0, 1), (2, 3, 4), (5,)), {})
    assert links.classes(uneven) == {links.WITHIN: [(0, 1), (2, 3, 4)], links.BETWEEN: [(0, 2, 5)]}


FOLDER = {"path": "/runs", "missing": False, "rate": 2e8, "free": 1 << 40, "shared": True, "locks": True}


@pytest.mark.parametrize(
    ("second", "status", "words"),
    [
        ({}, OK, ["/runs: 200 MB/s with fsync, shared by all ranks, locks hold, 1024.0 GiB free"]),
        ({"missing": True, "failed": "no", "shared": None}, FAILURE, ["/runs is no folder on rank 1 (b)", "mkdir -p"]),
        ({"failed": "Read-only file system"}, FAILURE, ["cannot be written on rank 1 (b) (Read-only file system)"]),
        ({"shared": False, "locks": None}, FAILURE, ["on rank 1 (b) is not the folder of rank 0", "all machines"]),
        ({"locks": False}, WARNING, ["file locks do not hold on rank 1 (b) (two have it at once)"]),
        ({"locks": False, "lock_error": "No locks available"}, WARNING, ["(No locks available)"]),
        ({"free": 5 << 30}, WARNING, ["5.0 GiB are free on rank 1 (b)"]),
        ({"free": 5 << 20}, FAILURE, ["5 MiB are free on rank 1 (b)"]),
        ({"rate": 1e6}, WARNING, ["rank 1 (b) write 1.0 MB/s", "faster file system"]),
    ],
)  # fmt: skip
def test_folder(second, status, words):
    says(folder.judge(both(FOLDER, **second), TWO), status, *words)


def folder_of(path, here=HERE):
    with folder.token(dataclasses.replace(here, folder=path)) as token:
        own = job.Job(dataclasses.replace(here, folder=path), places_of({0: "a"}, {0: "a"}), torch.device("cpu"), token)
        return folder.measure(own)


def test_a_folder_is_tried_and_nothing_is_left_in_it(tmp_path):
    fact = folder_of(tmp_path)
    assert fact["shared"] is True and fact["locks"] is True and fact["rate"] > 0
    assert list(tmp_path.iterdir()) == []
    assert folder_of(tmp_path / "not there")["missing"]
    with mock.patch("os.fsync", side_effect=OSError(5, "Input/output error")):
        fact = folder_of(tmp_path)
    assert fact["failed"] == "Input/output error" and fact["shared"] is None
    with mock.patch("fcntl.flock"):  # a file system that grants every lock
        assert folder_of(tmp_path)["locks"] is False
    with mock.patch("fcntl.flock", side_effect=OSError(37, "No locks available")):
        assert folder_of(tmp_path)["lock_error"] == "No locks available"
    assert list(tmp_path.iterdir()) == []


def test_of_ranks_that_wait_those_that_are_behind_are_named():
    late = {"error": "not finished after 3 s", "late": True, "entered": 7}
    (problem,) = job.stalled(both(late, entered=6), TWO)
    assert problem.found == "rank 1 (b) stalled (not finished after 3 s)"
    (problem,) = job.stalled(both(late), ONE)
    assert problem.found.startswith("all ranks waited for one another")
    (problem,) = job.stalled({0: {}, 1: late}, ONE)
    assert problem.found.startswith("rank 1 stalled")
    (problem,) = job.stalled({0: {"error": "connection reset", "entered": 2}, 1: late}, ONE)
    assert problem.found == "rank 0: connection reset"
    (problem,) = job.stalled({0: late}, ONE)
    assert problem.found == "nothing was heard of rank 1 in time"
    assert job.stalled({0: {}, 1: {}}, ONE) == []


def test_what_cannot_be_looked_at_is_a_finding():
    with mock.patch("os.statvfs", side_effect=FileNotFoundError(2, "No such file")):
        report = alone(HERE, look(HERE))
    (finding,) = [finding for finding in report.findings if finding.check == "shared memory"]
    says(finding, WARNING, "could not be looked at by rank 0 (FileNotFoundError")
    with mock.patch("os.statvfs", side_effect=lambda path: time.sleep(5.0)):
        report = alone(HERE, look(dataclasses.replace(HERE, timeout_s=0.4)))
    (finding,) = [finding for finding in report.findings if finding.check == "shared memory"]
    says(finding, WARNING, "could not be looked at by rank 0 (TimeoutError: not finished after 0.2 s)")
    facts = look(HERE)
    del facts["limits"]["files"]
    (finding,) = [finding for finding in alone(HERE, facts).findings if finding.check == "limits"]
    says(finding, WARNING, "cannot be compared", "same environment")


def test_others_end_if_rank_0_is_silent():
    with mock.patch("distmuon.diagnosing.post._SLACK_S", 0.05):
        post = Post(dist.HashStore(), 1, 2, 0.05)
        with pytest.raises(SilenceError, match=r"rank 1: rank 0 has been silent for 0 s: look there first\."):
            examine(dataclasses.replace(HERE, rank=1, size=2), post, lambda device: None)


def test_a_call_in_time_gives_its_result_or_its_error():
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
    with pytest.raises(TimeoutError, match=r"not finished after 0\.05 s"):
        within(0.05, lambda: time.sleep(2))


def test_a_rank_that_cannot_get_to_the_others_says_why(monkeypatch):
    here = dataclasses.replace(HERE, rank=1, size=2, timeout_s=0.3, launched=True)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(meeting.UnmetError, match="WORLD_SIZE is 2, and MASTER_ADDR and MASTER_PORT"):
        meeting.meet(here)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        meet_at(monkeypatch, "127.0.0.1", str(port))
        with pytest.raises(
            meeting.UnmetError, match=rf"nobody answers at 127.0.0.1 port {port} within 0.3 s \(Connection ref"
        ):
            meeting.meet(here)
        listener.listen()
        with pytest.raises(meeting.UnmetError, match=rf"port {port} of a is taken"):
            meeting.meet(dataclasses.replace(here, rank=0))
    meet_at(monkeypatch, "nowhere")
    with answers({}), pytest.raises(meeting.UnmetError, match="MASTER_ADDR nowhere has no address here"):
        meeting.meet(here)


def test_ranks_are_named():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert TWO.text([1]) == "rank 1 (b)" and TWO.text([5]) == "rank 5" and ONE.text([1]) == "rank 1"


def doctor(*arguments):
    return cli.main(["doctor", *arguments])


def test_this_machine_alone(tmp_path, capsys):
    out = tmp_path / "found.json"
    good = {name: mock.Mock(judge=lambda facts, places, name=name: ok(name), look=lambda here: {}) for name in LOOKS}
    with mock.patch.dict("distmuon.diagnosing.session.LOOKS", good), mock.patch.multiple(folder, _SLOW=0.0, _ENOUGH=0):
        assert doctor("--folder", str(tmp_path), "--json", str(out), "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert told.startswith("1 rank on 1 machine: ") and "10 ok, 0 warnings, 0 failures" in told
    tree = json.loads(out.read_text())
    assert [finding["check"] for finding in tree["findings"]] == [*LOOKS, "folder", "compute"]
    assert tree["exit_code"] == 0 and tree["facts"]["folder"]["0"]["locks"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def ok(name):
    return Finding(name, OK, "fine")


def test_exit_codes(tmp_path, capsys):
    for status, codes in ((OK, (0, 0)), (WARNING, (0, 1)), (FAILURE, (1, 1))):
        report = Report(ONE, 2, [ok("versions"), dataclasses.replace(ok("threads"), status=status)])
        assert (report.code(strict=False), report.code(strict=True)) == codes
    short = mock.patch.object(compute, "_SECONDS", 0.0)
    gone = str(tmp_path / "gone")
    with short:
        assert doctor("--folder", gone, "--device", "cpu") == 1
        # wrapped at blanks, wherever the folder of the test is
        assert f"FAILURE folder {gone} is no folder on rank 0" in " ".join(capsys.readouterr().out.split())
        warned = mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "none"})
        with warned:
            assert doctor("--device", "cpu", "--strict") == 1
        told = capsys.readouterr().out
        assert "WARNING  threads        OMP_NUM_THREADS is 'none' on rank 0" in told
        assert doctor("--device", "cpu", "--json", str(tmp_path / "no" / "x.json")) == 1
        assert "error: --json " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--timeout", "0"], "error: --timeout is 0, and it counts seconds: give more than 0."),
        (["--ranks", "0"], "error: --ranks is 0, and it counts processes: give 1 or more."),
        (["--fodler", "x"], "error: unrecognized arguments: --fodler x (see distmuon doctor --help)."),
    ],
)
def test_bad_usage(arguments, sentence, capsys):
    assert doctor(*arguments) == 2
    assert capsys.readouterr().err == sentence + "\n"


def test_ranks_are_not_started_in_a_launch(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(["--ranks", "2"]) == 2
    assert "torchrun has started them already: drop it." in capsys.readouterr().err


def test_processes_that_cannot_meet_are_a_finding(capsys, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    error = RanksError("process 0 of 2: RuntimeError: Unable to find address for: none0")
    with mock.patch("distmuon.diagnosing.command.start", side_effect=error):
        assert doctor("--ranks", "2", "--device", "cpu") == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "FAILURE interfaces GLOO_SOCKET_IFNAME names none0, and on rank 0 there are " in told
    assert "FAILURE meeting the processes cannot work together: process 0 of 2: RuntimeError: Unable to" in told


def launch(monkeypatch, rank, port):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    # the process is pytest's, and does not end with the command
    return run_command(["--device", "cpu", "--timeout", "0.4"])


def test_rank_0_of_a_launch_names_the_rank_that_does_not_come(monkeypatch, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mock.patch("distmuon.diagnosing.post._SLACK_S", 0.1), mock.patch.object(command, "_FAREWELL_S", 0.1):
        assert launch(monkeypatch, 0, port) == 1
    told = capsys.readouterr().out
    assert told.startswith("1 of 2 ranks on 1 machine: ")
    assert "FAILURE  meeting        rank 1 of 2 did not come within 0.4 s" in told
    assert "WARNING  links          not measured, as the ranks are not connected" in told


def test_another_rank_of_a_launch_says_why_it_cannot_come(monkeypatch, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert launch(monkeypatch, 1, probe.getsockname()[1]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("rank 1 could not get to the others\n")
    assert "FAILURE  meeting        nobody answers at 127.0.0.1 port " in told.err
    assert "\nok " not in told.err


def test_the_documentation_names_every_check():
    text = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")
    for name in (*LOOKS, *MEASUREMENTS, "meeting"):
        assert f"| `{name}` |" in text
