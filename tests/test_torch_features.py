"""Features of torch's optimizers and modules that users bring along, beside torch.optim.Muon where it has them."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

import distmuon

AS_TORCH = {"adjust_lr_fn": "match_rms_adamw", "foreach": False, "ns_coefficients": "quintic"}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 8))


def backward(model, step):
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    loss = model(inputs.to(model[0].weight.dtype)).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def assert_same(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture
def conversion():
    """Set torch's flags of module conversion, and back."""
    future = torch.__future__
    before = future.get_swap_module_params_on_conversion(), future.get_overwrite_module_params_on_conversion()
    yield future
    future.set_swap_module_params_on_conversion(before[0])
    future.set_overwrite_module_params_on_conversion(before[1])


def test_hooks_run_once_a_step():
    model, calls = make_model(), []
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=1e-3)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("before"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 7})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append(state.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    train(model, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "before", "after", "saving", 7, "loaded"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_matrix_without_gradient_by_both_ways_to_zero(set_to_none):
    """Zeros are a gradient and None is none, as in torch.optim.Muon."""
    model, twin = make_model(), make_model()
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    optimizer = distmuon.Muon([{"params": matrices, "use_muon": True}], lr=0.02, weight_decay=0.1, **AS_TORCH)
    reference = torch.optim.Muon(
        [p for p in twin.parameters() if p.ndim == 2], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for net, opt in ((model, optimizer), (twin, reference)):
        train(net, opt, range(2))
        opt.zero_grad(set_to_none=set_to_none)
        (net[0](torch.ones(1, 8)).square().sum()).backward()
        opt.step()
    assert_same(model, twin)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
def test_state_follows_a_model_that_changes_its_dtype(conversion, swap, momentum_dtype):
    conversion.set_swap_module_params_on_conversion(swap)
    model = make_model()
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=1e-3, momentum_dtype=momentum_dtype)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    moved, loaded = copy.deepcopy((model, optimizer))
    model.to(torch.bfloat16)
    # what loading a state dict into an optimizer of the new dtype gives
    moved.to(torch.bfloat16)
    fresh = distmuon.Muon(moved, lr=0.02, adamw_lr=1e-3, momentum_dtype=momentum_dtype)
    fresh.load_state_dict(loaded.state_dict())
    for net, opt in ((model, optimizer), (moved, fresh)):
        train(net, opt, range(2, 4))
    assert_same(model, moved)
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == (momentum_dtype or torch.bfloat16)


def test_parameters_that_the_model_has_no_more_are_told_once(conversion, caplog):
    conversion.set_overwrite_module_params_on_conversion(True)
    model = make_model()
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=1e-3)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    assert not caplog.records
    model.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, "distmuon"):
        train(model, optimizer, range(1, 3))
    assert [record.getMessage().split(".")[0] for record in caplog.records] == [
        "no parameter has a gradient in this step"
    ]


CYCLES = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.02, total_steps=8),
    "cyclic": lambda optimizer: CyclicLR(optimizer, base_lr=0.01, max_lr=0.02, step_size_up=3),
}


@pytest.mark.parametrize("cycle", CYCLES)
def test_schedulers_that_cycle_momentum_cycle_that_of_matrices(cycle):
    """They write it to betas, which torch.optim.Muon does not have, and this class has for AdamW."""
    model, twin = make_model(), make_model()
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    optimizer = distmuon.Muon([{"params": matrices, "use_muon": True}], lr=0.02, **AS_TORCH)
    reference = torch.optim.Muon([p for p in twin.parameters() if p.ndim == 2], adjust_lr_fn="match_rms_adamw")
    for net, opt in ((model, optimizer), (twin, reference)):
        scheduler = CYCLES[cycle](opt)
        for step in range(6):
            train(net, opt, range(step, step + 1))
            scheduler.step()
    assert_same(model, twin)


def test_momentum_set_by_hand_stays_until_the_schedule_goes_on():
    model = make_model()
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=0.01)
    scheduler = OneCycleLR(optimizer, max_lr=0.02, total_steps=8)
    group = optimizer.param_groups[0]
    train(model, optimizer, range(1))
    assert group["momentum"] == group["betas"][0] == 0.95
    group["momentum"] = 0.5
    train(model, optimizer, range(2))
    assert group["momentum"] == 0.5
    scheduler.step()
    train(model, optimizer, range(1))
    assert group["momentum"] == group["betas"][0] != 0.95


@pytest.mark.parametrize("way", ["state_dict", "nested", "flat"])
def test_a_resumed_run_keeps_the_momentum_that_was_set_by_hand(way):
    """A run that goes on and one that is loaded into new objects step alike, before the schedule goes on and after."""
    runs = []
    options = StateDictOptions(flatten_optimizer_state_dict=way == "flat")
    for resumed in (False, True):
        model, optimizer, scheduler = cycled()
        train(model, optimizer, range(2))
        optimizer.param_groups[0]["momentum"] = 0.5
        if resumed:
            saved = copy.deepcopy((model.state_dict(), scheduler.state_dict()))
            states = optimizer.state_dict()
            if way != "state_dict":
                states = get_optimizer_state_dict(model, optimizer, options=options)
            states = copy.deepcopy(states)
            model, optimizer, scheduler = cycled()
            model.load_state_dict(saved[0])
            if way == "state_dict":
                optimizer.load_state_dict(states)
            else:
                set_optimizer_state_dict(model, optimizer, states, options=options)
            scheduler.load_state_dict(saved[1])
        train(model, optimizer, range(2, 4))
        assert optimizer.param_groups[0]["momentum"] == 0.5
        scheduler.step()
        train(model, optimizer, range(4, 5))
        assert optimizer.param_groups[0]["momentum"] == optimizer.param_groups[0]["betas"][0]
        runs.append(model)
    assert_same(*runs)


def cycled():
    model = make_model()
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=0.01)
    return model, optimizer, OneCycleLR(optimizer, max_lr=0.02, total_steps=8)


def test_one_optimizer_a_parameter_in_backward():
    """Stepped by hooks as gradients come, as torch's tutorial does to save their memory."""
    model, twin = make_model(), make_model()
    optimizers = {}
    for name, param in model.named_parameters():
        if param.ndim == 2:
            optimizers[param] = distmuon.Muon([{"params": [(name, param)], "use_muon": True}], lr=0.02, **AS_TORCH)
        else:
            optimizers[param] = torch.optim.AdamW([param])

        def step_now(param):
            optimizers[param].step()
            optimizers[param].zero_grad()

        param.register_post_accumulate_grad_hook(step_now)
    for step in range(3):
        backward(model, step)
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    both = [
        torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in twin.parameters() if p.ndim < 2]),
    ]
    for step in range(3):
        for optimizer in both:
            optimizer.zero_grad()
        backward(twin, step)
        for optimizer in both:
            optimizer.step()
    assert_same(model, twin)


def test_torchs_own_optimizer_in_backward_is_refused_with_a_reason():
    """It makes one optimizer of each bare parameter, which says neither what it is nor its name."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = make_model()
    with pytest.raises(ValueError, match="holds bare parameters and does not say use_muon"):
        _apply_optimizer_in_backward(distmuon.Muon, model.parameters(), {"lr": 0.02})
