"""The table of who updates what, and what is said of two that differ."""

import json

import pytest
import torch
from torch import nn

import distmuon
from distmuon.checkpoint import differences, enumerate_differences, routing_table


def model_of(seed=0):
    torch.manual_seed(seed)
    parts = {"embed": nn.Embedding(9, 4), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "norm": nn.LayerNorm(4)}
    return nn.ModuleDict(parts)


def entry(on="muon", *shape):
    return {"on": on, "shape": list(shape)}


# --- routing_table


def test_table_of_a_model():
    table = routing_table(distmuon.Muon(model_of(), adamw_lr=1e-3))
    expected = {"up.weight": entry("muon", 6, 4), "down.weight": entry("muon", 4, 6)}
    expected |= {"embed.weight": entry("adamw", 9, 4), "up.bias": entry("adamw", 6), "down.bias": entry("adamw", 4)}
    expected |= {"norm.weight": entry("adamw", 4), "norm.bias": entry("adamw", 4)}
    assert table == expected
    assert differences(json.loads(json.dumps(table)), table) == []


def test_prefixes_of_wrappers_are_stripped():
    plain = model_of()
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": model_of()})})
    table = routing_table(distmuon.Muon(wrapped, adamw_lr=1e-3))
    assert table == routing_table(distmuon.Muon(plain, adamw_lr=1e-3))
    theirs = torch.optim.AdamW(wrapped.named_parameters())
    assert {name: each["shape"] for name, each in routing_table(theirs).items()} == {
        name: list(param.shape) for name, param in plain.named_parameters()
    }


def test_optimizers_of_torch_and_parameters_without_names():
    matrices = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2, 2))]
    assert routing_table(torch.optim.Muon(matrices)) == {
        "group 0, parameter 0": entry("muon", 3, 2),
        "group 0, parameter 1": entry("muon", 2, 2),
    }
    assert routing_table(torch.optim.AdamW(matrices[:1])) == {"group 0, parameter 0": entry("adamw", 3, 2)}


def test_two_parameters_of_one_name_are_an_error():
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    groups = [{"params": list(each.named_parameters()), "use_muon": True} for each in (one, two)]
    with pytest.raises(ValueError, match="two parameters of the optimizer are called 'weight'"):
        routing_table(distmuon.Muon(groups))


# --- differences


def test_each_difference_is_told():
    saved = {
        "same": entry("muon", 2, 2),
        "moved": entry("muon", 3, 2),
        "back": entry("adamw", 3, 3),
        "grown": entry("muon", 4, 2),
        "both": entry("muon", 4, 4),
        "old.name": entry("adamw", 7),
        "dropped": entry("muon", 9, 9),
    }
    present = {
        "same": entry("muon", 2, 2),
        "moved": entry("adamw", 3, 2),
        "back": entry("muon", 3, 3),
        "grown": entry("muon", 5, 2),
        "both": entry("adamw", 4, 5),
        "new.name": entry("adamw", 7),
        "added": entry("adamw", 8),
    }
    assert differences(saved, present) == [
        "'moved' was on Muon and is on AdamW now",
        "'back' was on AdamW and is on Muon now",
        "'grown' had shape (4, 2) and has (5, 2) now",
        "'both' was on Muon and is on AdamW now, and had shape (4, 4) and has (4, 5) now",
        "'old.name' is called 'new.name' now",
        "'dropped' is missing (on Muon, shape (9, 9))",
        "'added' is new (on AdamW, shape (8,))",
    ]


def test_renamed_ones_are_paired_by_how_their_names_end():
    saved = {f"model.layers.{layer}.{part}": entry("muon", 4, 4) for layer in range(3) for part in "qkv"}
    present = {name.removeprefix("model."): value for name, value in reversed(saved.items())}
    found = differences(saved, present)
    assert sorted(found) == sorted(f"{name!r} is called {name.removeprefix('model.')!r} now" for name in saved)


@pytest.mark.parametrize("other", [entry("adamw", 4, 4), entry("muon", 4, 5)])
def test_another_route_or_shape_is_no_renaming(other):
    found = differences({"a": entry("muon", 4, 4)}, {"b": other})
    assert [text.split(" (")[0] for text in found] == ["'a' is missing", "'b' is new"]


def test_what_is_not_known_does_not_differ():
    assert differences({"a": {"on": None, "shape": None}}, {"a": entry("muon", 2, 2)}) == []
    assert differences({"a": {"on": None, "shape": None}}, {"b": entry("muon", 2, 2)}) == ["'a' is called 'b' now"]


def test_ten_differences_are_told_and_the_others_counted():
    texts = [f"number {index}" for index in range(12)]
    assert enumerate_differences(texts[:10]) == "; ".join(texts[:10])
    assert enumerate_differences(texts) == "; ".join(texts[:10]) + "; and 2 more"
