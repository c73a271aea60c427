"""Suggested and effective learning rates, against the updates that they lead to."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import distmuon

SCALES = ("original", "match_rms_adamw", "spectral", "none")
# converges to the polar factor, so that singular values of an update are the rate itself
EXACT = {"ns_coefficients": (15 / 8, -10 / 8, 3 / 8), "ns_steps": 25, "ns_dtype": torch.float32, "weight_decay": 0.0}


class Model(nn.Module):
    """Shapes of all kinds: wide, tall and square, a convolution, a stack of experts, and what AdamW takes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.square = nn.Linear(24, 24, bias=False)
        self.tall = nn.Linear(24, 72)
        self.wide = nn.Linear(72, 24, bias=False)
        self.conv = nn.Conv1d(24, 48, 3, bias=False)
        self.experts = nn.Parameter(torch.empty(3, 24, 36))
        self.head = nn.Linear(24, 20, bias=False)


def with_noise(params, seed):
    for param in params:
        generator = torch.Generator().manual_seed(seed)
        seed += 1
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def moved(optimizer, named, steps):
    """The last update of each parameter after steps on noise, without decay."""
    for step in range(steps):
        before = {name: param.detach().clone() for name, param in named.items()}
        with_noise(named.values(), 100 * step)
        optimizer.step()
    return {name: param.detach() - before[name] for name, param in named.items()}


def rms(values):
    return values.square().mean().sqrt().item()


@pytest.mark.parametrize("scale", SCALES)
def test_the_effective_rate_is_the_size_of_the_update(scale):
    model = Model()
    nn.init.zeros_(model.experts)
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=0.003, adjust_lr_fn=scale, adamw_eps=0.0, **EXACT)
    named = dict(model.named_parameters())
    updates = moved(optimizer, named, 1)
    for name, param in named.items():
        rate = optimizer.effective_lr(param)
        if name in ("embed.weight", "tall.bias", "head.weight"):
            # the first step of Adam is one of signs
            assert rate == 0.003 and torch.allclose(updates[name].abs(), torch.full_like(param, rate), rtol=1e-3)
            continue
        matrices = updates[name].flatten(1) if name == "conv.weight" else updates[name]
        singular = torch.linalg.svdvals(matrices)
        assert torch.allclose(singular, torch.full_like(singular, rate), rtol=1e-3), name
        assert rms(matrices) == pytest.approx(rate / math.sqrt(max(matrices.shape[-2:])), rel=1e-3), name
    shown = {row.name: row.lr for row in optimizer.report().rows}
    assert shown == {name: optimizer.effective_lr(name) for name in named}


def test_the_effective_rate_follows_schedulers_groups_and_loaded_state():
    model = Model()
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=0.003)
    before = optimizer.effective_lr("tall.weight"), optimizer.effective_lr("head.weight")
    assert before == (0.02 * math.sqrt(3), 0.003)
    state = optimizer.state_dict()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    assert optimizer.effective_lr("tall.weight") == before[0] / 4
    assert optimizer.effective_lr(model.head.weight) == before[1] / 4
    assert scheduler.get_last_lr()[0] == 0.005
    extra = {"params": [("extra", nn.Parameter(torch.randn(4, 9)))], "use_muon": True}
    optimizer.add_param_group({**extra, "lr": torch.tensor(0.5), "adjust_lr_fn": "spectral"})
    assert optimizer.effective_lr("extra") == pytest.approx(0.5 * 2 / 3)
    fresh = distmuon.Muon(model, lr=1.0, adamw_lr=1.0)
    fresh.load_state_dict(state)
    assert fresh.effective_lr("tall.weight") == before[0]
    compiled = torch.compile(model)  # never run: wrappers put prefixes into names
    wrapped = distmuon.Muon(compiled, lr=0.02, adamw_lr=0.003)
    assert wrapped.effective_lr("_orig_mod.tall.weight") == wrapped.effective_lr("tall.weight") == before[0]


def test_a_parameter_that_is_not_there_is_named():
    optimizer = distmuon.Muon(Model(), lr=0.02, adamw_lr=0.003)
    with pytest.raises(ValueError, match=r"no parameter 'tall.wait': did you mean 'tall.weight'\?"):
        optimizer.effective_lr("tall.wait")
    with pytest.raises(ValueError, match=r"no parameter 'xyzzy': names look like .*weight"):
        optimizer.effective_lr("xyzzy")
    with pytest.raises(ValueError, match="the parameter of shape 2 x 3 is not in this optimizer"):
        optimizer.effective_lr(nn.Parameter(torch.ones(2, 3)))
    with pytest.raises(TypeError, match="takes a parameter or its name, not int"):
        optimizer.effective_lr(3)


def test_adamws_update_has_the_size_that_is_taken_for_it():
    params = {"w": nn.Parameter(torch.zeros(200, 200))}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    # on noise sqrt((1 - beta1) / (1 + beta1)), 0.229; more where gradients agree
    assert rms(moved(optimizer, params, 100)["w"]) / 1e-3 == pytest.approx(0.229, rel=0.1)


@pytest.mark.parametrize("scale", SCALES)
def test_updates_at_suggested_rates_are_as_large_as_adamws(scale):
    model = Model()
    nn.init.zeros_(model.experts)
    found = distmuon.suggest_lr(model, adamw_lr=2e-3, weight_decay=0.1, adjust_lr_fn=scale)
    assert found.adjust_lr_fn == scale and found.adamw_lr == 2e-3 and found.adamw_weight_decay == 0.1
    assert found.lr * found.weight_decay == pytest.approx(2e-3 * 0.1)
    sizes = {(shape.rows, shape.cols): shape for shape in found.shapes}
    assert {shape: rate.count for shape, rate in sizes.items()} == {
        **{(24, 24): 1, (72, 24): 1, (24, 72): 1, (48, 72): 1, (24, 36): 3}
    }
    # each shape with its own rate: what the table promises
    groups = []
    for name, param in model.named_parameters():
        if name in ("square.weight", "tall.weight", "wide.weight", "conv.weight", "experts"):
            flatten = name == "conv.weight"
            lr = sizes[(param.flatten(1) if flatten else param).shape[-2:]].lr
            groups.append({"params": [(name, param)], "use_muon": True, "flatten": flatten, "lr": lr})
    named = {name: param for group in groups for name, param in group["params"]}
    optimizer = distmuon.Muon(groups, adjust_lr_fn=scale, **EXACT)
    for name, update in moved(optimizer, named, 2).items():
        assert rms(update) == pytest.approx(0.2 * 2e-3, rel=2e-3), name
    # and the one rate: the median over elements
    below, above = (
        sum(shape.numel for shape in found.shapes if keep(shape.lr)) for keep in (found.lr.__gt__, found.lr.__lt__)
    )
    total = sum(shape.numel for shape in found.shapes)
    assert below <= total / 2 and above <= total / 2
    assert distmuon.Muon(model, **found.arguments()).effective_lr("head.weight") == 2e-3


def test_with_match_rms_adamw_the_rate_and_the_decay_are_adamws_bit_for_bit():
    with torch.device("meta"):
        model = Model()
    found = distmuon.suggest_lr(model, adamw_lr=3e-4, weight_decay=0.07)
    assert found.arguments() == {
        "lr": 3e-4,
        "adamw_lr": 3e-4,
        "adjust_lr_fn": "match_rms_adamw",
        "weight_decay": 0.07,
        "adamw_weight_decay": 0.07,
    }
    assert "one rate and one decay serve both" in str(found)


def test_the_suggestion_says_what_depends_on_the_shape():
    with torch.device("meta"):
        model = Model()
    # Jordan's scale needs a rate by the inputs of a matrix alone
    found = distmuon.suggest_lr(model, adamw_lr=1e-3, adjust_lr_fn="shape_scaling")
    assert all(shape.lr == pytest.approx(0.2e-3 * math.sqrt(shape.cols)) for shape in found.shapes)
    lines = str(found).splitlines()
    assert lines[0].startswith("distmuon.Muon(model, lr=0.001697, adamw_lr=0.001, adjust_lr_fn='original', ")
    assert lines[4].split() == ["1", "of", "48", "x", "72", "3,456", "0.001697", "1.00"]
    assert "from 0.0009798 to 0.001697 in this model" in lines[-1]
    only = distmuon.suggest_lr(model, adamw_lr=1e-3, adjust_lr_fn="none", adamw_names=["[!s]*"])
    assert [(shape.rows, shape.cols) for shape in only.shapes] == [(24, 24)] and "share one" in only.reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adamw_lr": 0.0}, "adamw_lr=0.0: give the learning rate of an AdamW run"),
        ({"adamw_lr": math.nan}, "adamw_lr=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: it must be 0 or more"),
        ({"adjust_lr_fn": "muP"}, "adjust_lr_fn='muP' is unknown"),
        ({"adamw_names": ["*"]}, "no parameter goes to Muon"),
    ],
)
def test_what_cannot_be_suggested(changes, message):
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        distmuon.suggest_lr(model, **{"adamw_lr": 1e-3, **changes})


@pytest.mark.parametrize("value", ["1e-3", torch.tensor(1e-3), None])
def test_rates_that_are_suggested_from_are_numbers(value):
    with pytest.raises(TypeError, match=r"adamw_lr=.* it takes a number"):
        distmuon.suggest_lr(Model(), adamw_lr=value)


def test_the_table_of_the_page():
    shapes = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
    with torch.device("meta"):
        matrices = [nn.Parameter(torch.empty(shape)) for _ in range(16) for shape in shapes]
    named = [(f"layers.{number}.weight", matrix) for number, matrix in enumerate(matrices)]
    found = str(distmuon.suggest_lr(named, adamw_lr=3e-4, weight_decay=0.1, adjust_lr_fn="original"))
    table = found.rpartition("\n\n")[0]
    page = (Path(__file__).parent.parent / "docs/learning_rates.md").read_text(encoding="utf-8")
    assert f"```\n{table}\n```" in page
