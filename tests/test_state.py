"""State: what is kept, how it moves, and the dummy step that creates it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import distmuon


def make(seed=0, dtype=torch.float32, **keywords):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 9))
    model = model.to(dtype)
    return model, distmuon.Muon(model, lr=0.02, adamw_lr=1e-3, **keywords)


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(9, (5, 2), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens[:, 0]).float(), tokens[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_equal_models(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_keys_and_shapes():
    model, optimizer = make()
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        keys = {"momentum_buffer"} if group["use_muon"] else {"step", "exp_avg", "exp_avg_sq"}
        for param in group["params"]:
            assert optimizer.state[param].keys() == keys
            shapes = {key: value.shape for key, value in optimizer.state[param].items() if key != "step"}
            assert set(shapes.values()) == {param.shape}


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(dtype, momentum_dtype):
    model, optimizer = make(dtype=dtype, momentum_dtype=momentum_dtype)
    train(model, optimizer, 3)
    other, restored = make(seed=5, dtype=dtype, momentum_dtype=momentum_dtype)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(through_file(optimizer.state_dict()))
    train(model, optimizer, 3, seed=2)
    train(other, restored, 3, seed=2)
    assert_equal_models(model, other)
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[param].items():
            assert restored.state[twin][key].dtype == value.dtype
            assert torch.equal(restored.state[twin][key], value)


def test_loads_the_state_of_torch_muon():
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    ours = [nn.Parameter(param.detach().clone()) for param in theirs]
    expected = torch.optim.Muon(theirs, lr=0.03, momentum=0.9)
    actual = distmuon.Muon([{"params": ours, "use_muon": True}], foreach=False)
    for step in range(4):
        if step == 2:
            for a, b in zip(theirs, ours, strict=True):
                b.data.copy_(a.data)
            actual.load_state_dict(through_file(expected.state_dict()))
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        expected.step()
        actual.step()
    assert actual.param_groups[0]["momentum"] == 0.9
    assert actual.param_groups[0]["use_muon"] is True
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a, b)


def test_group_that_changed_algorithm_is_an_error():
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    saved = distmuon.Muon(
        [{"params": params[:1], "use_muon": True}, {"params": params[1:], "use_muon": False, "lr": 1.0}]
    ).state_dict()
    swapped = distmuon.Muon(
        [{"params": params[:1], "use_muon": False, "lr": 1.0}, {"params": params[1:], "use_muon": True}]
    )
    with pytest.raises(ValueError, match="group 0 was saved on Muon and is on AdamW now"):
        swapped.load_state_dict(saved)
    with pytest.raises(ValueError, match="2 parameter groups and the optimizer 1"):
        distmuon.Muon([{"params": params, "use_muon": True}]).load_state_dict(saved)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_dummy_step_creates_all_state_and_changes_nothing(lr):
    model, optimizer = make()
    untouched, reference = make()
    rates = [group["lr"] for group in optimizer.param_groups]
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert len(optimizer.state) == len(list(model.parameters()))
    assert_equal_models(model, untouched)
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    train(model, optimizer, 3)
    train(untouched, reference, 3)
    assert_equal_models(model, untouched)


def test_dummy_step_leaves_momentum_and_counters_alone():
    model, optimizer = make()
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    after = optimizer.state_dict()["state"]
    for index, state in before.items():
        for key, value in state.items():
            assert torch.equal(after[index][key], value)


def test_dummy_step_never_orthogonalizes(monkeypatch):
    model, optimizer = make()
    monkeypatch.setattr(
        "distmuon.orthogonalizing.orthogonalize_", lambda *args, **kwargs: pytest.fail("orthogonalized")
    )
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()


def test_a_step_at_rate_zero_with_gradients_is_a_step():
    """Schedulers warm up from 0: momentum must see those gradients, as in torch.optim.Muon."""
    model, optimizer = make()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(state["step"] == 1 for state in optimizer.state.values() if "step" in state)
    assert all(state["momentum_buffer"].any() for state in optimizer.state.values() if "step" not in state)


@pytest.mark.parametrize("flatten", [False, True])
def test_dcp_state_dict_functions(flatten):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = make()
    train(model, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other, restored = make(seed=5)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, restored, saved, options=options)
    train(model, optimizer, 3, seed=2)
    train(other, restored, 3, seed=2)
    assert_equal_models(model, other)


def test_dcp_on_a_fresh_optimizer_changes_nothing():
    model, optimizer = make()
    untouched, reference = make()
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, 2)
    train(untouched, reference, 2)
    assert_equal_models(model, untouched)


def test_deepcopy_and_pickle():
    model, optimizer = make(momentum_dtype=torch.float64)
    train(model, optimizer, 2)
    for clone in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        twin_model, twin = clone((model, optimizer))
        first, first_optimizer = copy.deepcopy((model, optimizer))
        train(first, first_optimizer, 2, seed=3)
        train(twin_model, twin, 2, seed=3)
        assert_equal_models(first, twin_model)
        assert str(twin.report()) == str(optimizer.report())


def test_swapped_parameters_are_planned_again():
    """accelerate replaces every parameter object of the groups after the optimizer was built."""
    model, optimizer = make()
    reference_model, reference = make()
    train(reference_model, reference, 2)
    fresh, _ = make()
    twins = dict(zip(model.parameters(), fresh.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [twins[param] for param in group["params"]]
    train(fresh, optimizer, 1)
    train(reference_model, reference, 0)
    second, second_optimizer = make()
    train(second, second_optimizer, 1)
    assert_equal_models(fresh, second)
