"""Ranks that end, stall or receive what was not sent: what each of the others says."""

import contextlib
import gc
import itertools
import logging
import os
import threading
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Pool, rank_errors
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import distmuon
from distmuon.comm.board import Board
from distmuon.comm.exchange import Transfer
from distmuon.comm.verify import checksums
from distmuon.comm.waiting import Wait, forget, remember, tell, waiting
from distmuon.comm.watch import Watch
from distmuon.numerics.costs import CostTable, Rates
from distmuon.speeds import Link, Speeds

SETTINGS = {"lr": 0.02, "adamw_lr": 1e-3}
TIMEOUT = 1.5


@pytest.fixture(scope="module")
def three():
    with Pool(3) as pool:
        yield pool


NUMBERS = itertools.count()


def mesh_with_timeout():
    """A mesh of its own, whose collectives give up soon; torch takes meshes of one name for one."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"shard{next(NUMBERS)}",))


def sharded(**keywords):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(24, 24, bias=False) for _ in range(3)])
    fully_shard(model, mesh=mesh_with_timeout())
    optimizer = distmuon.Muon(model, bucket_bytes=24 * 24 * 2, **{**SETTINGS, **keywords})
    with_gradients(model)
    optimizer.step()
    return model, optimizer


def with_gradients(model):
    for param in model.parameters():
        param.grad = torch.ones_like(param)


def in_newton_schulz(act):
    """Rank 1 does something between the gather and the update of its first matrix."""
    from distmuon.numerics.orthogonalize import orthogonalize_

    def instead(*args, **keywords):
        act()
        return orthogonalize_(*args, **keywords)

    return mock.patch("distmuon.orthogonalizing.orthogonalize_", instead)


def stalls_in_newton_schulz():
    _, optimizer = sharded()
    if dist.get_rank() == 1:
        with in_newton_schulz(lambda: time.sleep(3 * TIMEOUT)):
            optimizer.step()
    optimizer.step()


def stalls_before_the_step():
    _, optimizer = sharded()
    if dist.get_rank() == 1:
        time.sleep(3 * TIMEOUT)
    optimizer.step()


def ends_in_newton_schulz():
    _, optimizer = sharded()
    if dist.get_rank() == 1:
        with in_newton_schulz(lambda: os._exit(7)):
            optimizer.step()
    optimizer.step()


def stalls_in_clipping():
    model, _ = sharded()
    if dist.get_rank() == 1:
        time.sleep(3 * TIMEOUT)
    distmuon.clip_grad_norm_(model, 1.0)


EXCHANGE = "the exchange of the bucket of '"
AGREEMENT = "the agreement on the gradients of step 2"


def told(function):
    """The error of a function whose group alone is lost, so that the pool goes on."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (stalls_in_newton_schulz, EXCHANGE),
        (stalls_before_the_step, AGREEMENT),
        (stalls_in_clipping, "the norm of all gradients"),
    ],
)
def test_a_rank_that_stalls_is_named_by_all(three, function, what):
    found = three.run(told, function)
    for rank in (0, 2):
        assert found[rank].startswith(f"rank {rank} waited ")
        assert what in found[rank]
        assert f"there wait rank {2 - rank} for the same; rank 1 came only after that: stalled" in found[rank]
    assert found[1].startswith("rank 1 waited ")
    assert what in found[1]
    assert "this rank came only when the others had given up: it stalled, so look here first" in found[1]


def test_a_rank_that_ends_is_named_by_the_others():
    found = rank_errors(ends_in_newton_schulz, 3, timeout=60)
    assert found[1] == "exit code 7"
    for rank in (0, 2):
        assert found[rank].startswith(f"RuntimeError: rank {rank} waited ")
        assert EXCHANGE in found[rank]
        assert f"there wait rank {2 - rank} for the same; nothing is heard of rank 1: ended, stalled" in found[rank]
    assert ".weight' (24, 24)" in found[0]
    assert "in step 2)" in found[0]
    assert " bytes, wave 1 of " in found[0]


def asked_from_another_thread():
    _, optimizer = sharded()
    reports = []
    if dist.get_rank() == 1:
        time.sleep(0.7 * TIMEOUT)
        reports.append(distmuon.hang_report(patience=0.1))
    else:
        timer = threading.Timer(0.2 * TIMEOUT, lambda: reports.append(distmuon.hang_report(patience=0.3 * TIMEOUT)))
        timer.start()
    optimizer.step()
    return reports[0]


def test_a_report_can_be_asked_for_and_disturbs_nobody(three):
    found = three.run(asked_from_another_thread)
    assert found[1] == "rank 1 waits for no exchange of distmuon"
    for rank in (0, 2):
        assert f"rank {rank} waited " in found[rank]
        assert f"rank {2 - rank} for the same; nothing is heard of rank 1" in found[rank]


def watched():
    """Ranks 0 and 2 start an exchange that the host does not wait for, which rank 1 joins late."""
    if dist.get_rank() == 1:
        time.sleep(4.0)
    ones, received = torch.ones(3), torch.empty(3)
    work = dist.all_to_all_single(received, ones, async_op=True)
    watch, lines = Watch(seconds=0.5), []
    with mock.patch.object(logging.getLogger("distmuon"), "error", lambda text, line: lines.append(text % line)):
        watch.add(Wait(dist.group.WORLD, "the exchange of something", work))
        report = distmuon.hang_report(patience=0.0) if dist.get_rank() != 1 else ""
        work.wait()
        time.sleep(0.2)
    watch.look()
    told = says(dist.group.WORLD)
    return lines, report, distmuon.hang_report(), received.tolist(), told


def says(group):
    """Whether this rank tells the others of a group that it waits."""
    return dist.get_rank() in Board(group.get_group_store(), group.size()).read()


def test_a_watch_tells_of_what_the_host_does_not_wait_for(three):
    found = three.run(watched)
    assert found[1][0] == []
    for rank, (lines, report, after, received, told) in enumerate(found):
        assert not told, "what was told of an exchange that came is taken back"
        assert after == f"rank {rank} waits for no exchange of distmuon"
        assert received == [1.0] * 3
        if rank != 1:
            assert f"rank {rank} waited " in report
            assert len(lines) == 1
            assert "in vain for the exchange of something" in lines[0]
            assert "nothing is heard of rank 1" in lines[0]


def watched_optimizer():
    """What is told of exchanges under way after two steps, and once the optimizer is gone."""
    with (
        mock.patch("distmuon.comm.exchange.watch_of", lambda *_: Watch(seconds=60.0)),
        mock.patch.object(Wait, "came", False),
    ):
        _, optimizer = sharded()
        optimizer.step()
        under_way = distmuon.hang_report(patience=0.0)
        del optimizer
        gc.collect()
        return under_way, distmuon.hang_report(patience=0.0)


def test_what_is_watched_says_its_own_step_and_goes_with_the_optimizer(three):
    for rank, (under_way, after) in enumerate(three.run(watched_optimizer)):
        first, second = under_way.splitlines()[:2], under_way.splitlines()[2:]
        assert len(second) == 2
        assert all(" of 1 in step 1); " in line for line in first)
        assert all(" of 1 in step 2); " in line for line in second)
        assert after == f"rank {rank} waits for no exchange of distmuon"


def watched_and_ended():
    with mock.patch("distmuon.comm.exchange.watch_of", lambda *_: Watch(seconds=60.0)):
        _, _optimizer = sharded()
        return distmuon.hang_report(patience=0.0)


def test_what_has_come_is_not_reported_though_nobody_looked(three):
    assert three.run(watched_and_ended) == [f"rank {rank} waits for no exchange of distmuon" for rank in range(3)]


def after_the_group():
    group = dist.new_group()
    wait = Wait(group, "something")
    remember(wait)
    try:
        dist.destroy_process_group(group)
        return distmuon.hang_report()
    finally:
        forget(wait)


def test_groups_that_were_destroyed_are_not_asked(three):
    assert three.run(after_the_group) == [f"rank {rank} waits for no exchange of distmuon" for rank in range(3)]


def in_two_groups():
    """Rank 0 waits in a group that rank 2 is not in, rank 1 in that of all, and rank 2 nowhere."""
    pair = dist.new_group([0, 1])
    report = ""
    if dist.get_rank() != 2:
        wait = Wait(pair, "the sums") if dist.get_rank() == 0 else Wait(dist.group.WORLD, "the exchange")
        report = tell(wait, patience=1.0)
    dist.barrier()
    if dist.get_rank() != 2:
        remember(wait)
        forget(wait)
    dist.barrier()
    return report


def test_a_rank_that_waits_in_another_group_is_not_missing(three):
    first, second, _ = three.run(in_two_groups)
    assert "for the sums; there wait rank 1 for the exchange (in another group); all ranks wait, for different" in first
    assert "for the exchange; there wait rank 0 for the sums (in another group); nothing is heard of rank 2:" in second


def complains_and_goes_on():
    mesh, group = mesh_with_timeout(), dist.group.WORLD
    with contextlib.suppress(RuntimeError), waiting(mesh.get_group(), "what never comes"):
        raise RuntimeError("lost")
    said = says(mesh.get_group()), says(group)
    with waiting(group, "what comes"):
        dist.barrier()
    return said, (says(mesh.get_group()), says(group))


def test_a_complaint_holds_until_something_comes(three):
    assert three.run(complains_and_goes_on) == [((True, True), (False, False))] * 3


def loses_the_host_of_the_store():
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=20))
    _, optimizer = sharded()
    if dist.get_rank() == 0:
        os._exit(7)
    optimizer.step()


def test_a_store_that_went_with_its_rank_is_told():
    found = rank_errors(loses_the_host_of_the_store, 3, timeout=60)
    for rank in (1, 2):
        assert AGREEMENT in found[rank]
        assert f"nothing is heard of ranks 0, {3 - rank}, as the store of the process group does not " in found[rank]


def test_a_report_without_ranks():
    assert distmuon.hang_report() == "rank 0 waits for no exchange of distmuon"


def flips_a_bit(layout, direction, verify):
    """Rank 1 receives one wrong bit in the second step."""
    if layout == "fsdp":
        _, optimizer = sharded(verify_exchange=verify)
    else:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(24, 24, bias=False) for _ in range(3)])
        optimizer = distmuon.Muon(model, mesh=dist.group.WORLD, verify_exchange=verify, **SETTINGS)
        with_gradients(model)
        optimizer.step()
    original = Transfer.wait
    done = []

    def wait(self, what):
        moving = self.work is not None
        original(self, what)
        wanted = dist.get_rank() == 1 and direction in (what if isinstance(what, str) else what())
        if moving and wanted and not done and self.receive.numel():
            self.receive.view(torch.int16)[-1] ^= 4
            done.append(True)

    with mock.patch.object(Transfer, "wait", wait):
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("layout", "direction"), [("fsdp", "(gather of"), ("fsdp", "(update of"), ("replicated", "(update of")]
)
def test_a_flipped_bit_on_the_wire_is_told_on_all_ranks(three, layout, direction):
    found = three.run(flips_a_bit, layout, direction, True)
    assert len(set(found)) == 1
    assert found[0].startswith("the exchange of the bucket of '")
    assert direction in found[0]
    assert " to rank 1 arrived changed, by the checksums of verify_exchange" in found[0]
    assert three.run(flips_a_bit, layout, direction, False) == ["nothing was raised"] * 3


def slow_products():
    """Costs by which every matrix that can have a team gets one."""
    engines = tuple((name, Rates(1e-9, 1.0, 1.0)) for name in ("rational", "composed", "gram"))
    free = Link(0.0, 0.0, 0.0, 0.0)
    return CostTable("cpu-float32", "made up", engines, Speeds(free, free))


def verified_steps(all_gather, teams, bad, keywords):
    results = []
    if teams:
        keywords = {**keywords, "cost_table": slow_products()}
    with mock.patch("distmuon.courses.prefers_all_gather", lambda *_: all_gather):
        for verify in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(*[nn.Linear(24, 20, bias=False), nn.Linear(20, 24)])
            optimizer = distmuon.Muon(model, mesh=dist.group.WORLD, verify_exchange=verify, **SETTINGS, **keywords)
            for _ in range(2):
                with_gradients(model)
                model[0].weight.grad[0, 0] = bad
                optimizer.step()
            results.append([param.detach().view(torch.int32) for param in model.parameters()])
    formed = any(bucket.parts > 1 for part in optimizer._binding.parts for bucket in part.pipeline.plan.buckets)
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True)), formed


@pytest.mark.parametrize("all_gather", [False, True])
@pytest.mark.parametrize("teams", [False, True])
@pytest.mark.parametrize("bad", [1.0, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_verifying_changes_no_bit(three, all_gather, teams, bad, dtype):
    keywords = {"wire_dtype": dtype, "ns_dtype": torch.float32}
    assert three.run(verified_steps, all_gather, teams, bad, keywords) == [(True, teams)] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_counts_each_word_at_its_place_in_its_piece(dtype):
    buffer, splits = torch.randn(10, dtype=torch.float64).to(dtype), [3, 0, 7]
    words = buffer.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).tolist()
    pieces = [words[:3], [], words[3:]]
    sums = [sum((2 * place + 1) * word for place, word in enumerate(piece)) % 2**64 for piece in pieces]
    with mock.patch("distmuon.comm.verify._BLOCK", 2):
        assert [found % 2**64 for found in checksums(buffer, splits).tolist()] == sums
    assert [found % 2**64 for found in checksums(buffer, splits).tolist()] == sums


def another_version():
    version = "9.9" if dist.get_rank() == 1 else "1.0"
    with mock.patch("distmuon.binding.code_version", lambda: version):
        model = fully_shard(nn.Linear(6, 6, bias=False))
        optimizer = distmuon.Muon(model, **SETTINGS)
        with_gradients(model)
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
    return "nothing was raised"


def test_ranks_of_other_versions_are_told(three):
    found = three.run(another_version)
    assert len(set(found)) == 1
    assert found[0].startswith("rank 0 runs 1.0 and rank 1 runs 9.9")


def timeouts_of_new_groups():
    from distmuon.comm.group import team_group, timeout_of

    job, short = dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=7))
    # torch names a group by its ranks and how many groups each of them has: these two have had the same
    team = team_group([(0, 1)], short)
    return [None if group is None else timeout_of(group) for group in (job, short, team)]


def test_teams_give_up_when_their_group_does(three):
    for rank, (job, short, team) in enumerate(three.run(timeouts_of_new_groups)):
        assert job == timedelta(minutes=10)
        assert short == timedelta(seconds=7)
        assert team == (None if rank == 2 else timedelta(seconds=7))
