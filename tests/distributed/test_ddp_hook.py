"""Gradients that only owners have: the same training as plain DDP, in fewer bytes."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distmuon


@pytest.fixture(scope="module")
def pools():
    with Pool(2) as two, Pool(3) as three:
        yield {2: two, 3: three}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.experts = nn.Parameter(torch.randn(4, 16, 16) / 4)
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        for expert in self.experts:
            x = x + (x @ expert).tanh() / 4
        return self.norm(x).square().mean() + x.mean() ** 3


def optimizer_of(model, **keywords):
    return distmuon.Muon(model, lr=0.02, adamw_lr=1e-3, foreach=False, ns_dtype=torch.float32, **keywords)


def batch(step, micro=0):
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + dist.get_rank())
    return torch.randint(20, (4, 6), generator=generator)


def pair(max_norm=None):
    """A model under plain DDP and its twin under the hook."""
    plain, hooked = DistributedDataParallel(Net()), DistributedDataParallel(Net(), bucket_cap_mb=0.002)
    plain_optimizer, optimizer = optimizer_of(plain), optimizer_of(hooked)
    hooked.register_comm_hook(optimizer, distmuon.ddp_hook)
    return (plain, plain_optimizer), (hooked, optimizer)


def train(model, optimizer, steps, *, max_norm=None, accumulate=1, clip=None):
    norms = []
    for step in steps:
        optimizer.zero_grad()
        for micro in range(accumulate - 1):
            with model.no_sync():
                model(batch(step, micro)).backward()
        model(batch(step, accumulate - 1)).backward()
        if max_norm is not None:
            norms.append(clip(model.parameters(), max_norm).item())
        optimizer.step()
    return norms


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def replicas_agree(model):
    flat = torch.cat([param.detach().flatten() for param in model.parameters()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return all(torch.equal(flat, other) for other in found)


def trains_like_plain(max_norm, accumulate):
    (plain, plain_optimizer), (hooked, optimizer) = pair()
    start = [param.detach().clone() for param in plain.parameters()]
    expected = train(
        plain, plain_optimizer, range(5), max_norm=max_norm, accumulate=accumulate, clip=nn.utils.clip_grad_norm_
    )
    found = []
    for step in range(5):
        # owners are known after the first backward pass
        clip = lambda params, limit: distmuon.clip_grad_norm_(params, limit, owners=optimizer.owners())  # noqa: E731
        found += train(hooked, optimizer, [step], max_norm=max_norm, accumulate=accumulate, clip=clip)
    moved = max((a - b).abs().max().item() for a, b in zip(plain.parameters(), start, strict=True))
    return distance(plain, hooked), moved, expected, found, replicas_agree(hooked)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("max_norm", "accumulate"), [(None, 1), (0.1, 1), (0.1, 3)])
def test_it_trains_like_plain_ddp(pools, world, max_norm, accumulate):
    for error, moved, expected, found, agree in pools[world].run(trains_like_plain, max_norm, accumulate):
        # float32 gradients are summed in another order
        assert error <= 1e-3 * moved
        assert found == pytest.approx(expected, rel=1e-5)
        assert agree


def gradients():
    model = DistributedDataParallel(Net())
    optimizer = optimizer_of(model)
    model.register_comm_hook(optimizer, distmuon.ddp_hook)
    plain = DistributedDataParallel(Net())
    for each in (model, plain):
        each(batch(0)).backward()
    owners = optimizer.owners()
    rank = dist.get_rank()
    right = []
    for param, reference in zip(model.parameters(), plain.parameters(), strict=True):
        if owners.get(param, rank) == rank:
            right.append(torch.allclose(param.grad, reference.grad, rtol=1e-5, atol=1e-7))
        else:
            right.append(bool(param.grad.isnan().all()))
    names = {name for name, param in model.named_parameters() if param in owners}
    return right, names, sorted(owners.values())


def test_owners_have_the_mean_and_others_nan(pools):
    for right, names, owners in pools[3].run(gradients):
        assert all(right)
        # the stack of experts has several owners, so its gradient goes to everybody
        assert names == {f"module.layers.{i}.weight" for i in range(5)}
        assert set(owners) == {0, 1, 2}


def state():
    """Consolidated state equals that of plain DDP, and a run that is resumed from it goes on alike."""
    (plain, plain_optimizer), (hooked, optimizer) = pair()
    train(plain, plain_optimizer, range(3))
    train(hooked, optimizer, range(3))
    try:
        optimizer.state_dict()
        early = "nothing was raised"
    except RuntimeError as error:
        early = str(error)
    optimizer.consolidate_state_dict()
    saved = copy.deepcopy(optimizer.state_dict())
    reference = plain_optimizer.state_dict()["state"]
    close = [
        torch.allclose(saved["state"][index][key], value, rtol=1e-3, atol=1e-5)
        for index, entries in reference.items()
        for key, value in entries.items()
    ]
    resumed = DistributedDataParallel(Net())
    resumed.load_state_dict(hooked.state_dict())
    again = optimizer_of(resumed)
    resumed.register_comm_hook(again, distmuon.ddp_hook)
    again.load_state_dict(saved)
    train(hooked, optimizer, range(3, 5))
    train(resumed, again, range(3, 5))
    return early, all(close), distance(hooked, resumed)


def test_state_is_consolidated_on_request(pools):
    for early, close, error in pools[2].run(state):
        assert early.startswith("with distmuon.ddp_hook each rank keeps momentum of its own matrices only")
        assert close
        assert error == 0


def traffic():
    """Bytes that this rank sends for the matrices in a step of the hook, gradients and updates."""
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)], nn.Identity())
    model = DistributedDataParallel(model)
    optimizer = distmuon.Muon(model, lr=0.02, muon_names=["*"])
    model.register_comm_hook(optimizer, distmuon.ddp_hook)
    model(torch.ones(2, 32)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    sent = 0
    original = dist.all_to_all_single

    def counted(output, input, output_splits=None, input_splits=None, **keywords):
        nonlocal sent
        sent += input.nbytes - input_splits[dist.get_rank()] * input.itemsize
        return original(output, input, output_splits, input_splits, **keywords)

    with mock.patch.object(dist, "all_to_all_single", counted):
        model(torch.ones(2, 32)).sum().backward()
        optimizer.step()
    return sent


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_and_updates_cost_less_than_plain_ddp(pools, world):
    numel = 6 * 32 * 32
    sent = sum(pools[world].run(traffic))
    assert sent == (4 + 2) * (world - 1) * numel
    all_reduce = 2 * 4 * (world - 1) * numel
    assert sent <= all_reduce


def unshared():
    model = DistributedDataParallel(Net())
    optimizer = optimizer_of(list(model.named_parameters()))
    model.register_comm_hook(optimizer, distmuon.ddp_hook)
    try:
        model(batch(0)).backward()
    except Exception as error:
        return str(error)
    return "nothing was raised"


def test_an_optimizer_that_shares_nothing_is_an_error(pools):
    for told in pools[2].run(unshared):
        assert "pass the DistributedDataParallel module itself" in told


def groups_change(when):
    """A matrix joins after the first step, before or after the backward pass of the second."""
    model = DistributedDataParallel(Net())
    named = dict(model.named_parameters())
    late = named.pop("module.layers.4.weight")
    optimizer = distmuon.Muon(named.items(), lr=0.02, adamw_lr=1e-3, mesh=model.process_group)
    model.register_comm_hook(optimizer, distmuon.ddp_hook)
    train(model, optimizer, [0])
    optimizer.zero_grad()
    late.grad = None
    group = {"params": [("late", late)], "use_muon": True}
    if when == "before":
        optimizer.add_param_group(group)
    model(batch(1)).backward()
    if when == "after":
        optimizer.add_param_group(group)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    train(model, optimizer, [2])
    return all(bool(param.isfinite().all()) for param in model.parameters()) and replicas_agree(model)


def test_groups_may_change_before_the_backward_pass_only(pools):
    assert pools[2].run(groups_change, "before") == [True, True]
    for told in pools[2].run(groups_change, "after"):
        assert told.startswith("parameter groups changed between the backward pass and the step")


def alone():
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = DistributedDataParallel(Net(), process_group=group)
    twin = Net()
    optimizer, reference = optimizer_of(model), optimizer_of(twin)
    model.register_comm_hook(optimizer, distmuon.ddp_hook)
    for step in range(2):
        for each, stepping in ((model, optimizer), (twin, reference)):
            stepping.zero_grad()
            each(batch(step)).backward()
            stepping.step()
    return distance(model, twin)


def test_a_group_of_one_has_nothing_to_reduce(pools):
    assert pools[2].run(alone) == [0.0, 0.0]
