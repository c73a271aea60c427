"""Groups with an ``lmo``, and Scion made of them, beside float64 transcriptions of arXiv 2502.07529 and its code."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import distmuon
from distmuon.checkpoint import reset_changed, routing_table
from distmuon.checkpoint.converting import convert

LR, DECAY, EPS, STEPS = 0.03, 0.7, 1e-8, 20


# --- the formulas, on matrices (out, in)


def sign(d):
    return d.sign() / d.shape[1]


def col_norm(d):
    return torch.stack([col / (col.norm() / math.sqrt(len(col)) + EPS) for col in d.unbind(1)], 1)


def row_norm(d):
    return torch.stack([row / (row.norm() * math.sqrt(len(row)) + EPS) for row in d.unbind(0)], 0)


def bias_rms(d):
    return d / (d.square().mean().sqrt() + EPS)


def transposed(rule):
    return lambda d: rule(d.mT).mT


def stacked(rule):
    return lambda d: torch.stack([rule(one) for one in d])


def flattened(rule):
    return lambda d: rule(d.flatten(1)).view(d.shape)


RULES = {
    "sign": ("sign", (5, 7), {}, sign),
    "sign, transposed": ("sign", (5, 7), {"transposed": True}, transposed(sign)),
    "sign of a stack": ("sign", (3, 5, 7), {}, stacked(sign)),
    "sign of a kernel": ("sign", (4, 3, 2, 2), {"flatten": True}, flattened(sign)),
    "sign of a vector": ("sign", (6,), {}, torch.sign),
    "columns": ("col_norm", (5, 7), {}, col_norm),
    "embedding": ("col_norm", (5, 7), {"transposed": True}, transposed(col_norm)),
    "columns of a stack": ("col_norm", (3, 5, 7), {}, stacked(col_norm)),
    "columns of a kernel": ("col_norm", (4, 3, 2), {"flatten": True}, flattened(col_norm)),
    "rows": ("row_norm", (5, 7), {}, row_norm),
    "rows, transposed": ("row_norm", (5, 7), {"transposed": True}, transposed(row_norm)),
    "rows of a kernel": ("row_norm", (4, 3, 2, 2), {"flatten": True}, flattened(row_norm)),
    "bias": ("bias_rms", (6,), {}, bias_rms),
    "scalar": ("bias_rms", (), {}, bias_rms),
    "biases of experts": ("bias_rms", (3, 6), {}, stacked(bias_rms)),
}


def gradients(shape, steps=STEPS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def beside_a_matrix(group, **settings):
    """An optimizer of one lmo group; Muon has to have something too."""
    groups = [{"params": [nn.Parameter(torch.randn(3, 3))], "use_muon": True}, {**group, "use_muon": False}]
    return distmuon.Muon(groups, **settings)


@pytest.mark.parametrize(
    ("nesterov", "cautious", "foreach", "rate"),
    [(False, False, None, float), (True, False, False, float), (False, True, None, torch.tensor)],
)
@pytest.mark.parametrize("case", RULES)
def test_twenty_steps_are_those_of_the_formula(case, nesterov, cautious, foreach, rate):
    lmo, shape, reading, rule = RULES[case]
    weight = torch.randn(shape, dtype=torch.float64)
    param = nn.Parameter(weight.clone())
    lr = rate(LR) if rate is float else torch.tensor(LR, dtype=torch.float64)
    group = dict(params=[param], lmo=lmo, lr=lr, weight_decay=DECAY, momentum=0.9, nesterov=nesterov, **reading)
    optimizer = beside_a_matrix({**group, "cautious_wd": cautious}, foreach=foreach)
    average = torch.zeros_like(weight)
    for grad in gradients(shape):
        param.grad = grad.clone()
        optimizer.step()
        average = 0.9 * average + 0.1 * grad
        update = rule(0.1 * grad + 0.9 * average if nesterov else average)
        decayed = weight if not cautious else torch.where(weight * update >= 0, weight, 0.0)
        weight = weight - LR * DECAY * decayed - LR * update
    torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-12)
    assert list(optimizer.state[param]) == ["momentum_buffer"]


@pytest.mark.parametrize("case", RULES)
def test_sixteen_bits_are_those_of_float32(case):
    """The step is made in float32 from the average, and rounded once."""
    lmo, shape, reading, rule = RULES[case]
    weight = torch.randn(shape).bfloat16()
    param = nn.Parameter(weight.clone())
    group = dict(params=[param], lmo=lmo, lr=LR, weight_decay=0.0, momentum=0.9, nesterov=False, **reading)
    optimizer = beside_a_matrix(group, momentum_dtype=torch.float32)
    param.grad = torch.randn(shape).bfloat16()
    optimizer.step()
    buffer = optimizer.state[param]["momentum_buffer"]
    assert buffer.dtype == torch.float32 and param.dtype == torch.bfloat16
    expected = (weight.double() - LR * rule(buffer.double())).bfloat16()
    torch.testing.assert_close(param.detach(), expected, rtol=2**-8, atol=0)


def test_zeros_take_no_step():
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    before = [param.detach().clone() for param in params]
    groups = [
        dict(params=[p], lmo=lmo, lr=1.0, weight_decay=0.0)
        for p, lmo in zip(params, ("sign", "col_norm", "row_norm"), strict=True)
    ]
    optimizer = beside_a_matrix(groups[0])
    for group in groups[1:]:
        optimizer.add_param_group({**group, "use_muon": False})
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


# --- Scion


class Model(nn.Module):
    def __init__(self, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.conv = nn.Conv1d(6, 6, 3, bias=False)
        self.mix = nn.Conv1d(6, 6, 3, groups=6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.gate = nn.Linear(6, 1, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.norm(x + self.down(F.gelu(self.up(x))) * self.gate(x))
        return self.head(x + (self.conv(x.mT) + self.mix(x.mT)).mean(-1)[:, None])


def model_of(seed=0, **settings):
    torch.manual_seed(seed)
    return Model(**settings).double()


def quintic(d):
    x = (d.mT if d.shape[0] > d.shape[1] else d) / d.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if d.shape[0] > d.shape[1] else x


def spectral(d):
    return math.sqrt(d.shape[0] / d.shape[1]) * quintic(d)


def spectral_conv(d):
    return math.sqrt(d.shape[0] / d.shape[1]) / d.shape[2] * quintic(d.flatten(1)).view(d.shape)


def spectral_max(d):
    return max(1.0, math.sqrt(d.shape[0] / d.shape[1])) * quintic(d)


def kinds(model, *, tied, hidden, rest, embedding, vectors):
    """The rule and radius of each parameter, as the docstring of Scion has it."""
    found = {name: (bias_rms, vectors) for name, param in model.named_parameters() if param.ndim == 1}
    found["embed.weight"] = (sign, rest) if tied else (transposed(col_norm), embedding)
    found |= {"head.weight": (sign, rest), "up.weight": (spectral_max, hidden), "down.weight": (spectral, hidden)}
    found |= {"conv.weight": (spectral_conv, hidden), "mix.weight": (flattened(row_norm), hidden)}
    return {**found, "gate.weight": (row_norm, hidden)}


@pytest.mark.parametrize(("tied", "constrained"), [(False, True), (True, True), (False, False)])
def test_scion_takes_twenty_steps_of_its_formula(tied, constrained):
    model = model_of(tied=tied)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    averages = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    radii = dict(hidden=7.0, rest=90.0, embedding=3.0, vectors=2.0)
    settings = {f"radius_{kind}": radius for kind, radius in radii.items()}
    precise = dict(ns_dtype=torch.float64, ns_coefficients="quintic", input_names=["up.weight"])
    optimizer = distmuon.Scion(model, 0.004, 0.9, constrained=constrained, **settings, **precise)
    rules = kinds(model, tied=tied, **radii)
    drawn = {name: gradients(weight.shape, seed=len(name)) for name, weight in weights.items()}
    for step in range(STEPS):
        for name, param in model.named_parameters():
            param.grad = drawn[name][step].clone()
        optimizer.step()
        for name, weight in weights.items():
            averages[name] = 0.9 * averages[name] + 0.1 * drawn[name][step]
            rule, radius = rules[name]
            decayed = (1 - 0.004) * weight if constrained else weight
            weights[name] = decayed - 0.004 * radius * rule(averages[name])
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param.detach(), weights[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_constrained_weights_stay_in_their_ball():
    """Signs on the embedding: no element leaves the radius over its inputs, once inside."""
    model = model_of(tied=True)
    optimizer = distmuon.Scion(model, 0.3, radius_rest=6.0)
    with torch.no_grad():
        model.embed.weight.clamp_(-1.0, 1.0)
    for step in range(30):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert model.embed.weight.abs().max() <= 1.0 + 1e-12, step
    assert model.embed.weight.abs().max() > 0.99


def test_defaults_and_what_is_an_input_or_a_head():
    model = model_of()
    rows = {row.name: row for row in distmuon.Scion(model, 0.01).report().rows}
    assert rows["embed.weight"].algorithm == "col_norm" and rows["embed.weight"].lr == pytest.approx(0.01 * 50 / 3)
    assert rows["head.weight"].algorithm == "sign" and rows["head.weight"].lr == pytest.approx(0.01 * 3000)
    assert rows["norm.weight"].algorithm == "bias_rms" and rows["norm.weight"].lr == pytest.approx(0.01 * 50)
    assert rows["gate.weight"].algorithm == "row_norm" and rows["mix.weight"].algorithm == "row_norm"
    assert rows["down.weight"].lr == pytest.approx(0.01 * 50 / 2**0.5) and rows["head.weight"].reason == "output head"
    named = distmuon.Scion(model, 0.01, head_names=["embed*"], adamw_names=["gate*"], adamw_lr=0.5)
    rows = {row.name: row for row in named.report().rows}
    assert rows["embed.weight"].algorithm == "sign"
    assert (rows["gate.weight"].algorithm, rows["gate.weight"].lr) == ("adamw", 0.5)
    assert "sign: 2 parameters" in str(named.report())


def test_what_scion_refuses():
    model = model_of()
    with pytest.raises(TypeError, match="takes the model itself, not a list"):
        distmuon.Scion(list(model.named_parameters()))
    for settings, error, message in (
        (dict(radius_rest=0), ValueError, r"radius_rest=0: it must be above 0"),
        (dict(radius_vectors=float("nan")), ValueError, r"radius_vectors=nan: it must be above 0"),
        (dict(radius_hidden="50"), TypeError, r"radius_hidden='50' \(a str\): it takes a number"),
        (dict(lr="1e-3"), TypeError, r"lr='1e-3' \(a str\): it takes a number"),
        (dict(head_names="embed*"), TypeError, r"head_names='embed\*' is a single string: it takes a list of globs"),
        (dict(weight_decay=0.1), ValueError, r"weight_decay=0.1: the decay of Scion is one over the radius"),
    ):
        with pytest.raises(error, match=message):
            distmuon.Scion(model, **settings)
    with pytest.raises(ValueError, match=r"the glob 'nothing\*' matches no parameter"):
        distmuon.Scion(model, input_names=["nothing*"])


def train(model, optimizer, steps):
    for step in steps:
        for number, param in enumerate(model.parameters()):
            param.grad = gradients(param.shape, 1, seed=100 * step + number)[0].to(param.dtype)
        optimizer.step()
    optimizer.zero_grad()


def test_state_goes_to_a_new_scion_and_to_groups_by_hand():
    model = model_of()
    optimizer = distmuon.Scion(model, 0.01)
    train(model, optimizer, range(3))
    by_preset, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    other = distmuon.Scion(by_preset, 0.5, momentum=0.1)
    keys = ("use_muon", "lmo", "transposed", "flatten", "adjust_lr_fn")
    params = dict(by_hand.named_parameters())
    groups = [
        {"params": [(n, params[n]) for n in group["param_names"]], "lr": 1.0, **{key: group[key] for key in keys}}
        for group in optimizer.param_groups
    ]
    manual = distmuon.Muon(groups)
    saved = copy.deepcopy(optimizer.state_dict())
    for each, there in ((optimizer, model), (other, by_preset), (manual, by_hand)):
        if each is not optimizer:
            each.load_state_dict(copy.deepcopy(saved))
        train(there, each, range(3, 6))
    for name, param in model.named_parameters():
        assert torch.equal(param, dict(by_preset.named_parameters())[name]), name
        assert torch.equal(param, dict(by_hand.named_parameters())[name]), name


# --- settings, state and what else goes by them


def lmo_and_adamw(lmo="sign"):
    """A model's matrices on Muon, its embedding with an lmo or on AdamW."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "up": nn.Linear(4, 6, bias=False)})
    named = dict(model.named_parameters())
    rest = {"params": [("embed.weight", named["embed.weight"])], "use_muon": False, "lr": 0.1, "lmo": lmo}
    return model, distmuon.Muon([{"params": [("up.weight", named["up.weight"])], "use_muon": True}, rest])


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("was", "now"), [("sign", None), (None, "sign")])
def test_moving_between_adamw_and_an_lmo_is_told(was, now, named):
    model, optimizer = lmo_and_adamw(was)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    if not named:
        for group in saved["param_groups"]:
            del group["param_names"]
    _, other = lmo_and_adamw(now)
    on = {"sign": "lmo", None: "AdamW"}
    with pytest.raises(ValueError, match=f"on {on[was]} and is on {on[now]} now"):
        other.load_state_dict(saved)
    with reset_changed(), pytest.warns(UserWarning, match="start without state"):
        other.load_state_dict(saved)
    assert [group["lmo"] for group in other.param_groups] == [None, now]
    (embedding,) = other.param_groups[1]["params"]
    assert not other.state.get(embedding)


def test_another_lmo_is_kept_with_a_warning():
    model, optimizer = lmo_and_adamw("sign")
    train(model, optimizer, range(2))
    other_model, other = lmo_and_adamw("col_norm")
    with pytest.warns(UserWarning, match="group 1 was saved with lmo='sign' and keeps its own lmo='col_norm'"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[1]["lmo"] == "col_norm"
    kept = other.state[other_model["embed"].weight]["momentum_buffer"]
    assert torch.equal(kept, optimizer.state[model["embed"].weight]["momentum_buffer"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_state_of_another_kind_is_refused_by_the_step():
    model, optimizer = lmo_and_adamw("sign")
    train(model, optimizer, range(1))
    optimizer.param_groups[1]["lmo"] = None
    with pytest.raises(ValueError, match=r"state of parameter 'embed.weight' lacks exp_avg, exp_avg_sq, step"):
        train(model, optimizer, range(1))


def test_the_dummy_step_makes_state_and_nothing_else():
    model, optimizer = lmo_and_adamw("bias_rms")
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
        assert list(optimizer.state[param]) == ["momentum_buffer"]
        assert not optimizer.state[param]["momentum_buffer"].any()
    _, other = lmo_and_adamw("bias_rms")
    other.complete_state()
    assert all(list(kept) == ["momentum_buffer"] for kept in other.state.values()) and len(other.state) == 2


def test_routes_and_reports_tell_the_rule():
    _, optimizer = lmo_and_adamw("sign")
    assert routing_table(optimizer)["embed.weight"] == {"on": "lmo", "shape": [9, 4]}
    assert [row.algorithm for row in optimizer.report().rows] == ["muon", "sign"]
    assert optimizer.effective_lr("embed.weight") == 0.1


def test_other_projects_cannot_take_it():
    model, optimizer = lmo_and_adamw("sign")
    train(model, optimizer, range(1))
    with pytest.raises(
        ValueError, match=r"parameter 'embed.weight' has lmo='sign', and torch updates what is no matrix"
    ):
        convert(optimizer.state_dict(), target="torch")
    again = convert(optimizer.state_dict(), target="distmuon")
    _, other = lmo_and_adamw("sign")
    other.load_state_dict(again)
    assert torch.equal(
        other.state[other.param_groups[1]["params"][0]]["momentum_buffer"],
        optimizer.state[model["embed"].weight]["momentum_buffer"],
    )
    model, optimizer = lmo_and_adamw(None)
    optimizer.param_groups[1]["cautious_wd"] = True
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match=r"parameter 'embed.weight' has cautious_wd=True, and moonlight updates"):
        convert(optimizer.state_dict(), target="moonlight")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (dict(lmo="sign"), "has lmo='sign' and no learning rate"),
        (dict(lmo="col_norm", lr=1.0, shape=(4,)), "has 1 axes, and lmo='col_norm' is of matrices"),
        (
            dict(lmo="row_norm", lr=1.0, shape=(4, 2, 3, 3)),
            "has 4 axes, and lmo='row_norm' is of matrices: set flatten",
        ),
        (dict(lmo="sign", lr=1.0, num_heads=2), "has lmo='sign' and num_heads=2, which is for matrices on Muon"),
    ],
)
def test_groups_that_mean_nothing(group, message):
    group = {"shape": (4, 4), **group}
    with pytest.raises(ValueError, match=message):
        beside_a_matrix({"params": [nn.Parameter(torch.randn(group.pop("shape")))], **group})


def test_cycled_momentum_reaches_lmo_groups():
    model, optimizer = lmo_and_adamw("sign")
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, base_momentum=0.6, max_momentum=0.8)
    train(model, optimizer, range(1))
    assert optimizer.param_groups[1]["momentum"] == 0.8
