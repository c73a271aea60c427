"""Clipping over ranks is torch's clipping of the whole gradients on one process, whatever the layout.

Every rank makes the whole gradients from a seed, keeps what its layout gives it, clips, and compares its part with the
whole gradients clipped by torch. Tolerances are float32 rounding: sums are taken in another order.
"""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from clip_layouts import LAYOUTS, crossing_meshes, fsdp2, give_gradients, mesh_of, pair_mesh, part_of
from harness import Pool
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

from distmuon import clip_grad_norm_
from distmuon.comm.norms import plan_reduction

RTOL = 1e-6
NORM_TYPES = (2.0, 1.0, 3.0, math.inf)
# Of these torch clips DTensors of one mesh only, and not beside plain tensors
TORCH_CLIPS = ("fsdp2 even", "fsdp2 uneven", "fsdp2 rows<ranks", "fsdp2 columns", "hsdp")
# Nor the largest value where a shard is empty
TORCH_NORMS = (2.0, 1.0, 3.0)


@pytest.fixture(scope="module")
def pools():
    made = {}
    yield lambda world_size: made.setdefault(world_size, Pool(world_size))
    for pool in made.values():
        pool.close()


def compare(params, references, rtol=RTOL):
    for param, reference in zip(params, references, strict=True):
        local = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
        expected = part_of(reference.grad, param)
        torch.testing.assert_close(local, expected, rtol=rtol, atol=0.0, equal_nan=True)


def plain(total):
    assert type(total) is torch.Tensor and total.ndim == 0 and not total.requires_grad
    return total


def equal(totals):
    """The norm that all ranks agree on, to the bit."""
    first = totals[0]
    assert all(t.dtype == first.dtype and torch.equal(t.nan_to_num(7.0), first.nan_to_num(7.0)) for t in totals)
    return first


# --- what ranks run


def clip_layout(name, norm_type):
    params = LAYOUTS[name]()
    references = give_gradients(params)
    reference_norm = nn.utils.get_total_norm([r.grad.double() for r in references], norm_type)
    grads = [p.grad for p in params]
    expected = nn.utils.clip_grad_norm_(references, 0.25, norm_type)
    with CommDebugMode() as collectives:
        total = plain(clip_grad_norm_(params, 0.25, norm_type))
    assert collectives.get_total_counts() == 1, collectives.get_comm_counts()
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    if name == "bfloat16":
        # torch rounds each norm to bfloat16, we sum in float32; a gradient has 8 bits, its factor may differ in the 8th
        torch.testing.assert_close(total, reference_norm.float(), rtol=RTOL, atol=0.0)
        compare(params, references, rtol=2**-6)
    else:
        torch.testing.assert_close(total, expected, rtol=RTOL, atol=0.0)
        compare(params, references)
    if name in TORCH_CLIPS and norm_type in TORCH_NORMS:
        give_gradients(params)
        torchs = nn.utils.clip_grad_norm_(params, 0.25, norm_type).full_tensor()
        torch.testing.assert_close(total, torchs, rtol=RTOL, atol=0.0)
        compare(params, references)
    return total


def clip_too_small():
    params = LAYOUTS["plain beside"]()
    references = give_gradients(params, scale=1e-3)
    total = clip_grad_norm_(params, 1.0)
    # The same bits: a factor of 1
    compare(params, references, rtol=0.0)
    return total


def clip_experts(norm_type):
    """Experts of this pair of ranks, beside a dense parameter on a mesh of all ranks or not."""
    pair = dist.get_rank() // 2
    wholes = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    dense_whole = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))

    def expert():
        made = nn.Parameter(distribute_tensor(torch.zeros(4, 3), pair_mesh(), [Shard(0)]))
        made.grad = distribute_tensor(wholes[pair], pair_mesh(), [Shard(0)])
        return made

    alone = clip_grad_norm_([expert()], 0.1, norm_type)
    torch.testing.assert_close(alone, torch.linalg.vector_norm(wholes[pair], norm_type), rtol=RTOL, atol=0.0)

    joined = expert()
    dense = nn.Parameter(distribute_tensor(torch.zeros(7, 3), mesh_of(4), [Shard(0)]))
    dense.grad = distribute_tensor(dense_whole, mesh_of(4), [Shard(0)])
    total = plain(clip_grad_norm_([joined, dense], 0.1, norm_type))
    everything = torch.cat([w.flatten() for w in (*wholes, dense_whole)])
    torch.testing.assert_close(total, torch.linalg.vector_norm(everything, norm_type), rtol=RTOL, atol=0.0)
    factor = 0.1 / (total + 1e-6)
    torch.testing.assert_close(joined.grad.full_tensor(), wholes[pair] * factor, rtol=RTOL, atol=0.0)
    torch.testing.assert_close(dense.grad.full_tensor(), dense_whole * factor, rtol=RTOL, atol=0.0)
    return total


def clip_crossing():
    params = crossing_meshes()
    references = give_gradients(params)
    total = plain(clip_grad_norm_(params, 0.25))
    expected = nn.utils.clip_grad_norm_(references, 0.25)
    torch.testing.assert_close(total, expected, rtol=RTOL, atol=0.0)
    compare(params, references)
    return total


def clip_without_gradients(where, norm_type):
    """``where``: the ranks that have no gradient at all."""
    params = LAYOUTS["plain beside"]()

    def drop_rows(index, whole):
        if not isinstance(params[index], DTensor):
            return
        for rank in where:
            size, offset = Shard.local_shard_size_and_offset(whole.shape[0], dist.get_world_size(), rank)
            whole[offset : offset + size] = 0.0

    references = give_gradients(params, edit=drop_rows)
    if len(where) == dist.get_world_size():
        for reference in references:
            reference.grad = None
    expected = nn.utils.clip_grad_norm_(references, 0.25, norm_type)
    if dist.get_rank() in where:
        for param in params:
            param.grad = None
    total = plain(clip_grad_norm_(params, 0.25, norm_type))
    torch.testing.assert_close(total, expected, rtol=RTOL, atol=0.0)
    if dist.get_rank() not in where:
        compare(params, references)
    assert (params[0].grad is None) == (dist.get_rank() in where)
    return total


def put(value):
    def edit(index, whole):
        if index == 0:
            whole[-1, 0] = value

    return edit


def clip_nonfinite(value, norm_type):
    params = LAYOUTS["fsdp2 uneven"]()
    references = give_gradients(params, edit=put(value))
    expected = nn.utils.clip_grad_norm_(references, 0.25, norm_type)
    total = plain(clip_grad_norm_(params, 0.25, norm_type))
    torch.testing.assert_close(total, expected, equal_nan=True)
    compare(params, references)
    return total


def refuse_nonfinite(value, norm_type):
    params = LAYOUTS["fsdp2 uneven"]()
    references = give_gradients(params, edit=put(value))
    with pytest.raises(RuntimeError, match=f"norm of order {norm_type} of all gradients is {value}"):
        clip_grad_norm_(params, 0.25, norm_type, error_if_nonfinite=True)
    compare(params, references, rtol=0.0)


def clip_owned(beside_dtensor, norm_type):
    """Only the owner's gradient of the owned parameter is valid; elsewhere it is NaN."""
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(3))]
    if beside_dtensor:
        params += fsdp2(5)
    references = give_gradients(params)
    owners = {params[0]: 1, params[1]: 0}
    for param, owner in owners.items():
        if owner != dist.get_rank():
            param.grad.fill_(math.nan)
            param.grad[0, 0] = 8.0
    expected = nn.utils.clip_grad_norm_(references, 0.25, norm_type)
    with CommDebugMode() as collectives:
        total = plain(clip_grad_norm_(params, 0.25, norm_type, owners=owners))
    assert collectives.get_total_counts() == 1
    torch.testing.assert_close(total, expected, rtol=RTOL, atol=0.0)
    for index, param in enumerate(params):
        if owners.get(param, dist.get_rank()) == dist.get_rank():
            compare([param], [references[index]])
        else:
            torch.testing.assert_close(param.grad[0, 0], 8.0 * 0.25 / (expected + 1e-6), rtol=RTOL, atol=0.0)
    return total


def clip_replicas():
    """Plain parameters alone, as under DDP: torch's bits, without a collective."""
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))]
    references = give_gradients(params)
    expected = nn.utils.clip_grad_norm_(references, 0.25)
    with CommDebugMode() as collectives:
        total = clip_grad_norm_(params, 0.25, owners={})
    assert collectives.get_total_counts() == 0
    assert torch.equal(total, expected)
    compare(params, references, rtol=0.0)
    return total


def clip_sequence_parallel(norm_type):
    def model():
        torch.manual_seed(4)
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6))

    batch = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(6))
    reference = model()
    reference(batch).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.25, norm_type)
    plan = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1))}
    ours = parallelize_module(model(), mesh_of(dist.get_world_size()), plan)
    # What a rank passes is its part of the sequence
    ours(batch.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]).square().sum().backward()
    assert ours[0].weight.grad.placements == (Partial("sum"),)
    total = plain(clip_grad_norm_(ours, 0.25, norm_type))
    # The gradients themselves differ by rounding: matrix products of other shapes
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0.0)
    assert ours[0].weight.grad.placements == (Partial("sum"),)
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-5, atol=1e-6)
    return total


def clip_in_part_of_the_world():
    """A mesh of two axes, in a world that seems to have a fifth rank: no group of the mesh has all its ranks."""
    mesh, placements = mesh_of(2, 2), [Replicate(), Shard(0)]
    whole = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    param = distribute_tensor(torch.zeros(5, 4), mesh, placements)
    groups, totals = [], []
    for _ in range(2):
        param.grad = distribute_tensor(whole, mesh, placements)
        with mock.patch.object(dist, "get_world_size", lambda: 5), CommDebugMode() as collectives:
            groups.append(plan_reduction([param]).group)
            totals.append(plain(clip_grad_norm_(param, 0.25)))
        assert collectives.get_total_counts() == 1
    # Made once
    assert groups[0] is groups[1] is not dist.group.WORLD
    assert dist.get_process_group_ranks(groups[0]) == [0, 1, 2, 3]
    torch.testing.assert_close(equal(totals), torch.linalg.vector_norm(whole), rtol=RTOL, atol=0.0)
    return totals[0]


def clip_on_some_ranks():
    """DTensors on the ranks 0 and 1, which the others know of."""
    mesh = DeviceMesh("cpu", [0, 1])
    whole = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    param = distribute_tensor(torch.zeros(5, 4), mesh, [Shard(0)])
    param.grad = distribute_tensor(whole, mesh, [Shard(0)])
    if dist.get_rank() > 1:
        with pytest.raises(RuntimeError, match=r"clips DTensors of the ranks \[0, 1\] only"):
            clip_grad_norm_(param, 0.25)
        return
    total = plain(clip_grad_norm_(param, 0.25))
    torch.testing.assert_close(total, torch.linalg.vector_norm(whole), rtol=RTOL, atol=0.0)


def refuse_settings():
    params = LAYOUTS["plain beside"]()
    give_gradients(params)
    with pytest.raises(ValueError, match="norm_type=0"):
        clip_grad_norm_(params, 1.0, 0)
    with pytest.raises(ValueError, match="to rank 2, but the default group has 2 ranks"):
        clip_grad_norm_(params, 1.0, owners={params[-1]: 2})


# --- tests

WORLDS = [
    *((2, name) for name in LAYOUTS if name not in ("hsdp", "tp x fsdp2", "nested meshes")),
    *((4, name) for name in LAYOUTS if name != "tp"),
]


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize(("world_size", "name"), WORLDS)
def test_layout(pools, world_size, name, norm_type):
    equal(pools(world_size).run(clip_layout, name, norm_type))


def test_small_norm_leaves_gradients(pools):
    equal(pools(2).run(clip_too_small))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_experts_on_meshes_that_differ(pools, norm_type):
    equal(pools(4).run(clip_experts, norm_type))


def test_meshes_that_cross(pools):
    equal(pools(4).run(clip_crossing))


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("where", [(0,), (1,), (0, 1)])
def test_ranks_without_gradients(pools, where, norm_type):
    equal(pools(2).run(clip_without_gradients, where, norm_type))


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_nonfinite(pools, value, norm_type):
    equal(pools(2).run(clip_nonfinite, value, norm_type))


def test_nonfinite_raises_on_all_ranks(pools):
    pools(2).run(refuse_nonfinite, math.inf, 2.0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("beside_dtensor", [False, True])
def test_owned_gradients(pools, beside_dtensor, norm_type):
    equal(pools(2).run(clip_owned, beside_dtensor, norm_type))


def test_replicas_need_no_collective(pools):
    equal(pools(2).run(clip_replicas))


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_partial_gradients(pools, norm_type):
    equal(pools(2).run(clip_sequence_parallel, norm_type))


def test_refused_settings(pools):
    pools(2).run(refuse_settings)


def test_mesh_in_part_of_the_world(pools):
    equal(pools(4).run(clip_in_part_of_the_world))


def test_ranks_outside_the_mesh(pools):
    pools(4).run(clip_on_some_ranks)
