"""Loading into an optimizer whose parameters changed: what did is told, and nothing is lost in silence."""

import copy
import io
import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import distmuon
from distmuon.checkpoint import reset_changed

WHOLE = StateDictOptions(full_state_dict=True, strict=False)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Model(nn.Module):
    def __init__(self, width=6, middle="middle", first=()):
        super().__init__()
        layers = {"embed": nn.Embedding(9, 4), "up": nn.Linear(4, width), middle: nn.Linear(width, width)}
        layers["head"] = nn.Linear(width, 9)
        for name in [*first, *layers]:
            if name not in self._modules:
                self.add_module(name, layers[name])


def make(width=6, middle="middle", first=(), **settings):
    torch.manual_seed(0)
    model = Model(width, middle, first)
    return model, distmuon.Muon(model, **{"lr": 0.02, "adamw_lr": 1e-3, **settings})


def train(model, optimizer, steps=2):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for _, param in sorted(model.named_parameters()):
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def saved():
    """A model and an optimizer that trained."""
    model, optimizer = make(lr=0.5, momentum=0.7)
    train(model, optimizer)
    return model, optimizer


def plain(saved):
    file = io.BytesIO()
    torch.save(saved[1].state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_plain(saved, model, optimizer):
    optimizer.load_state_dict(plain(saved))


def through_dcp(saved, model, optimizer):
    """What is handed to set_optimizer_state_dict is what was saved."""
    set_optimizer_state_dict(
        model, optimizer, copy.deepcopy(get_optimizer_state_dict(*saved)), options=StateDictOptions(strict=False)
    )


def through_whole(saved, model, optimizer):
    whole = copy.deepcopy(get_optimizer_state_dict(*saved, options=WHOLE))
    set_optimizer_state_dict(model, optimizer, whole, options=WHOLE)


WAYS = [through_plain, through_dcp, through_whole]


def state_of(model, optimizer, but=()):
    """The state by name, of those parameters that have some."""
    named = model.named_parameters()
    return {name: optimizer.state[p] for name, p in named if optimizer.state.get(p) and name not in but}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, kept in expected.items():
        assert actual[name].keys() == kept.keys(), name
        for key, value in kept.items():
            assert torch.equal(actual[name][key], value), f"{key} of {name}"


def rejects(saved, way, model, optimizer, *texts):
    """Nothing is loaded, and the error has these texts."""
    groups, state = copy.deepcopy(optimizer.state_dict()["param_groups"]), copy.deepcopy(state_of(model, optimizer))
    with pytest.raises(ValueError) as caught:
        way(saved, model, optimizer)
    for text in texts:
        assert text in str(caught.value)
    if way is through_plain:
        assert optimizer.state_dict()["param_groups"] == groups
        assert_same_state(state_of(model, optimizer), state)


def resets(saved, way, model, optimizer, *changed):
    """All but the changed parameters get their state, with one warning; and training goes on."""
    before = copy.deepcopy(state_of(*saved, but=changed))
    with reset_changed(), pytest.warns(UserWarning, match="start without state") as caught:
        way(saved, model, optimizer)
    assert len(caught) == 1
    assert_same_state(state_of(model, optimizer), {k: v for k, v in before.items() if k in state_of(model, optimizer)})
    assert set(state_of(model, optimizer)) == {name for name, _ in model.named_parameters()} & set(before)
    for group in optimizer.param_groups:
        names = [name for name in group["param_names"] if name in before]
        assert not names or not group["use_muon"] or group["momentum"] == 0.7
    train(model, optimizer)
    return str(caught[0].message)


@pytest.mark.parametrize("way", WAYS)
def test_what_fits_loads_without_a_warning(saved, way):
    model, optimizer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        way(saved, model, optimizer)
    assert_same_state(state_of(model, optimizer), state_of(*saved))
    for group, old in zip(optimizer.param_groups, saved[1].param_groups, strict=True):
        assert {**group, "params": 0} == {**old, "params": 0}


@pytest.mark.parametrize("way", WAYS)
def test_frozen_parameters_need_no_state(saved, way):
    for model, _ in (saved, twin := make()):
        model.middle.weight.requires_grad_(False)
    del saved[1].state[saved[0].middle.weight]
    with warnings.catch_warnings(action="error", category=UserWarning):
        way(saved, *twin)
    assert_same_state(state_of(*twin), state_of(*saved))
    assert twin[0].middle.weight not in twin[1].state


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_that_moved_to_adamw(saved, way):
    settings = {"adamw_names": ["middle.weight"]}
    rejects(saved, way, *make(**settings), "'middle.weight' was on Muon and is on AdamW now")
    if way is through_plain:  # torch's functions do not hand over the settings of the Muon group here
        resets(saved, way, *make(**settings), "middle.weight")


@pytest.mark.parametrize("way", [through_plain, through_dcp])
def test_a_parameter_that_moved_to_muon(saved, way):
    text = "'embed.weight' was on AdamW and is on Muon now"
    with warnings.catch_warnings(action="ignore"):
        twice = [make(muon_names=["embed.weight"]) for _ in range(2)]
    rejects(saved, way, *twice[0], text)
    assert text in resets(saved, way, *twice[1], "embed.weight")


@pytest.mark.parametrize("way", WAYS)
def test_another_shape(saved, way):
    text = "'middle.weight' had shape (6, 6) and has (5, 5) now"
    rejects(saved, way, *make(width=5), text, "'head.weight' had shape (9, 6) and has (9, 5) now")
    changed = [name for name, _ in saved[0].named_parameters() if name not in ("embed.weight", "head.bias")]
    assert text in resets(saved, way, *make(width=5), *changed)


@pytest.mark.parametrize("way", [through_plain, through_dcp])
def test_another_name(saved, way):
    texts = [f"'middle.{kind}' is called 'core.{kind}' now" for kind in ("weight", "bias")]
    rejects(saved, way, *make(middle="core"), *texts)
    message = resets(saved, way, *make(middle="core"), "middle.weight", "middle.bias")
    assert all(text in message for text in texts)


def test_missing_and_new_parameters(saved):
    small = make()
    small[1].param_groups[0]["params"].pop()
    small[1].param_groups[0]["param_names"].pop()
    rejects(saved, through_plain, *small, "'middle.weight' is missing (on Muon, shape (6, 6))")
    train(*small)
    rejects(small, through_plain, *make(), "'middle.weight' is new (on Muon, shape (6, 6))")


def test_many_differences_are_counted(saved):
    model, optimizer = make()
    for group in optimizer.param_groups:
        group["param_names"] = [f"other.{name}x" for name in group["param_names"]]
        group["use_muon"] = not group["use_muon"]
    rejects(saved, through_plain, model, optimizer, "and 4 more")


def test_order_and_grouping_follow_names(saved):
    """torch goes by position, and would give each parameter the state of another of the same shape."""
    model, optimizer = make(first=["head", "up", "middle"])
    optimizer.param_groups.reverse()
    optimizer.load_state_dict(plain(saved))
    assert_same_state(state_of(model, optimizer), state_of(*saved))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5]
    assert optimizer.param_groups[1]["param_names"] == ["up.weight", "middle.weight"]


def test_other_groups_of_the_same_parameters(saved):
    def regrouped():
        model = Model()
        named = dict(model.named_parameters())
        parts = [(True, ["up.weight"]), (True, ["middle.weight"])]
        parts.append((False, [name for name in named if name not in ("up.weight", "middle.weight")]))
        groups = [{"params": [(name, named[name]) for name in names], "use_muon": on} for on, names in parts]
        return model, distmuon.Muon(groups, adamw_lr=3.0)

    rejects(saved, through_plain, *regrouped(), "2 parameter groups and the optimizer 3", "changed='reset'")
    model, optimizer = regrouped()
    with warnings.catch_warnings(action="error", category=UserWarning):
        optimizer.load_state_dict(plain(saved), changed="reset")
    assert_same_state(state_of(model, optimizer), state_of(*saved))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 1e-3]
    # and back: two groups of other settings become one, which keeps its own
    optimizer.param_groups[0]["lr"] = 0.25
    other_model, other = make()
    with pytest.warns(UserWarning, match="no saved group has the parameters of group 0, which keeps its settings"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()), changed="reset")
    assert_same_state(state_of(other_model, other), state_of(*saved))
    assert [group["lr"] for group in other.param_groups] == [0.02, 1e-3]


# --- without names


def bare(*shapes, use_muon=True):
    group = {"params": [nn.Parameter(torch.randn(shape)) for shape in shapes], "use_muon": use_muon}
    group["lr"] = 0.1
    rest = {"params": [nn.Parameter(torch.randn(3, 3))], "use_muon": True}
    optimizer = distmuon.Muon([group, rest])
    for each in optimizer.param_groups:
        for param in each["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


def test_parameters_without_names_go_by_position():
    saved = bare((4, 2), (2, 4))
    with pytest.raises(ValueError, match=re.escape("'group 0, parameter 1' had shape (2, 4) and has (4, 4) now")):
        bare((4, 2), (4, 4)).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="group 0 of the state dict has 2 parameters and that of the optimizer 1"):
        bare((4, 2)).load_state_dict(saved.state_dict(), changed="reset")
    with pytest.raises(ValueError, match="group 0 was saved on Muon and is on AdamW now"):
        bare((4, 2), (2, 4), use_muon=False).load_state_dict(saved.state_dict())


def test_reset_by_position():
    saved, other = bare((4, 2), (2, 4)), bare((4, 2), (2, 4), use_muon=False)
    with pytest.warns(UserWarning, match="'group 0, parameter 0' was on Muon and is on AdamW now"):
        other.load_state_dict(saved.state_dict(), changed="reset")
    first, last = other.param_groups
    assert not any(param in other.state for param in first["params"])
    kept, old = last["params"][0], saved.param_groups[1]["params"][0]
    assert torch.equal(other.state[kept]["momentum_buffer"], saved.state[old]["momentum_buffer"])


def test_a_word_that_is_neither():
    optimizer = bare((4, 2))
    with pytest.raises(ValueError, match="changed='ignore': it is 'error' or 'reset'"):
        optimizer.load_state_dict(optimizer.state_dict(), changed="ignore")


# --- what torch.distributed.checkpoint leaves out


def test_parameters_of_another_stage_are_told_and_no_error(saved):
    small = make()
    small[1].param_groups[0]["params"].pop()
    small[1].param_groups[0]["param_names"].pop()
    with pytest.warns(UserWarning, match=re.escape("lacks parameters of the state dict: 'middle.weight' is missing")):
        through_dcp(saved, *small)
    assert_same_state(state_of(*small), state_of(*saved, but=["middle.weight"]))


def test_flattened_state_that_arrives_empty_is_an_error(saved):
    flat = copy.deepcopy(get_optimizer_state_dict(*saved, options=FLAT))
    model, optimizer = make()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"arrived empty: .* optimizer.zero_grad\(\)"):
        set_optimizer_state_dict(model, optimizer, flat, options=FLAT)
    optimizer.state.clear()
    get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, flat, options=FLAT)
    assert_same_state(state_of(model, optimizer), state_of(*saved))


def test_state_is_complete_once_there_is_any(saved):
    model, optimizer = make()
    assert optimizer.state_dict()["state"] == {}
    model.up.weight.grad = torch.ones_like(model.up.weight)
    model.head.bias.requires_grad_(False)
    assert set(state_of(model, optimizer)) == set()
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters())) - 1
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("way", WAYS)
def test_settings_stay_tuples(way):
    """A whole state dict of torch has lists in their place, which cannot be keys of a plan."""
    coefficients = ((3.0, -4.0, 2.0), (2.0, -1.5, 0.5))
    saved = make(ns_coefficients=coefficients)
    train(*saved)
    model, optimizer = make(ns_coefficients=coefficients)
    way(saved, model, optimizer)
    assert optimizer.param_groups[0]["ns_coefficients"] == coefficients
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.95)
    train(model, optimizer)


def test_dcp_of_a_changed_route_can_be_loaded_in_part(saved, tmp_path):
    """As docs/checkpoints.md says."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        dcp.save({"optimizer": get_optimizer_state_dict(*saved)}, checkpoint_id=tmp_path, no_dist=True)
        model, optimizer = make(muon_names=["embed.weight"])
        loaded = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        with pytest.raises(BaseException, match=r"Missing key .*: optimizer\.state\.embed\.weight"):
            dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
        planner = DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True, planner=planner)
        with pytest.raises(ValueError, match=r"'embed.weight' was on AdamW and is on Muon now"):
            set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
        with reset_changed():
            set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
    assert_same_state(state_of(model, optimizer), state_of(*saved, but=["embed.weight"]))


def test_the_file_of_a_whole_run_is_told(saved):
    model, optimizer = saved
    with pytest.raises(ValueError, match=r"no state dict of an optimizer, .* it has 'model'; 'optimizer'"):
        optimizer.load_state_dict({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
