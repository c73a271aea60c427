"""What users of PyTorch optimizers expect of any optimizer."""

import logging

import pytest
import torch
from torch import nn

import distmuon
from distmuon.numerics.rationals import RATIONALS


def make(**keywords):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    keywords = {"lr": 0.02, "adamw_lr": 1e-2, **keywords}
    return model, distmuon.Muon(model, **keywords)


def loss_of(model, seed=0):
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.mse_loss(model(x), x[:, :3].sin())


def train(model, optimizer, steps=3, scheduler=None):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def test_it_learns():
    model, optimizer = make()
    before = loss_of(model).item()
    train(model, optimizer, 60)
    assert loss_of(model).item() < 0.3 * before


def test_closure():
    model, optimizer = make()
    other, expected = make()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == loss_of(other).item()
    train(other, expected, 1)
    assert torch.equal(weights(model), weights(other))


def test_zero_grad_sets_to_none():
    model, optimizer = make()
    train(model, optimizer, 1)
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    before = weights(model)
    optimizer.step()
    assert torch.equal(weights(model), before)


def test_gradients_are_not_written():
    model, optimizer = make()
    loss_of(model).backward()
    grads = [param.grad.clone() for param in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b.grad) for a, b in zip(grads, model.parameters(), strict=True))


def test_parameters_without_gradient_are_left_alone():
    model, optimizer = make()
    frozen = model[2].weight
    loss_of(model).backward()
    frozen.grad = None
    before = frozen.detach().clone()
    optimizer.step()
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state


def test_accumulation_is_one_large_batch():
    model, optimizer = make()
    other, expected = make()
    for seed in range(4):
        (loss_of(model, seed) / 4).backward()
    optimizer.step()
    (sum(loss_of(other, seed) for seed in range(4)) / 4).backward()
    expected.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "factory",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.01], total_steps=10),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ],
)
def test_schedulers(factory):
    model, optimizer = make()
    scheduler = factory(optimizer)
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step(1.0) if plateau else scheduler.step()
    assert torch.isfinite(weights(model)).all()


def test_both_rates_follow_a_scheduler():
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 2, scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 4, 1e-2 / 4]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.02, 1e-2]


def test_tensor_lr_is_the_number():
    model, optimizer = make()
    other, expected = make(lr=torch.tensor(0.02, dtype=torch.float64), adamw_lr=torch.tensor(1e-2))
    train(model, optimizer)
    train(other, expected)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-6, atol=1e-7)


WAYS = [{"foreach": False}, {"foreach": True}, {"compile": True}, {"bucket_bytes": 1}, {"ns_engine": "standard"}]
WAYS += [{"ns_engine": "composed"}, {"ns_engine": "gram"}]


@pytest.mark.parametrize("keywords", WAYS, ids=str)
def test_ways_to_compute_agree(keywords):
    model, optimizer = make(ns_dtype=torch.float32, ns_coefficients="quintic")
    other, expected = make(ns_dtype=torch.float32, ns_coefficients="quintic", **keywords)
    train(model, optimizer)
    train(other, expected)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-3, atol=1e-4)


def test_steps_alone_ask_for_the_quintic():
    model, optimizer = make(ns_dtype=torch.float32, ns_steps=4)
    other, expected = make(ns_dtype=torch.float32, ns_coefficients="quintic", ns_steps=4)
    train(model, optimizer)
    train(other, expected)
    assert torch.equal(weights(model), weights(other))


def test_settings_changed_between_steps_count():
    both = []
    for late in (False, True):
        model, optimizer = make(ns_dtype=torch.float32)
        group = next(group for group in optimizer.param_groups if group["use_muon"])
        if late:
            train(model, optimizer, 1)
        other, expected = make(ns_dtype=torch.float32, ns_coefficients="cubic")
        if late:
            train(other, expected, 1)
            other.load_state_dict(model.state_dict())
            for theirs, ours in zip(expected.param_groups, optimizer.param_groups, strict=True):
                for a, b in zip(theirs["params"], ours["params"], strict=True):
                    expected.state[a] = {key: value.clone() for key, value in optimizer.state[b].items()}
        group["ns_coefficients"] = "cubic"
        train(model, optimizer, 1)
        train(other, expected, 1)
        both.append(torch.equal(weights(model), weights(other)))
    assert both == [True, True]


def test_a_loaded_state_that_the_engine_does_not_run_is_refused():
    optimizer = make(ns_engine="rational")[1]
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"group 0 of the loaded state: ns_engine='rational' does not run polynomials"):
        optimizer.load_state_dict(make(ns_coefficients="quintic")[1].state_dict())
    assert optimizer.state_dict() == before


def test_a_rational_in_a_group_is_saved(tmp_path):
    optimizer = make(ns_coefficients=RATIONALS["rational3"])[1]
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert loaded["param_groups"][0]["ns_coefficients"] == RATIONALS["rational3"]


def test_report_names_the_engines():
    assert "engine rational, in torch.float32" in str(make(ns_engine="rational")[1].report())
    assert "engine standard, in torch.bfloat16" in str(make(foreach=False)[1].report())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"ns_engine": "fast"}, "ns_engine='fast' is unknown; known: auto, standard"),
        ({"ns_engine": "gram", "foreach": False}, "ns_engine='gram'"),
        ({"ns_engine": "rational", "compile": True}, "compile=True and ns_engine='rational'"),
        ({"ns_engine": "rational", "ns_steps": 5}, "ns_steps=5 has nothing to act on"),
        ({"ns_coefficients": "rational2", "foreach": False}, "'standard' runs polynomials"),
        ({"cost_table": "no/such.json"}, "cost_table='no/such.json' cannot be read"),
    ],
)
def test_settings_of_the_engine_that_do_not_go_together(keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**keywords)


@pytest.mark.parametrize("ns_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ns_dtypes(ns_dtype):
    model, optimizer = make(ns_dtype=ns_dtype)
    train(model, optimizer)
    assert torch.isfinite(weights(model)).all()


def test_sparse_gradients_are_named():
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 4, sparse=True), "mix": nn.Linear(4, 4, bias=False)})
    optimizer = distmuon.Muon(model, adamw_lr=1e-3)
    model["mix"](model["tokens"](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of 'tokens\.weight' has the layout torch\.sparse_coo"):
        optimizer.step()


def test_grad_scaler_and_clipping():
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    before = weights(model)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(weights(model), before)


def test_hooks_run():
    model, optimizer = make()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, 1)
    assert calls == ["pre", "post"]


def test_report_and_log(caplog):
    model, optimizer = make(adjust_lr_fn="match_rms_adamw")
    report = optimizer.report()
    by_name = {row.name: row for row in report.rows}
    assert by_name["2.weight"].algorithm == "muon"
    assert by_name["2.weight"].lr == pytest.approx(0.02 * 0.2 * 12**0.5)
    assert by_name["4.weight"].reason == "output head, as the last Linear of a Sequential"
    assert by_name["4.weight"].lr == 1e-2
    assert "muon: 2 parameters, 204 elements; adamw: 4 parameters, 63 elements" in str(report)
    with caplog.at_level(logging.INFO, logger="distmuon"):
        train(model, optimizer, 3)
    assert sum("2.weight" in record.getMessage() for record in caplog.records) == 1


def test_no_process_global_is_touched():
    before = (torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.get_num_threads())
    model, optimizer = make()
    train(model, optimizer, 1)
    assert (torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.get_num_threads()) == before
