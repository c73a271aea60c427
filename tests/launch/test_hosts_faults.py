"""Two hosts that lose each other: every rank says so and ends, and the same command goes on once they are back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hosts_runs import EVERY, HSDP, STEPS, assert_same_run, flags_of, job, losses, steps
from launch_helpers import finish, read, wait_for
from two_hosts import TwoHosts

from distmuon.pretrain.requeue import LOST

TIMEOUT = 6
# until ranks have ended: the others get ten seconds to say where they are, and the machine may be busy
PATIENCE = TIMEOUT + 40

pytestmark = pytest.mark.slow


def test_a_cable_that_is_cut_for_good_ends_all_ranks_and_a_restart_goes_on(
    hosts: TwoHosts, undisturbed: Path, tmp_path: Path
) -> None:
    flags = flags_of(tmp_path, *HSDP, f"--parallel.timeout_seconds={TIMEOUT}")
    folder = tmp_path / "runs" / "debug"
    # slow, so that it is in the middle of a step
    hosts.rate(50)
    with job(hosts, tmp_path, flags, number=0) as first:
        wait_for(lambda: steps(folder) > EVERY, first.logs[0])
        hosts.cut()
        reached = steps(folder)
        wait_for(lambda: all([first.all_ended(0), first.all_ended(1)]), first.logs[1], PATIENCE)
        assert finish(first.agents[0], first.logs[0]) == 1
        assert exit_codes(read(first.logs[0])) == [LOST, LOST]
        # its torchrun knows nothing of it: it waits for the store on host 0 until TCP gives up, and is killed here
        assert list(first.codes[1].values()) == [LOST, LOST], first.told()
        said = first.said(0)
    assert EVERY < reached < STEPS
    assert list(losses(folder)) == list(range(1, steps(folder) + 1))
    assert list(said) == [0, 1, 2, 3]
    for rank, sentence in said.items():
        assert len(sentence.splitlines()) == 1, sentence
        assert re.search(rf"^error: rank {rank}: in the .* of step \d another rank has probably ended", sentence)
        assert re.search(rf"rank {rank} waited [\d.]+ s in vain for ", sentence), sentence
        assert re.search(r" step \d", sentence.partition("in vain for")[2]), sentence
        assert sentence.endswith("go on from the last checkpoint with --resume auto.")
    for rank in (0, 1):
        assert "nothing is heard of ranks 2, 3: ended, stalled or far behind, so look there first" in said[rank]
    for rank in (2, 3):
        assert "the store of the process group does not answer: it lives on rank 0, or with" in said[rank]

    hosts.mend()
    hosts.rate(1000)
    with job(hosts, tmp_path, flags, number=1) as second:
        second.end()
        assert f"after step {EVERY}\n" in read(second.logs[0])
    assert_same_run(folder, undisturbed, tmp_path)


def exit_codes(text: str) -> list[int]:
    """Of the ranks in torchrun's report."""
    return [int(code) for code in re.findall(r"^ *exitcode *: (\S+) ", text, re.MULTILINE)]
