"""distmuon.wrap: matrices train as by torch.optim.Muon, the rest as by the optimizer that was there."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import distmuon

# The operations of torch.optim.Muon in their order, so that updates are its own to the bit
AS_TORCH = {"foreach": False, "ns_coefficients": "quintic"}


class Net(nn.Module):
    def __init__(self, vocabulary=64):
        super().__init__()
        # 4096 elements, from which on the 8-bit optimizers keep 8 bits
        self.embedding = nn.Embedding(vocabulary, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


MATRICES = ("up.weight", "down.weight")


def make_model(seed=0):
    torch.manual_seed(seed)
    return Net()


def decayed_groups(model):
    """What most scripts have: matrices decay, vectors do not."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def lion(groups):
    return pytest.importorskip("lion_pytorch").Lion(groups, lr=1e-3)


def eight_bit(kind):
    # its 8-bit kernels have a version for CPUs
    return lambda groups: getattr(pytest.importorskip("bitsandbytes").optim, kind)(groups, lr=1e-3)


INNER = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-3), foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-3),
    "lion": lion,
    "adamw8bit": eight_bit("AdamW8bit"),
    "lion8bit": eight_bit("Lion8bit"),
}
ADAMS = ("adamw", "fused", "tensor lr", "adamw8bit")


def wrapped(model, kind="adamw", groups=None, **options):
    optimizer = INNER[kind](decayed_groups(model) if groups is None else groups)
    return distmuon.wrap(model, optimizer, **({} if kind in ADAMS else {"lr": 1e-3}), **AS_TORCH, **options)


def by_hand(model, kind="adamw"):
    """Two optimizers: that of torch for the matrices, and the other for what is left of the groups."""
    named = dict(model.named_parameters())
    matrices = [named[name] for name in MATRICES]
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    moved = set(map(id, matrices))
    rest = [{**g, "params": [p for p in g["params"] if id(p) not in moved]} for g in decayed_groups(model)]
    return [muon, INNER[kind](rest)]


def backward(model, step):
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(tokens[0]), tokens[1])
    loss.backward()
    return loss


def train(model, optimizers, steps, schedulers=()):
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, step)
        for item in (*optimizers, *schedulers):
            item.step()


def assert_same(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def half(step):
    return 0.5**step


@pytest.mark.parametrize("kind", INNER)
def test_parts_train_as_two_optimizers_would(kind):
    model, twin = make_model(), make_model()
    optimizer, hand = wrapped(model, kind), by_hand(twin, kind)
    scheduler, others = LambdaLR(optimizer, half), [LambdaLR(other, half) for other in hand]
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, [optimizer], range(3), [scheduler])
    train(twin, hand, range(3), others)
    assert_same(model, twin)

    # a fresh one goes on from its state dict, 8-bit state and all
    resumed = copy.deepcopy(model)
    fresh = wrapped(resumed, kind)
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    train(resumed, [fresh], range(3, 6), [])
    train(twin, hand, range(3, 6), [])
    assert_same(resumed, twin)
    if kind.endswith("8bit"):
        assert fresh.state[resumed.embedding.weight]["state1"].dtype == torch.uint8


def test_settings_of_each_group_hold():
    model = make_model()
    groups = [
        {"params": [model.up.weight, model.up.bias], "lr": 1e-3, "weight_decay": 0.3, "name": "first"},
        {"params": [model.down.weight, model.down.bias], "lr": 2e-3},
        {"params": [*model.embedding.parameters(), *model.norm.parameters(), *model.head.parameters()]},
    ]
    optimizer = distmuon.wrap(model, torch.optim.AdamW(copy.copy(groups), lr=5e-3), momentum=0.9)
    told = [(g["lr"], g["weight_decay"], g.get("name"), len(g["params"])) for g in optimizer.param_groups]
    assert told == [
        (1e-3, 0.3, "first", 1),
        (2e-3, 0.01, "muon", 1),
        (1e-3, 0.3, "first", 1),
        (2e-3, 0.01, None, 1),
        (5e-3, 0.01, None, 4),
    ]
    assert [g["momentum"] for g in optimizer.muon.param_groups] == [0.9, 0.9]
    assert optimizer.effective_lr("up.weight") == pytest.approx(1e-3 * 0.2 * 96**0.5)
    assert optimizer.effective_lr(model.down.bias) == optimizer.effective_lr("down.bias") == 2e-3

    model = make_model()
    rate = torch.tensor(0.01)
    first, second = distmuon.wrap(model, torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)).param_groups
    first["lr"].fill_(0.5)  # as schedulers do
    assert (first["lr"].item(), second["lr"].item()) == pytest.approx((0.5, 0.01))

    model = make_model()
    optimizer = distmuon.wrap(
        model, torch.optim.AdamW(model.parameters()), lr=0.02, weight_decay=0.5, adjust_lr_fn=None
    )
    (group,) = optimizer.muon.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.5)


def test_rates_that_are_not_those_of_adamw_are_asked_for():
    model = make_model()
    with pytest.raises(ValueError, match=r"learning rate of SGD is not one of AdamW.*pass lr"):
        distmuon.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"adjust_lr_fn='original'.*pass lr"):
        distmuon.wrap(model, torch.optim.AdamW(model.parameters()), adjust_lr_fn="original")
    with pytest.raises(TypeError, match=r"adamw_lr would be of AdamW.*set them in the optimizer"):
        distmuon.wrap(model, torch.optim.AdamW(model.parameters()), adamw_lr=1e-3)


class Copied(torch.optim.AdamW):
    """Keeps its parameters once more, as some optimizers do."""

    def __init__(self, params):
        super().__init__(params)
        self.flat = [param for group in self.param_groups for param in group["params"]]


class AcceleratedOptimizer(torch.optim.AdamW):
    """Of the name of accelerate's."""


class ZeroRedundancyOptimizer(torch.optim.AdamW):
    """Of the name of torch's."""


class MuonWithAuxAdam(torch.optim.AdamW):
    """Of the name of Keller Jordan's."""


REFUSED = [
    (lambda m: torch.optim.LBFGS(m.parameters()), TypeError, "LBFGS cannot be wrapped.*all parameters together"),
    (lambda m: Copied(m.parameters()), TypeError, "keeps its parameters in 'flat' too"),
    (lambda m: AcceleratedOptimizer(m.parameters()), TypeError, "wrap the optimizer before accelerator.prepare"),
    (lambda m: ZeroRedundancyOptimizer(m.parameters()), TypeError, "parameters of other ranks.*fully_shard"),
    (lambda m: distmuon.Muon(m, lr=0.02, adamw_lr=1e-3), ValueError, "Muon already.*distmuon.checkpoint.convert"),
    (lambda m: MuonWithAuxAdam(m.parameters()), ValueError, "Muon already"),
    (wrapped, ValueError, "wrapped already.*distmuon.unwrap"),
    (lambda m: torch.optim.AdamW(make_model().parameters()), ValueError, "none of the 8 parameters.*fully_shard"),
    (lambda m: torch.optim.AdamW(m.norm.parameters()), ValueError, "no parameter of this AdamW goes to Muon"),
    (lambda m: m.parameters(), TypeError, "takes a torch.optim.Optimizer, and this is a generator"),
]


@pytest.mark.parametrize("make, kind, message", REFUSED)
def test_what_cannot_be_wrapped_is_told_and_left_alone(make, kind, message):
    model = make_model()
    optimizer = make(model)
    before = [list(group["params"]) for group in getattr(optimizer, "param_groups", [])]
    with pytest.raises(kind, match=message):
        distmuon.wrap(model, optimizer)
    for params, group in zip(before, getattr(optimizer, "param_groups", []), strict=True):
        assert all(a is b for a, b in zip(params, group["params"], strict=True))


def test_a_scheduler_is_made_of_the_wrapped_optimizer():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    LambdaLR(optimizer, half)
    with pytest.raises(ValueError, match=r"scheduler.*call distmuon\.wrap first"):
        distmuon.wrap(model, optimizer)


def test_a_refused_option_changes_nothing():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, [optimizer], range(1))
    with pytest.raises(TypeError, match="no_such_option"):
        distmuon.wrap(model, optimizer, no_such_option=1)
    assert len(optimizer.param_groups[0]["params"]) == len(optimizer.state) == 8


def test_state_of_what_stays_is_kept_and_the_dropped_is_told(caplog):
    model = make_model()
    optimizer = torch.optim.AdamW(decayed_groups(model))
    train(model, [optimizer], range(2))
    kept = {param: dict(state) for param, state in optimizer.state.items()}
    with caplog.at_level(logging.WARNING, "distmuon"):
        both = distmuon.wrap(model, optimizer)
    assert "AdamW's state of parameters (2: up.weight, down.weight) is dropped" in caplog.text
    assert len(both.state) == 6
    for param, state in both.state.items():
        assert state["exp_avg"] is kept[param]["exp_avg"]
    # what torch restores by is complete, though no step of Muon was made
    both.zero_grad()
    assert "momentum_buffer" in get_optimizer_state_dict(model, both)["state"]["up.weight"]


@pytest.mark.parametrize("named", [False, True])
def test_unwrap_puts_everything_back(named):
    model = make_model()
    listed = list(model.named_parameters())
    split = [[1, 3], [0, 2, 4, 5, 6, 7]]  # nothing but matrices in the first
    groups = [{"params": [listed[i] if named else listed[i][1] for i in places]} for places in split]
    groups[0]["betas"] = (0.8, 0.99)
    original = torch.optim.AdamW(groups, lr=1e-3)
    settings = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in original.param_groups]
    dicts = list(original.param_groups)
    optimizer = distmuon.wrap(model, original)
    assert len(original.param_groups) == 1 and len(optimizer.param_groups) == 2
    train(model, [optimizer], range(2), [LambdaLR(optimizer, half)])
    returned = distmuon.unwrap(optimizer)
    assert returned is original and all(a is b for a, b in zip(returned.param_groups, dicts, strict=True))
    for group, old, places in zip(returned.param_groups, settings, split, strict=True):
        assert {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")} == old
        assert [id(param) for param in group["params"]] == [id(listed[i][1]) for i in places]
        assert group["lr"] == 1e-3 / 4  # as scheduled, in the group that was left out too
    assert len(returned.state) == 6 and model.up.weight not in returned.state
    train(model, [returned], range(2, 4))
    assert len(returned.state) == 8
    with pytest.raises(RuntimeError, match=r"taken apart by distmuon\.unwrap"):
        optimizer.step()
    with pytest.raises(TypeError, match="this is a AdamW"):
        distmuon.unwrap(returned)


def test_the_optimizer_inside_does_not_step_alone():
    model = make_model()
    original = torch.optim.AdamW(model.parameters())
    optimizer = distmuon.wrap(model, original)
    with pytest.raises(RuntimeError, match=r"this AdamW was wrapped.*optimizer = distmuon\.wrap\(model, optimizer\)"):
        train(model, [original], range(1))
    train(model, [optimizer], range(1))
    with pytest.raises(RuntimeError, match="this AdamW was wrapped"):
        original.step()
    train(model, [distmuon.unwrap(optimizer)], range(1))


def test_arguments_in_the_wrong_order_are_told():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"takes a torch\.optim\.Optimizer, and this is a"):
        distmuon.wrap(optimizer, model)
    with pytest.raises(TypeError, match="takes the model first and its optimizer second, not a generator"):
        distmuon.wrap(model.parameters(), optimizer)


def test_an_optimizer_of_nothing_but_matrices():
    model = make_model()
    optimizer = distmuon.wrap(model, torch.optim.AdamW([model.up.weight, model.down.weight], lr=1e-3), **AS_TORCH)
    twin = make_model()
    muon = torch.optim.Muon(
        [twin.up.weight, twin.down.weight], lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    for net, opt in ((model, optimizer), (twin, muon)):
        train(net, [opt], range(2))
    assert_same(model, twin)
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    assert len(distmuon.unwrap(optimizer).param_groups[0]["params"]) == 2


def test_what_is_left_alone_is_in_the_report():
    model = make_model()
    model.norm.weight.requires_grad_(False)
    model.head.weight = model.embedding.weight
    foreign = nn.Parameter(torch.ones(3, 3))
    params = [p for p in model.parameters() if p is not model.down.weight]
    optimizer = distmuon.wrap(model, torch.optim.AdamW([*params, foreign], lr=1e-3))
    report = optimizer.report()
    rows = {row.name: row for row in report.rows}
    assert (rows["up.weight"].algorithm, rows["up.weight"].reason) == ("muon", "hidden matrix")
    assert (rows["embedding.weight"].algorithm, rows["embedding.weight"].reason) == ("AdamW", "embedding (tied)")
    assert rows["group 0, parameter 5"].reason == "not of the model"
    assert report.summary.startswith("muon: 1 parameters, 6,144 elements; AdamW: 6 parameters, ")
    assert "1 parameters of the optimizer are not the model's, and stay in it." in report.notes
    assert "Matrices that the optimizer does not have (1: down.weight) are left alone." in report.notes
    before, frozen = model.down.weight.clone(), model.norm.weight.clone()
    train(model, [optimizer], range(2))
    assert torch.equal(model.down.weight, before) and torch.equal(model.norm.weight, frozen)


def test_globs_choose():
    model = make_model()
    with pytest.warns(UserWarning, match="output head") as warned:
        optimizer = distmuon.wrap(
            model, torch.optim.AdamW(model.parameters()), muon_names=["head.weight"], adamw_names=["up.*"]
        )
    assert len(warned) == 1
    assert optimizer.muon.param_groups[0]["param_names"] == ["down.weight", "head.weight"]


def test_matrices_inside_of_parameters_are_declared_as_to_muon():
    matrices = {"up.weight": {"split_sizes": (64, 32)}}
    model, twin = make_model(), make_model()
    optimizer = distmuon.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-3), matrices=matrices)
    reference = distmuon.Muon(
        twin,
        lr=1e-3,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
        adamw_betas=(0.9, 0.999),
        matrices=matrices,
    )
    assert sorted(g["split_sizes"] or () for g in optimizer.muon.param_groups) == [(), (64, 32)]
    for net, opt in ((model, optimizer), (twin, reference)):
        train(net, [opt], range(2))
    assert_same(model, twin)


def test_state_dicts_go_between_wrap_and_muon():
    """Where the rest is torch.optim.AdamW, the two are one optimizer."""
    keywords = {"lr": 1e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", **AS_TORCH}
    # as torch.optim.AdamW has them by default
    adamw = {"adamw_betas": (0.9, 0.999), "adamw_weight_decay": 0.1}
    start, model, twin = make_model(), make_model(), make_model()
    first = distmuon.Muon(start, **keywords, **adamw)
    train(start, [first], range(2))
    model.load_state_dict(start.state_dict())
    optimizer = distmuon.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1), **AS_TORCH)
    optimizer.load_state_dict(through_file(first.state_dict()))
    assert optimizer.inner.param_groups[0].keys() == torch.optim.AdamW(make_model().parameters()).param_groups[0].keys()
    for net, opt in ((start, first), (model, optimizer)):
        train(net, [opt], range(2, 4))
    assert_same(start, model)

    twin.load_state_dict(model.state_dict())
    second = distmuon.Muon(twin, **keywords, **adamw)
    second.load_state_dict(through_file(optimizer.state_dict()))
    for net, opt in ((model, optimizer), (twin, second)):
        train(net, [opt], range(4, 6))
    assert_same(model, twin)


def test_loading_what_does_not_fit_is_told_and_changes_nothing():
    model = make_model()
    optimizer = wrapped(model)
    train(model, [optimizer], range(2))
    before = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.AdamW(decayed_groups(make_model()))
    with pytest.raises(ValueError, match=r"no groups of Muon.*before distmuon\.wrap"):
        optimizer.load_state_dict({**plain.state_dict(), "param_groups": plain.state_dict()["param_groups"][:1]})
    with pytest.raises(ValueError, match="'state' and 'param_groups'"):
        optimizer.load_state_dict({"model": {}})
    other = make_model()
    moved = wrapped(other, adamw_names=["up.weight"])
    train(other, [moved], range(1))
    with pytest.raises(ValueError, match=r"'up\.weight' is new"):
        optimizer.load_state_dict(moved.state_dict())
    assert str(optimizer.state_dict()) == str(before)
    with pytest.warns(UserWarning, match="'up.weight'"):
        optimizer.load_state_dict(moved.state_dict(), changed="reset")
    assert model.up.weight not in optimizer.state or not optimizer.state[model.up.weight]
    assert torch.equal(
        optimizer.state[model.down.weight]["momentum_buffer"], moved.state[other.down.weight]["momentum_buffer"]
    )
    assert torch.equal(optimizer.state[model.norm.bias]["exp_avg"], moved.state[other.norm.bias]["exp_avg"])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_distributed_checkpoints_name_everything(kind, flat):
    """Into a fresh optimizer, by the dummy step that torch takes, and into one that has state."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = make_model()
    optimizer = wrapped(model, kind)
    train(model, [optimizer], range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    for trained in (0, 1):
        twin = make_model(1)
        restored = wrapped(twin, kind)
        train(twin, [restored], range(trained))
        restored.zero_grad()
        twin.load_state_dict(model.state_dict())
        set_optimizer_state_dict(twin, restored, copy.deepcopy(saved), options=options)
        assert_same(model, twin)
        reference, original = copy.deepcopy((model, optimizer))
        train(reference, [original], range(2, 4))
        train(twin, [restored], range(2, 4))
        assert_same(reference, twin)


@pytest.mark.parametrize("name", ["embedding.weight", "up.weight"])
def test_a_gradient_that_is_not_finite_counts_wherever_it_is(name, caplog):
    for policy in ("skip", "raise"):
        model = make_model()
        optimizer = wrapped(model, on_nonfinite=policy)
        train(model, [optimizer], range(1))
        before = copy.deepcopy(model)
        backward(model, 1)
        dict(model.named_parameters())[name].grad[0, 0] = float("nan")
        if policy == "raise":
            with pytest.raises(FloatingPointError, match=name):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1 and name in caplog.text
        assert_same(model, before)
        assert optimizer.state[model.embedding.weight]["step"] == 1


def test_hooks_are_called_once():
    model, calls = make_model(), []
    optimizer = wrapped(model)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("before", opt)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(("after", opt)))
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append(("saving", opt)))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "extra": len(state["param_groups"])})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: state if state.pop("extra") == 3 else None)
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append(("loaded", opt)))
    train(model, [optimizer], range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [(word, optimizer) for word in ("before", "after", "saving", "loaded")]


def test_closures_clipping_scaling_and_both_ways_to_zero():
    model, twin = make_model(), make_model()
    optimizer, hand = wrapped(model), by_hand(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(backward_loss(model, step)).backward()
        scaler.unscale_(optimizer)
        distmuon.clip_grad_norm_(model, 0.1)
        scaler.step(optimizer)
        scaler.update()
        for other in hand:
            other.zero_grad()
        backward(twin, step)
        distmuon.clip_grad_norm_(twin, 0.1)
        for other in hand:
            other.step()
    assert_same(model, twin)
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    loss = optimizer.step(lambda: backward(model, 3))
    assert loss.item() > 0 and optimizer.state[model.up.bias]["step"] == 4


def backward_loss(model, step):
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens[0]), tokens[1])


def test_groups_that_are_added_are_divided_too():
    model = make_model()
    model.more = nn.Linear(64, 32)
    optimizer = distmuon.wrap(model, torch.optim.AdamW(decayed_groups(model)[:1], lr=1e-3))
    vectors = decayed_groups(model)[1]["params"]
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": vectors, "weight_decay": 0.0})
    extra = nn.Parameter(torch.ones(4, 4))
    optimizer.add_param_group({"params": [("x.weight", extra)], "use_muon": True})
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 1, 2, len(vectors)]
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer.add_param_group({"params": vectors[:1]})
    with pytest.raises(ValueError, match=r"'up\.weight' is in group 0 and again"):
        optimizer.add_param_group({"params": [model.up.weight]})
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 1, 2, len(vectors)]
    train(model, [optimizer], range(2))
    returned = distmuon.unwrap(optimizer)
    assert [len(g["params"]) for g in returned.param_groups] == [5, len(vectors), 1]


def test_an_added_group_of_matrices_moves():
    model = make_model()
    late = list(model.down.parameters())
    early = [p for p in model.parameters() if all(p is not q for q in late)]
    optimizer = distmuon.wrap(model, torch.optim.AdamW(early, lr=1e-3))
    optimizer.add_param_group({"params": late, "lr": 5e-4})
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [(1e-3, 1), (5e-4, 1), (1e-3, 5), (5e-4, 1)]
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, [optimizer], range(1))
    assert "momentum_buffer" in optimizer.state[model.down.weight]
    returned = distmuon.unwrap(optimizer)
    assert [id(param) for param in returned.param_groups[1]["params"]] == [id(param) for param in late]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_by_themselves(copied):
    model = make_model()
    optimizer = wrapped(model)
    train(model, [optimizer], range(2))
    twin, clone = copied((model, optimizer))
    train(twin, [clone], range(2, 4))
    train(model, [optimizer], range(2, 4))
    assert_same(model, twin)
    assert distmuon.unwrap(clone).param_groups[0]["params"][1] is twin.up.weight


def test_replaced_groups_are_told():
    model = make_model()
    optimizer = wrapped(model)
    optimizer.param_groups = [{**group} for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="param_groups or state of the wrapped optimizer was replaced"):
        optimizer.step()


def test_parameters_that_are_swapped_in_the_groups_are_followed():
    """As accelerate does when it prepares a model."""
    model = make_model()
    optimizer = wrapped(model)
    twin = copy.deepcopy(model)
    new = dict(zip(model.parameters(), twin.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [new[param] for param in group["params"]]
    reference = by_hand(model)
    train(model, reference, range(2))
    train(twin, [optimizer], range(2))
    assert_same(model, twin)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_cycled_momentum_is_that_of_both_parts(kind):
    model = make_model()
    optimizer = wrapped(model, kind)
    scheduler = OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    train(model, [optimizer], range(3), [scheduler])
    optimizer.step()
    momenta = {g["betas"][0] if "betas" in g else g["momentum"] for g in optimizer.inner.param_groups}
    assert momenta == {optimizer.muon.param_groups[0]["momentum"]} and momenta != {0.95}


def test_accelerate_prepares_it():
    accelerate = pytest.importorskip("accelerate")
    model, twin = make_model(), make_model()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, wrapped(model))
    train(prepared, [optimizer], range(2))
    train(twin, by_hand(twin), range(2))
    assert_same(prepared, twin)
