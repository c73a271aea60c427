"""Worlds that cannot step: every rank ends with the same sentence, and none hangs."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Pool, rank_errors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distmuon

SETTINGS = {"lr": 0.02, "adamw_lr": 1e-3}


@pytest.fixture(scope="module")
def two():
    with Pool(2) as pool:
        yield pool


def weights(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for i, s in enumerate(shapes)}


def optimizer_of(named, **keywords):
    return distmuon.Muon(named.items(), mesh=dist.group.WORLD, **{**SETTINGS, **keywords})


def with_gradients(named):
    for param in named.values():
        param.grad = torch.ones_like(param)
    return named


def outcome(function, *args):
    """What a rank raised, as text; the pool stays usable, since all ranks raised before any exchange."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def step(named, **keywords):
    optimizer_of(named, **keywords).step()


def another_shape():
    return outcome(step, with_gradients(weights((4, 6), (4 + 2 * dist.get_rank(), 6))))


def another_dtype():
    dtype = torch.bfloat16 if dist.get_rank() else torch.float32
    return outcome(step, with_gradients(weights((4, 6), dtype=dtype)))


def one_parameter_less():
    return outcome(step, with_gradients(weights(*[(4, 6)] * (3 - dist.get_rank()))))


def another_momentum():
    return outcome(lambda: step(with_gradients(weights((4, 6))), momentum=0.9 + 0.05 * dist.get_rank()))


def another_rate():
    return outcome(lambda: step(with_gradients(weights((4, 6))), lr=0.02 * (1 + dist.get_rank())))


def another_bucket_size():
    return outcome(lambda: step(with_gradients(weights((4, 6))), bucket_bytes=1024 + dist.get_rank()))


def another_group():
    named = with_gradients(weights((4, 6), (4, 6)))
    first, second = named.items()
    on_muon = [first, second] if dist.get_rank() else [first]
    groups = [{"params": on_muon, "use_muon": True}]
    groups += [] if dist.get_rank() else [{"params": [second], "use_muon": False}]
    return outcome(lambda: distmuon.Muon(groups, mesh=dist.group.WORLD, **SETTINGS).step())


def sparse_gradient_on_one_rank():
    named = with_gradients(weights((4, 6), (6, 6)))
    optimizer = optimizer_of(named)
    optimizer.step()
    if dist.get_rank() == 1:
        # torch lets nobody set such a gradient on a dense parameter of another layout but autograd
        embedding = nn.Embedding(6, 6, sparse=True)
        named["w1"].data = embedding.weight.data
        with mock.patch.object(type(named["w1"]), "grad", torch.ones(6, 6).to_sparse(), create=True):
            return outcome(optimizer.step)
    return outcome(optimizer.step)


def gradient_of_another_shape_on_one_rank():
    named = with_gradients(weights((4, 6), (6, 6)))
    optimizer = optimizer_of(named)
    found = []
    for _ in range(2):
        if dist.get_rank() == 1:
            with mock.patch.object(nn.Parameter, "grad", torch.ones(2, 2)):
                found.append(outcome(optimizer.step))
        else:
            found.append(outcome(optimizer.step))
    return found


def missing_gradient_on_one_replica():
    named = with_gradients(weights((4, 6), (6, 6)))
    if dist.get_rank() == 1:
        named["w1"].grad = None
    optimizer = optimizer_of(named)
    return outcome(optimizer.step)


def a_layout_that_is_no_shard():
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (2,))
    placements = [Partial()] if dist.get_rank() else [Replicate()]
    param = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, placements))
    return outcome(lambda: distmuon.Muon([("w", param)], **SETTINGS).step())


def own_sparse_gradient_beside_shared_parameters():
    """The shared part is agreed on first, and must not go on without the rank that fails in its own part."""
    from torch.distributed.tensor import Shard, distribute_tensor

    shared = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)]))
    own = nn.Parameter(torch.ones(6, 6))
    optimizer = distmuon.Muon([("shared", shared), ("own", own)], **SETTINGS)
    shared.grad, own.grad = torch.ones_like(shared), torch.ones_like(own)
    optimizer.step()
    if dist.get_rank() == 1:
        with mock.patch.object(nn.Parameter, "grad", torch.ones(6, 6).to_sparse()):
            return outcome(optimizer.step)
    return outcome(optimizer.step)


def group_without_momentum_on_one_rank():
    optimizer = optimizer_of(with_gradients(weights((4, 6))))
    if dist.get_rank() == 1:
        del optimizer.param_groups[0]["momentum"]
    return outcome(optimizer.step)


def state_without_momentum_on_one_rank():
    optimizer = optimizer_of(with_gradients(weights((4, 6))))
    optimizer.step()
    if dist.get_rank() == 1:
        (state,) = optimizer.state.values()
        state["exp_avg"] = state.pop("momentum_buffer")
    return outcome(optimizer.step)


def unreduced_gradient_on_one_rank():
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Replicate()]))
    placements = [Partial()] if dist.get_rank() == 0 else [Replicate()]
    param.grad = DTensor.from_local(torch.ones(4, 4), mesh, placements)
    return outcome(distmuon.Muon([("w", param)], **SETTINGS).step)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (another_shape, "ValueError: rank 0: parameter 'w1' has the shape (4, 6) on rank 0 and (6, 6) on rank 1"),
        (another_dtype, "ValueError: rank 0: parameter 'w0' has the dtype float32 on rank 0 and bfloat16 on rank 1"),
        (one_parameter_less, "ValueError: rank 0: parameter 'w2' of shape (4, 6) is on rank 0, shared by ranks (0, 1)"),
        (another_rate, "ValueError: rank 0: parameter 'w0' has the settings muon, momentum=0.95"),
        (another_momentum, "ValueError: rank 0: parameter 'w0' has the settings muon, momentum=0.9"),
        (another_bucket_size, "ValueError: rank 0: (bucket_bytes, ns_dtype, ns_engine, wire_dtype, foreach, compile, "),
        (another_group, "ValueError: rank 0: parameter 'w1' has the group 1 on rank 0 and 0 on rank 1"),
        (missing_gradient_on_one_replica, "ValueError: parameter 'w1' is replicated, and ranks [0] have its gradient"),
        (a_layout_that_is_no_shard, "ValueError: rank 1: parameter 'w' has the placements (Partial(sum),)"),
        (own_sparse_gradient_beside_shared_parameters, "TypeError: rank 1: the gradient of 'own' has the layout"),
        (group_without_momentum_on_one_rank, "RuntimeError: rank 1: 'momentum'"),
        (state_without_momentum_on_one_rank, "ValueError: rank 1: the state of parameter 'w0' lacks momentum_buffer"),
        (
            unreduced_gradient_on_one_rank,
            "ValueError: parameter 'w' has a gradient in other placements than its own on 1",
        ),
        (sparse_gradient_on_one_rank, "TypeError: rank 1: the gradient of 'w0' has the layout torch.sparse_coo"),
    ],
)
def test_every_rank_raises_the_same(two, function, told):
    found = two.run(function)
    assert found[0] == found[1]
    assert found[0].startswith(told)


def test_a_bad_gradient_is_told_in_every_step(two):
    for first, second in two.run(gradient_of_another_shape_on_one_rank):
        assert first == second
        assert first.startswith("ValueError: rank 1: the gradient of 'w0' has shape (2, 2) and the parameter (4, 6)")


def another_order():
    """Named parameters may come in any order."""
    named = with_gradients(weights((4, 6), (4, 6), (8, 6)))
    generator = torch.Generator().manual_seed(1)
    for param in named.values():
        param.grad = torch.randn(param.shape, generator=generator)
    alone = {name: nn.Parameter(param.detach().clone()) for name, param in named.items()}
    for name, param in alone.items():
        param.grad = named[name].grad.clone()
    items = list(named.items())
    ordered = items[::-1] if dist.get_rank() else items
    distmuon.Muon(ordered, mesh=dist.group.WORLD, foreach=False, **SETTINGS).step()
    distmuon.Muon(alone.items(), foreach=False, **SETTINGS).step()
    return all(torch.equal(alone[name], param) for name, param in items)


def test_another_order_of_named_parameters_changes_nothing(two):
    assert two.run(another_order) == [True, True]


def dies_in_the_exchange():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])
    fully_shard(model)
    optimizer = distmuon.Muon(model, bucket_bytes=64 * 64 * 2, **SETTINGS)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    if dist.get_rank() == 1:
        # in the middle of the next step, with an exchange under way
        with mock.patch("distmuon.orthogonalizing.orthogonalize_", lambda *args, **kwargs: os._exit(7)):
            optimizer.step()
    optimizer.step()


def test_a_rank_that_dies_in_the_exchange_ends_the_others():
    found = rank_errors(dies_in_the_exchange, 2, timeout=60)
    assert found[1] == "exit code 7"
    assert "the exchange of the bucket of '" in found[0] or "Connection closed" in found[0]
    assert "0.weight" in found[0] or "1.weight" in found[0] or "2.weight" in found[0]


def skipped_step():
    """A step that is left out leaves nothing behind (peers keep a gradient that is already on its way)."""
    model = nn.Sequential(nn.Linear(6, 7, bias=False), nn.Linear(7, 6, bias=False), nn.Linear(6, 6, bias=False))
    twin = nn.Sequential(nn.Linear(6, 7, bias=False), nn.Linear(7, 6, bias=False), nn.Linear(6, 6, bias=False))
    twin.load_state_dict(model.state_dict())
    results = []
    for module, bad in ((model, True), (twin, False)):
        fully_shard(module)
        optimizer = distmuon.Muon(module, foreach=False, **SETTINGS)
        for step in range(3):
            optimizer.zero_grad()
            if step == 1 and bad:
                module(torch.full((2, 6), float("nan"))).sum().backward()
                optimizer.zero_grad()
            module(torch.full((2, 6), 1.0 + step)).square().sum().backward()
            optimizer.step()
        results.append([param.full_tensor().detach() for param in module.parameters()])
    return [torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*results, strict=True)]


def test_a_skipped_step_leaves_nothing_behind(two):
    assert all(all(same) for same in two.run(skipped_step))


def broken_promise():
    named = with_gradients(weights((4, 6), (6, 6)))
    named["w1"].grad = None
    optimizer = optimizer_of(named, static_grads=True)
    optimizer.step()
    with_gradients(named)
    return outcome(optimizer.step)


def test_a_gradient_that_static_grads_excluded_is_an_error(two):
    for found in two.run(broken_promise):
        assert found.startswith("ValueError: parameter 'w1' has a gradient now and had none in the first step")


def a_stage_without_matrices():
    """A pipeline stage may hold an embedding and norms alone, beside ranks that hold matrices."""
    if dist.get_rank() == 0:
        model = nn.ModuleList([nn.Embedding(5, 4), nn.LayerNorm(4)])
    else:
        model = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    optimizer = distmuon.Muon(model, **SETTINGS)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step()
    return all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_rank_may_have_nothing_on_muon(two):
    assert two.run(a_stage_without_matrices) == [True, True]
