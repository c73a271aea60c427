"""Blocks of parameters on several ranks: the update of the same blocks kept as parameters of their own.

The reference is torch.optim.Muon on one process over the blocks as separate contiguous parameters, to the bit; where
weights are stored transposed, this package in float64, as products that sum in another order round otherwise.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from layouts import Twins, distribute, full, give_gradients, matrices_of, mesh_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import distmuon
from distmuon.plan.reading import Reading

# By name: shape and reading. Heads of 3 and blocks of 6, 3 and 3 rows: halves and quarters cut some and spare others
PARAMETERS = {
    "qkv": ((24, 8), Reading(split_sizes=(12, 6, 6))),
    "qkv_uneven": ((11, 8), Reading(split_sizes=(6, 3, 2))),
    "heads": ((24, 8), Reading(num_heads=8)),
    "heads_cut": ((24, 8), Reading(split_sizes=(12, 6, 6), num_heads=(4, 2, None))),
    "o": ((8, 24), Reading(num_heads=8, split_axis="cols")),
    "experts": ((5, 12, 8), Reading(split_sizes=(6, 6))),
    "turns": ((5, 8, 12), Reading(split_sizes=(6, 6), split_axis="cols", interleaved=True)),
    "kernel": ((12, 4, 3), Reading(flatten=True, split_sizes=(8, 4))),
    "plain": ((8, 8), Reading()),
}
TRANSPOSED = {
    "c_attn": ((8, 24), Reading(split_sizes=(12, 6, 6), transposed=True)),
    "c_heads": ((8, 24), Reading(num_heads=8, transposed=True)),
    "c_fc": ((8, 24), Reading(transposed=True)),
    "turns": ((5, 8, 12), Reading(split_sizes=(6, 6), transposed=True, interleaved=True)),
}


def split(tensor, reading):
    """The matrices of a whole parameter, output x input features."""
    found = matrices_of(tensor, reading)
    return [(matrix.mT if reading.transposed else matrix).contiguous() for matrix in found]


# --- layouts


def placed(dim_of_axes, mesh_shape, parameters):
    """Each parameter sharded along a dimension on each axis of a mesh; None: replicated."""
    twins = Twins({}, {})
    for name, (shape, _) in parameters.items():
        placements = [Replicate() if dim is None else Shard(dim % len(shape)) for dim in dim_of_axes]
        distribute(twins, name, shape, mesh_of(*mesh_shape), placements, torch.float32)
    return twins


def held(parameters):
    module = nn.Module()
    torch.manual_seed(1)
    for name, (shape, _) in parameters.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return module


def fsdp(mesh_shape, parameters, **options):
    module = held(parameters)
    whole = {name: nn.Parameter(param.detach().clone()) for name, param in module.named_parameters()}
    fully_shard(module, mesh=mesh_of(*mesh_shape))
    return Twins(dict(module.named_parameters()), whole, options=options, model=module)


def alone(parameters):
    module, whole = held(parameters), held(parameters)
    return Twins(dict(module.named_parameters()), dict(whole.named_parameters()), model=module)


def replicated(parameters, **options):
    twins = alone(parameters)
    twins.options = {"mesh": mesh_of(dist.get_world_size()), **options}
    return twins


LAYOUTS = {
    "one": alone,
    "fsdp 2": functools.partial(fsdp, (2,)),
    "fsdp 4": functools.partial(fsdp, (4,)),
    "hsdp": functools.partial(fsdp, (2, 2)),
    "hsdp, repeat": functools.partial(fsdp, (2, 2), replicas="repeat"),
    "ddp": replicated,
    "ddp, repeat": functools.partial(replicated, replicas="repeat"),
    "rows x columns": functools.partial(placed, (0, -1), (2, 2)),
    "columns": functools.partial(placed, (-1,), (4,)),
    "tensor parallel": functools.partial(placed, (None, -1), (2, 2)),
}
WHERE = [(1, "one"), (2, "fsdp 2"), (2, "ddp")]
WHERE += [(4, name) for name in LAYOUTS if name not in ("one", "fsdp 2")]


# --- steps on ranks


def optimizer_of(twins, parameters, **settings):
    groups = [
        {"params": [(name, twins.ours[name])], "use_muon": True, **reading.keys}
        for name, (_, reading) in parameters.items()
    ]
    return distmuon.Muon(groups, **{"lr": 0.02, "foreach": False, **twins.options, **settings})


def parity(layout, parameters, oracle, settings):
    twins = LAYOUTS[layout](parameters)
    exact = oracle == "torch"
    optimizer = optimizer_of(twins, parameters, **({} if exact else {"ns_dtype": torch.float64}), **settings)
    apart = {
        name: [nn.Parameter(matrix.clone()) for matrix in split(twins.whole[name].detach(), reading)]
        for name, (_, reading) in parameters.items()
    }
    everything = [matrix for matrices in apart.values() for matrix in matrices]
    scale = settings.get("adjust_lr_fn")
    if exact:
        reference = torch.optim.Muon(everything, lr=0.02, weight_decay=0.1, adjust_lr_fn=scale)
    else:
        group = {"params": everything, "use_muon": True}
        same = {"adjust_lr_fn": scale, "variant": settings.get("variant", "muon")}
        reference = distmuon.Muon([group], lr=0.02, foreach=False, ns_dtype=torch.float64, **same)
    found = []
    for step in range(3):
        give_gradients(twins, step)
        for name, (_, reading) in parameters.items():
            for matrix, grad in zip(apart[name], split(twins.whole[name].grad, reading), strict=True):
                matrix.grad = grad
        optimizer.step()
        reference.step()
        for name, (_, reading) in parameters.items():
            ours = twins.ours[name]
            momentum = optimizer.state[ours]["momentum_buffer"]
            weights, kept = (split(full(tensor), reading) for tensor in (ours, momentum))
            for number, matrix in enumerate(apart[name]):
                wanted = reference.state[matrix]["momentum_buffer"]
                apart_by = (weights[number] - matrix).abs().max().item(), (kept[number] - wanted).abs().max().item()
                if apart_by[0] > (0.0 if exact else 1e-6) or apart_by[1] > 0:
                    found.append(f"step {step}: block {number} of {name}: {apart_by}")
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert not any(everywhere), everywhere


def bytes_of(shape, reading, dims):
    """What this rank sends in a step."""
    parameters = {"w": (shape, reading)}
    twins = placed((dims,), (dist.get_world_size(),), parameters)
    optimizer = optimizer_of(twins, parameters)
    give_gradients(twins, 0)
    optimizer.step()
    (part,) = optimizer._binding.parts
    return part.pipeline.bytes_sent, [spec.matrices.count for spec in part.pipeline.plan.parameters]


def hooked():
    """The hook of DDP reduces blocks on all ranks, as their owners differ, and whole matrices on their owners."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.qkv = nn.Linear(8, 16, bias=False)
            self.out = nn.Linear(16, 8, bias=False)

        def forward(self, x):
            return self.out(self.qkv(x).tanh()).square().mean()

    matrices = {"qkv.weight": {"split_sizes": (8, 4, 4)}}
    results = []
    for hook in (False, True):
        model = DistributedDataParallel(Fused())
        optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=0.01, matrices=matrices, foreach=False)
        if hook:
            model.register_comm_hook(optimizer, distmuon.ddp_hook)
        for step in range(2):
            optimizer.zero_grad()
            torch.manual_seed(10 * step + dist.get_rank())
            model(torch.randn(4, 8)).backward()
            optimizer.step()
        named = {name.removeprefix("module."): param for name, param in model.named_parameters()}
        assert set(optimizer.owners()) == {named["out.weight"]}
        optimizer.consolidate_state_dict()
        kept = [optimizer.state[param]["momentum_buffer"].clone() for param in named.values()]
        results.append([param.detach().clone() for param in named.values()] + kept)
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-6, atol=1e-7)


def missing_on_some():
    """A gradient that one rank lacks counts as zeros in all blocks."""
    parameters = {"qkv": PARAMETERS["qkv"]}
    both = []
    for none in (True, False):
        twins = fsdp((2,), parameters)
        optimizer = optimizer_of(twins, parameters)
        give_gradients(twins, 0)
        param = twins.ours["qkv"]
        if dist.get_rank() == 1:
            param.grad.to_local().zero_()
            param.grad = None if none else param.grad
        optimizer.step()
        both.append(full(param))
    assert torch.equal(*both)


def refused():
    """Ranks that read a parameter differently are told, all of them."""
    parameters = {"qkv": PARAMETERS["qkv" if dist.get_rank() else "heads"]}
    twins = fsdp((2,), parameters)
    give_gradients(twins, 0)
    with pytest.raises(ValueError, match=r"'qkv' has the settings .*split_sizes=None.* on rank 0 and .*\(12, 6, 6\)"):
        optimizer_of(twins, parameters).step()


# --- tests


@pytest.mark.parametrize(("world_size", "layout"), WHERE)
def test_update_is_that_of_separate_parameters(pools, world_size, layout):
    pools(world_size, parity, layout, PARAMETERS, "torch", {})
    pools(world_size, parity, layout, TRANSPOSED, "distmuon", {})


def test_buckets_and_scales_change_nothing(pools):
    for settings in ({"bucket_bytes": 1}, {"adjust_lr_fn": "match_rms_adamw"}, {"static_grads": True}):
        pools(4, parity, "fsdp 4", PARAMETERS, "torch", settings)
        pools(4, parity, "hsdp", TRANSPOSED, "distmuon", settings)


def test_blocks_that_lie_whole_on_a_rank_are_not_exchanged(pools):
    """8 heads on 4 ranks, by rows and by columns; unequal blocks of which shards cut none; what is cut travels."""
    for shape, reading, dim, counts in [
        ((24, 8), Reading(num_heads=8), 0, [8]),
        ((8, 24), Reading(num_heads=8, split_axis="cols"), 1, [8]),
        ((24, 8), Reading(split_sizes=(12, 6, 6)), 0, [1, 1, 1]),
    ]:
        replies = pools(4, bytes_of, shape, reading, dim)
        assert all(found == counts for _, found in replies)
        sent = [sent for sent, _ in replies]
        if reading.num_heads:
            assert sent == [0] * 4
        else:
            # of 12 rows half has to come and to go; the blocks of 6 lie whole on the ranks 2 and 3
            assert sent[2:] == [0, 0] and sum(sent) == 2 * 6 * 8 * 2
    sent, counts = zip(*pools(4, bytes_of, (24, 8), Reading(num_heads=6), 0), strict=True)
    assert counts[0] == [1] * 6  # heads of 4 rows, of which shards of 6 cut two
    assert sum(sent) == 2 * 2 * (2 * 8) * 2


def test_ddp_hook(pools):
    pools(2, hooked)


def test_gradients_that_are_missing(pools):
    pools(2, missing_on_some)


def test_ranks_that_read_differently(pools):
    pools(2, refused)
