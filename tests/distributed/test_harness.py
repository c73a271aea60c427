"""The harness itself: order, failures, hangs, deaths, and nothing left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Pool, RankError, rank_errors, run_ranks


def sum_of_ranks(offset):
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total


def environment():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return [os.environ[name] for name in names], torch.get_num_threads(), os.getpid(), torch.rand(1).item()


def note_pids(folder):
    """Leaves this rank's pid and that of a child which would outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    path = folder / f"{dist.get_rank()}"
    path.with_suffix(".part").write_text(f"{os.getpid()} {child.pid}")
    path.with_suffix(".part").rename(path)


def fail_on_one(folder, failing):
    note_pids(folder)
    dist.barrier()
    if dist.get_rank() == failing:
        raise ValueError(f"rank {failing} is broken")
    wait_for_the_others()


def wait_for_the_others():
    dist.barrier()


def hang(folder):
    note_pids(folder)
    while True:
        time.sleep(0.01)


def die_on_one(dying):
    if dist.get_rank() == dying:
        os._exit(7)
    dist.barrier()


def die_and_leave_a_fork():
    dist.barrier()
    if dist.get_rank() == 0:
        if os.fork() == 0:
            time.sleep(600)
        os._exit(7)


def fail_everywhere():
    if dist.get_rank() == 1:
        os._exit(3)
    raise KeyError("two\nlines")


def fail_sometimes(failing):
    if dist.get_rank() == failing:
        raise ValueError("on purpose")


def no_pickle():
    return lambda: None


def running(pid):
    try:
        # A killed orphan stays a zombie where nobody reaps it, so a signal 0 would not tell
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def noted_pids(folder, world_size):
    return [int(pid) for rank in range(world_size) for pid in (folder / str(rank)).read_text().split()]


def assert_all_end(pids, seconds=20):
    assert running(os.getpid())
    deadline = time.monotonic() + seconds
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if running(pid)] == []


def test_results_come_in_rank_order():
    assert run_ranks(sum_of_ranks, 3, 10) == [(rank, torch.tensor(33.0)) for rank in range(3)]


def test_an_exception_names_its_rank_and_the_others_are_killed(tmp_path):
    with pytest.raises(RankError) as caught:
        run_ranks(fail_on_one, 2, tmp_path, 1)
    error = caught.value
    assert not error.timed_out
    assert error.errors == {1: "ValueError: rank 1 is broken"}
    assert list(error.tracebacks) == [1] and list(error.stacks) == [0]
    assert "in fail_on_one" in error.tracebacks[1] and "wait_for_the_others" in error.stacks[0]
    assert "rank 1 failed" in str(error) and "ValueError: rank 1 is broken" in str(error)
    assert_all_end(noted_pids(tmp_path, 2))


def test_a_hang_ends_with_the_stack_of_each_rank(tmp_path):
    with pytest.raises(RankError) as caught:
        run_ranks(hang, 2, tmp_path, timeout=3.0)
    error = caught.value
    assert error.timed_out and not error.tracebacks
    assert list(error.stacks) == [0, 1]
    assert all(
        "in hang" in stack and "harness.py" not in stack.replace("test_harness.py", "")
        for stack in error.stacks.values()
    )
    assert "rank 0 was still running" in str(error) and "rank 1 was still running" in str(error)
    assert_all_end(noted_pids(tmp_path, 2))


def test_a_pool_keeps_its_ranks_and_starts_new_ones_after_a_failure(tmp_path):
    with Pool(2) as pool:
        first, second = pool.run(environment), pool.run(environment)
        assert first == second
        assert [names for names, *_ in first] == [["0", "0", "2", "2", "127.0.0.1"], ["1", "1", "2", "2", "127.0.0.1"]]
        assert all(threads == 1 for _, threads, *_ in first)
        pids = [pid for _, _, pid, _ in first]
        with pytest.raises(RankError, match="ValueError: on purpose"):
            pool.run(fail_sometimes, 0)
        assert_all_end(pids)
        assert pool.run(sum_of_ranks, 0) == [(0, torch.tensor(1.0)), (1, torch.tensor(1.0))]
        third = pool.run(environment)
        pool.run(note_pids, tmp_path)
        assert {pid for _, _, pid, _ in third}.isdisjoint(pids)
    assert_all_end(noted_pids(tmp_path, 2))


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankError, match="exit code 7") as caught:
        run_ranks(die_on_one, 2, 1)
    assert caught.value.errors[1] == "exit code 7"
    # Gloo tells the other rank that the connection is gone
    assert "die_on_one" in (caught.value.tracebacks | caught.value.stacks)[0]


def test_a_rank_that_dies_is_reported_though_its_fork_holds_its_pipe():
    with pytest.raises(RankError) as caught:
        run_ranks(die_and_leave_a_fork, 2)
    assert caught.value.errors == {0: "exit code 7"} and not caught.value.stacks


def test_errors_of_every_rank():
    assert rank_errors(fail_everywhere, 2) == {0: "KeyError: 'two\\nlines'", 1: "exit code 3"}


def test_errors_of_every_rank_need_every_rank():
    with pytest.raises(AssertionError, match=r"must fail on every rank: returned \{1: None\}, failed \{0: 'ValueError"):
        rank_errors(fail_sometimes, 2, 0)


def test_a_result_that_cannot_be_pickled_is_an_error():
    errors = rank_errors(no_pickle, 1)
    assert "pickle" in errors[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_an_interrupted_test_run(tmp_path, number):
    # a job in the background of a shell ignores Ctrl-C, and its children inherit that
    script = (
        "import harness, pathlib, signal, sys, test_harness as t; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "harness.run_ranks(t.hang, 2, pathlib.Path(sys.argv[1]))"
    )
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here}
    runner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / str(rank)).exists() for rank in range(2)):
            assert time.monotonic() < deadline and runner.poll() is None
            time.sleep(0.05)
        runner.send_signal(number)
        runner.wait(20)
    finally:
        runner.kill()
    assert_all_end(noted_pids(tmp_path, 2))
