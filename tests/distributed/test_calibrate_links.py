"""Links are measured between real processes: what is timed, who talks to whom, and how a failure ends."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
from harness import Pool

from distmuon.calibrating.fit import fit_link
from distmuon.calibrating.links import COLLECTIVES, LinkTiming, measure_links
from distmuon.calibrating.ranks import Ranks, RanksError, start
from distmuon.calibrating.session import Job, run
from distmuon.numerics.costs import CostTable

CPU = torch.device("cpu")
SIZES = (1 << 10, 1 << 12, 1 << 14)


def timings(nodes, rank=None):
    import torch.distributed as dist

    return measure_links(Ranks(dist.get_rank(), nodes, CPU), SIZES, rounds=3, say=str)


def both_ways(nodes):
    import torch.distributed as dist

    ranks = Ranks(dist.get_rank(), nodes, CPU)
    return ranks.size, ranks.agree(10.0 - ranks.rank), ranks.gather(ranks.rank)


@pytest.fixture(scope="module")
def pool():
    with Pool(3) as pool:
        yield pool


def test_the_largest_number_counts(pool):
    assert pool.run(both_ways, ((0, 1, 2),)) == [(3, 10.0, [0, 1, 2])] * 3


@pytest.mark.parametrize(
    ("nodes", "classes"),
    [
        (((0, 1, 2),), {"local": 3}),
        (((0,), (1,), (2,)), {"remote": 3}),
        # rank 2 is alone on its machine, and rank 1 has no peer on the other
        (((0, 1), (2,)), {"local": 2, "remote": 2}),
        (((0,), (1, 2)), {"local": 2, "remote": 2}),
    ],
)
def test_each_class_of_links_is_measured_with_the_ranks_that_it_joins(pool, nodes, classes):
    found = pool.run(timings, nodes)
    assert found[0] == found[1] == found[2]
    keys = [(timing.link, timing.collective, timing.size) for timing in found[0]]
    assert keys == [(link, name, size) for link in classes for name in COLLECTIVES for size in SIZES]
    for timing in found[0]:
        assert timing.ranks == classes[timing.link]
        assert timing.seconds > 0.0 and timing.spread >= 0.0
        # whole elements of each part, of 2 and 4 bytes
        assert timing.size - 8 <= timing.nbytes <= timing.size
    link = fit_link([timing for timing in found[0] if timing.link in classes])
    assert link.latency > 0.0


def test_sizes_that_would_take_too_long_are_left_out_on_all_ranks(pool):
    found, said = zip(*pool.run(impatient, ((0, 1, 2),)), strict=True)
    assert found[0] == found[1] == found[2]
    assert [timing.size for timing in found[0]] == [SIZES[0]] * 3
    assert len(said[0]) == 6
    assert said[0][0].startswith("left out: exchange of 4096 bytes over local links would take about ")


def impatient(nodes):
    import torch.distributed as dist

    said = []
    ranks = Ranks(dist.get_rank(), nodes, CPU)
    return measure_links(ranks, SIZES, rounds=1, longest_s=0.0, say=said.append), said


def test_links_of_this_machine_between_two_new_processes():
    before = set(multiprocessing.active_children())
    found = run(Job(sizes=SIZES), device=CPU, count=1, threads=1, in_launch=False)
    assert found.engines == found.passes == []
    assert len(found.links) == 3 * len(SIZES)
    assert {(timing.link, timing.ranks) for timing in found.links} == {("local", 2)}
    assert set(multiprocessing.active_children()) == before


def test_everything_on_two_processes_at_the_same_time():
    job = Job(((4, 6), (8, 8)), ("gram",), (4,), 16, SIZES[:1])
    found = run(job, device=CPU, count=2, threads=1, in_launch=False)
    assert [timing.shape for timing in found.engines] == [(4, 6), (8, 8)]
    assert len(found.passes) == len(found.links) == 3


def fail_on_one(ranks):
    if ranks.rank == 1:
        raise RuntimeError("no route\nto host.")
    ranks.agree(0.0)


def die_on_one(ranks):
    if ranks.rank == 1:
        os._exit(3)
    time.sleep(600)


def hang(ranks):
    time.sleep(600)


@pytest.mark.parametrize(
    ("function", "limit", "reason"),
    [
        (fail_on_one, 60.0, r"process 1 of 2: RuntimeError: no route to host$"),
        (die_on_one, 60.0, r"process 1 of 2: it ended without a word$"),
        (hang, 0.5, r"of 2 processes, 0, 1 had not finished after 0\.5 s$"),
    ],
)
def test_a_process_that_fails_dies_or_hangs_ends_all_in_half_a_sentence(function, limit, reason):
    before = set(multiprocessing.active_children())
    with pytest.raises(RanksError, match=reason):
        start(2, function, device=CPU, threads=1, timeout_s=limit)
    assert set(multiprocessing.active_children()) == before


LAUNCHED = """
import sys
from distmuon import cli
from distmuon.calibrating import command, measure
from distmuon.calibrating.shapes import Shapes, Sizes
command.shapes_for = lambda device: Shapes(((2, 3), (4, 4), (8, 4), (8, 16)), ((3, 3),))
command.LINK_SIZES, command.PASS_SIDES = Sizes((1024, 4096), (2048,)), Sizes((3, 5), (4,))
measure._SHORTEST_S, command.PASS_NUMEL = 0.0, 100
sys.exit(cli.main(["calibrate", "--out", sys.argv[1], "--engines", "gram", "--threads", "1"]))
"""


def launch(tmp_path, out):
    """The command on two processes as torchrun starts them on a machine each."""
    script = tmp_path / "calibrate.py"
    script.write_text(LAUNCHED)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "GROUP_RANK": str(rank)}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), str(out)],
                env={**os.environ, **meeting, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], told


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_under_torchrun_rank_0_writes_what_all_measured(tmp_path):
    out = tmp_path / "table.json"
    codes, told = launch(tmp_path, out)
    assert codes == [0, 0], told
    assert f"wrote {out}" in told[0][0]
    assert told[1][0] == ""
    table, notes = CostTable.load(out), json.loads(out.read_text())
    assert "2 ranks at the same time" in table.source
    assert notes["estimated"] == ["local"]
    own = [LinkTiming(**timing) for timing in notes["links"]]
    assert {timing.link for timing in own} == {"remote"}
    assert table.speeds.remote == fit_link([timing for timing in own if timing.size != 2048])
    assert set(notes["speed_errors"]) == {*(f"remote {name}" for name in COLLECTIVES), "blend", "copy", "apply"}
