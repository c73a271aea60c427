"""What an exchange costs: bytes that leave a rank, and memory for the while."""

import copy
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distmuon

SHAPES = [(64, 64)] * 8 + [(256, 64)] * 4 + [(64, 256)] * 4
NUMEL = sum(rows * cols for rows, cols in SHAPES)


@pytest.fixture(scope="module")
def pools():
    with Pool(2) as two, Pool(4) as four:
        yield {2: two, 4: four}


class Counted:
    """Bytes that this rank hands to collectives for others, by collective."""

    def __init__(self):
        self.bytes = {"all_to_all_single": 0, "all_gather": 0}
        self._all_to_all, self._all_gather = dist.all_to_all_single, distmuon.comm.exchange.all_gather

    def all_to_all_single(self, output, input, output_splits=None, input_splits=None, **keywords):
        if input_splits is not None:  # else it is the warm-up of the connections
            assert sum(input_splits) == input.numel()
            sent = input.numel() - input_splits[dist.get_rank()]
            self.bytes["all_to_all_single"] += sent * input.itemsize
        return self._all_to_all(output, input, output_splits, input_splits, **keywords)

    def all_gather(self, output, part, group):
        self.bytes["all_gather"] += part.nbytes * (dist.get_world_size() - 1)
        return self._all_gather(output, part, group)


def counted_step(optimizer):
    counted = Counted()
    with (
        mock.patch.object(dist, "all_to_all_single", counted.all_to_all_single),
        mock.patch("distmuon.comm.exchange.all_gather", counted.all_gather),
    ):
        optimizer.step()
    return counted.bytes


class Matrices(nn.Module):
    """Hidden matrices that are never multiplied."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in shapes)

    def forward(self, x):
        return x


def model_of(shapes):
    torch.manual_seed(0)
    return Matrices(shapes)


def sharded(layout):
    world = dist.get_world_size()
    model = model_of(SHAPES)
    if layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    else:
        fully_shard(model)
    return model


def bytes_of(layout, **keywords):
    if layout == "ddp":
        model = model_of(SHAPES)
        keywords["mesh"] = dist.group.WORLD
    else:
        model = sharded(layout)
    optimizer = distmuon.Muon(model, lr=0.02, **keywords)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return counted_step(optimizer)["all_to_all_single"]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 14, 64 << 20])
def test_fsdp2_sends_the_minimum(pools, world, bucket_bytes):
    sent = sum(pools[world].run(bytes_of_fsdp, bucket_bytes))
    # each element goes to its owner and comes back in bfloat16, unless it lives there
    assert sent == 2 * 2 * NUMEL * (world - 1) // world


def bytes_of_fsdp(bucket_bytes):
    return bytes_of("fsdp", bucket_bytes=bucket_bytes)


def bytes_of_fsdp_float32():
    return bytes_of("fsdp", ns_dtype=torch.float32)


def test_the_wire_has_the_dtype_that_newton_schulz_casts_to(pools):
    assert sum(pools[2].run(bytes_of_fsdp_float32)) == 2 * 4 * NUMEL // 2


def bytes_of_ddp():
    return bytes_of("ddp")


@pytest.mark.parametrize("world", [2, 4])
def test_replicated_parameters_send_updates_only(pools, world):
    assert sum(pools[world].run(bytes_of_ddp)) == 2 * NUMEL * (world - 1)


def bytes_of_hsdp(replicas):
    return bytes_of("hsdp", replicas=replicas)


def test_hsdp_gathers_inside_a_replica_and_hands_updates_to_all(pools):
    # up: half of each matrix lives at its owner; down: a half to one rank, both halves to the other replica
    assert sum(pools[4].run(bytes_of_hsdp, "share")) == 2 * (NUMEL // 2 + NUMEL // 2 + NUMEL)
    # every replica for itself
    assert sum(pools[4].run(bytes_of_hsdp, "repeat")) == 2 * 2 * (NUMEL // 2 + NUMEL // 2)


def experts_bytes():
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    experts = nn.Parameter(distribute_tensor(torch.randn(8, 16, 24), mesh, [Shard(0)]))
    optimizer = distmuon.Muon([("experts", experts)], lr=0.02)
    experts.grad = torch.ones_like(experts)
    optimizer.step()
    return counted_step(optimizer)


def test_whole_experts_stay_where_they_are(pools):
    for found in pools[4].run(experts_bytes):
        assert found == {"all_to_all_single": 0, "all_gather": 0}


def replicated_by(all_gather):
    """Updates after three steps, by an all-gather or an all-to-all, and what that sent."""
    with mock.patch("distmuon.courses.prefers_all_gather", lambda group, device: all_gather):
        model = model_of([*SHAPES, (5, 7), (3, 9)])
        optimizer = distmuon.Muon(model, lr=0.02, foreach=False, mesh=dist.group.WORLD, bucket_bytes=1 << 14)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            sent = counted_step(optimizer)
        stats = sum(part.pipeline.bytes_sent for part in optimizer._binding.parts)
        assert stats == sum(sent.values())
    return [param.detach() for param in model.parameters()], sent


@pytest.mark.parametrize("world", [2, 4])
def test_all_gather_and_all_to_all_bring_the_same(pools, world):
    one, other = pools[world].run(replicated_by, True), pools[world].run(replicated_by, False)
    for (gathered, sent), (exchanged, sent_too) in zip(one, other, strict=True):
        assert sent["all_gather"] > 0 == sent["all_to_all_single"]
        assert sent_too["all_to_all_single"] > 0 == sent_too["all_gather"]
        assert all(torch.equal(a, b) for a, b in zip(gathered, exchanged, strict=True))


def buffers():
    """Largest bytes of buffers at once, and what was foretold."""
    model = sharded("fsdp")
    optimizer = distmuon.Muon(model, lr=0.02, bucket_bytes=2 * 2 * 64 * 64)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    (part,) = optimizer._binding.parts
    plan, pool = part.pipeline.plan, part.pipeline.pool
    assert pool.lent == 0
    return pool.peak, part.pipeline.buffer_bytes(), len(plan.buckets)


@pytest.mark.parametrize("world", [2, 4])
def test_buffers_stay_within_what_the_report_says(pools, world):
    for peak, bound, buckets in pools[world].run(buffers):
        assert buckets >= 3
        assert peak <= bound


def statistics():
    model = sharded("fsdp")
    optimizer = distmuon.Muon(model, lr=0.02, step_stats=True)
    silent = distmuon.Muon(model, lr=0.02)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    silent.step()
    return optimizer.last_step_stats(), silent.last_step_stats()


def test_step_stats(pools):
    names = {"agree", "pack", "wire", "ns", "unpack", "apply", "wait", "adamw"}
    for stats, silent in pools[2].run(statistics):
        counted = {"optim/bytes_sent", "optim/buckets", "optim/imbalance"}
        assert stats.keys() == {f"optim/{name}_ms" for name in names} | counted
        assert stats["optim/ns_ms"] > 0
        assert stats["optim/bytes_sent"] == 2 * 2 * NUMEL // 2 // 2
        assert stats["optim/imbalance"] >= 1
        assert silent == {}


def statistics_of_steps():
    optimizer = distmuon.Muon(model_of(SHAPES), lr=0.02, mesh=dist.group.WORLD, step_stats=True)
    sent = []
    for _ in range(3):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        began = time.perf_counter()
        optimizer.step()
        elapsed = (time.perf_counter() - began) * 1e3
        stats = optimizer.last_step_stats()
        sent.append(stats["optim/bytes_sent"])
        assert sum(value for name, value in stats.items() if name.endswith("_ms")) <= elapsed
    return sent


def test_step_stats_are_of_one_step(pools):
    for sent in pools[2].run(statistics_of_steps):
        assert sent == [NUMEL] * 3


def a_group_on_some_ranks():
    """Experts of ranks 0 and 1 in a group that ranks 2 and 3 do not have."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "expert"))
    dense = nn.Parameter(distribute_tensor(torch.randn(8, 6), init_device_mesh("cpu", (4,)), [Shard(0)]))
    groups = [{"params": [("dense", dense)], "use_muon": True}]
    if dist.get_rank() < 2:
        expert = nn.Parameter(distribute_tensor(torch.randn(6, 6), mesh["expert"], [Shard(0)]))
        groups.append({"params": [("expert", expert)], "use_muon": True})
    optimizer = distmuon.Muon(groups, lr=0.02)
    before = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    for _ in range(2):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
    after = [param for group in optimizer.param_groups for param in group["params"]]
    return [not torch.equal(a.to_local(), b.to_local()) for a, b in zip(before, after, strict=True)]


def test_a_group_may_be_on_some_ranks_only(pools):
    assert pools[4].run(a_group_on_some_ranks) == [[True, True], [True, True], [True], [True]]


def copied():
    model = model_of([(6, 4), (4, 6), (6, 6)])
    optimizer = distmuon.Muon(model, lr=0.02, foreach=False, mesh=dist.group.WORLD)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for each, stepping in ((model, optimizer), (twin_model, twin)):
        for param in each.parameters():
            param.grad = torch.ones_like(param)
        stepping.step()
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters(), strict=True))
    return same, twin._binding.parts[0].pipeline.plan.ranks


def test_a_deep_copy_shares_the_work_too(pools):
    assert pools[2].run(copied) == [(True, (0, 1))] * 2


def in_foreach_kernels(layout):
    """The lists of tensors that an accelerator's kernels take, some empty, beside the loop of a CPU."""
    found = []
    for foreach in (True, False):
        with mock.patch.object(distmuon.pipeline.Pipeline, "_foreach", return_value=foreach):
            model = model_of([(8, 8), (6, 4), (4, 12)])
            if layout == "hsdp":
                fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
            elif layout == "fsdp":
                fully_shard(model)
            mesh = dist.group.WORLD if layout == "ddp" else None
            optimizer = distmuon.Muon(model, lr=0.02, mesh=mesh)
            for _ in range(2):
                for param in model.parameters():
                    param.grad = torch.ones_like(param)
                optimizer.step()
            full = [param.full_tensor() if layout != "ddp" else param for param in model.parameters()]
            found.append([param.detach() for param in full])
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp"])
def test_foreach_kernels_compute_the_same(pools, layout):
    assert all(pools[4].run(in_foreach_kernels, layout))


def buckets_of_groups():
    """A group a matrix, each with a rate of its own, and one group."""
    model = model_of([(16, 16)] * 6)
    params = list(model.named_parameters())
    apart = [
        {"params": [pair], "use_muon": True, "lr": 0.01 * (1 + i), "momentum": 0.9} for i, pair in enumerate(params)
    ]
    optimizer = distmuon.Muon(apart, foreach=False, mesh=dist.group.WORLD)
    twins = [nn.Parameter(param.detach().clone()) for _, param in params]
    alone = distmuon.Muon(
        [{"params": [twin], "use_muon": True, "lr": 0.01 * (1 + i), "momentum": 0.9} for i, twin in enumerate(twins)],
        foreach=False,
    )
    for _ in range(2):
        for (_, param), twin in zip(params, twins, strict=True):
            param.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
            twin.grad = param.grad.clone()
        optimizer.step()
        alone.step()
    same = all(torch.equal(param, twin) for (_, param), twin in zip(params, twins, strict=True))
    return same, len(optimizer._binding.parts[0].pipeline.plan.buckets)


def test_groups_share_buckets(pools):
    assert pools[2].run(buckets_of_groups) == [(True, 1)] * 2
