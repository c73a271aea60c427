"""A model trained by launch/torchrun_multi_node.sh on two hosts is the one that a process trains alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hosts_runs import EVERY, HSDP, STEPS, assert_same_run, flags_of, job, losses, steps, trained, weights
from launch_helpers import wait_for
from two_hosts import NotPermitted, TwoHosts

from distmuon.pretrain import load_config, train

pytestmark = pytest.mark.slow


def test_two_hosts_train_as_one_process(undisturbed: Path, tmp_path: Path) -> None:
    """Replicas on the hosts, shards in each, at 1 Gbit/s; only sums of float32 are in another order."""
    config, *settings = flags_of(tmp_path)[1:]
    alone = Path(train(load_config(config, *settings)).run_dir)
    one, two = losses(alone), losses(undisturbed)
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    for step in one:
        assert two[step][0] == pytest.approx(one[step][0], rel=2e-6), step
        assert two[step][1] == pytest.approx(one[step][1], rel=2e-5), step
    first, second, before = (
        weights(alone, tmp_path),
        weights(undisturbed, tmp_path),
        weights(alone, tmp_path, EVERY),
    )
    assert first.keys() == second.keys()
    # Newton-Schulz lifts the rounding of gradients along with their small singular values
    errors = {name: float((second[name] - end).norm() / (end - before[name]).norm()) for name, end in first.items()}
    assert max(errors.values()) < 2e-3, errors


def test_a_slow_cable_that_is_cut_for_five_seconds_changes_nothing(
    hosts: TwoHosts, undisturbed: Path, tmp_path: Path
) -> None:
    """TCP sends again what was lost, so that the run goes on where it was."""
    hosts.rate(200)
    assert not any(host.held_back() for host in hosts.hosts)
    folder = tmp_path / "runs" / "debug"
    with job(hosts, tmp_path, flags_of(tmp_path, *HSDP, "--parallel.timeout_seconds=60")) as running:
        wait_for(lambda: steps(folder) >= 2, running.logs[0])
        hosts.cut()
        sent = [host.sent() for host in hosts.hosts]
        time.sleep(5.0)
        assert [host.sent() for host in hosts.hosts] == sent
        reached = steps(folder)
        hosts.mend()
        assert reached < STEPS, "the run had ended before the cable was cut"
        running.end()
    assert all(host.held_back() for host in hosts.hosts)
    assert_same_run(folder, undisturbed, tmp_path)


def test_delay_and_loss_change_nothing(hosts: TwoHosts, undisturbed: Path, tmp_path: Path) -> None:
    try:
        hosts.bad_cable("5ms", "0.5%")
    except NotPermitted as reason:
        pytest.skip(f"no netem in this kernel: {reason}")
    assert_same_run(trained(hosts, tmp_path), undisturbed, tmp_path)
