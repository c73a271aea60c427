"""What cannot be converted exactly is told in a sentence that names the parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from convert_cases import (
    CASES,
    MUON,
    REST,
    advance,
    build_ours,
    change,
    names_of,
    parameters,
    small,
)
from torch import nn

import distmuon
from distmuon.checkpoint import convert


def test_what_cannot_be_read_is_told() -> None:
    source, run, optimizer = small()
    state, names = run.state_dict(), names_of([run], source)
    given: Any = {"source": "kellerjordan_single", "optimizer": optimizer, "names": names}

    def refuses(message: str, state: Any = state, kind: type[Exception] = ValueError, **arguments: Any) -> None:
        with pytest.raises(kind, match=message):
            convert(state, **{**given, **arguments})

    refuses("source='kj' is unknown; known: distmuon, torch", source="kj")
    refuses("target='kj' is unknown", target="kj")
    refuses("found the keys model, optimizer", state={"model": {}, "optimizer": state})
    refuses("found a Tensor", state=[torch.ones(1)])
    refuses("is empty", state=[])
    refuses("kellerjordan_single has one state dict, and there are 2", state=[state, state])
    refuses("pass names=", names=None)
    refuses("there are 6 names and the state dict has 7 parameters", names=names[1:])
    refuses("'embed' stands twice", names=["embed", "embed", *names[2:]])
    refuses("'tall' of the target is not among the source's", names=[*names[:3], "higher", *names[4:]])
    refuses(
        "'wide' has momentum_buffer of shape .12, 4. in the source and is of shape .4, 6.",
        names=[*names[:3], "wide", "tall", *names[5:]],
    )
    refuses(
        "'embed' has the state 'exp_avg'", state=change(state, 0, drop=("betas", "eps"), momentum=0.9, use_muon=True)
    )
    refuses("settings='mine'", settings="mine")
    refuses("pass optimizer=", optimizer=None, settings="optimizer")
    refuses("leave out target= and target_names=", target="dion")
    refuses("leave out target= and target_names=", target_names=[names])
    refuses("optimizer is a SGD: pass the distmuon.Muon", kind=TypeError, optimizer=torch.optim.SGD(source.values()))
    refuses("holds no names|has no names", optimizer=distmuon.Muon([{"params": [source["tall"]], "use_muon": True}]))
    refuses(
        "'norm.weight'.* to share a group",
        optimizer=None,
        target_names=[["tall", "norm.weight"], [*names[:1], *names[2:3], *names[4:]]],
    )
    refuses("the name 'tall' where names of a group belong", optimizer=None, target_names=["tall"])
    refuses("group 1 of the target has no names", optimizer=None, target_names=[["tall"], []])
    refuses("group 1 .of parameter 'tall'. has the unknown key 'dampening'", state=change(state, 1, dampening=0.0))
    refuses("group 1 .of parameter 'tall'. lacks key 'momentum'", state=change(state, 1, drop=["momentum"]))
    refuses(
        "is in no format known here, with the group keys lr, params",
        state={"state": {}, "param_groups": [{"lr": 1, "params": [0]}]},
        source=None,
    )
    broken = change(state)
    del broken["state"][0]["exp_avg_sq"]
    refuses("'embed' lacks the state 'exp_avg_sq'", state=broken)
    broken = change(state)
    broken["state"][3]["momentum"] = broken["state"][3]["momentum_buffer"]
    refuses("'tall' has the state 'momentum', which is unknown", state=broken)
    broken = change(state)
    del broken["state"][4]
    refuses("'wide' has no state and others have", state=broken)
    broken["state"][99] = {}
    refuses("parameter 99, which is in none of its groups", state=broken)
    elsewhere = build_ours(CASES[0], {**source, "embed": nn.Parameter(torch.ones(9, 4))})
    elsewhere.param_groups[0]["use_muon"] = False
    refuses("'tall' is on Muon in the source and on AdamW in optimizer.*muon_names=..tall..", optimizer=elsewhere)


def test_other_updates_are_refused() -> None:
    (run,) = CASES[5].build(parameters(CASES[5], torch.float32))
    state = run.state_dict()
    for changes, message in (
        ({"algorithm": "normuon"}, "algorithm='normuon', which has second moments by neuron .variance_neuron."),
        ({"algorithm": "dion"}, "algorithm='dion', which has a low-rank basis .Q."),
        ({"algorithm": "lion"}, "algorithm='lion'"),
        ({"algorithm": "dion2"}, "algorithm='dion2', which has an update of its own"),
        ({"cautious_wd": True}, "#0 of the source' has cautious_wd=True"),
        ({"num_heads": 4}, "has num_heads=4"),
        ({"split_sizes": (4, 2)}, "has split_sizes"),
        ({"mu": 1.0}, "has momentum=1.0, and a sum has an average only below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(change(state, 0, **changes))
    assert convert(change(state, 0, cautious_wd=True, weight_decay=0.0, num_heads=1))
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(3))], amsgrad=True)
    muon = torch.optim.Muon([nn.Parameter(torch.ones(3, 4))])
    with pytest.raises(ValueError, match="amsgrad=True in AdamW"):
        convert([muon.state_dict(), adamw.state_dict()])
    adam = torch.optim.Adam([nn.Parameter(torch.ones(3))], weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay=0.1 in torch.optim.Adam, which adds it to the gradient"):
        convert([muon.state_dict(), adam.state_dict()])
    (run,) = CASES[4].build(parameters(CASES[4], torch.float32))
    with pytest.raises(ValueError, match="nesterov=False, with which fsdp_optimizers steps along the plain gradient"):
        convert(change(run.state_dict(), nesterov=False))
    axes = {"state": {0: {"momentum_buffer": torch.ones(2, 2, 2, 2, 2)}}, "param_groups": [{**MUON, "params": [0]}]}
    with pytest.raises(ValueError, match=r"has 5 axes, and distmuon.Muon has no such stack of matrices"):
        convert(axes)
    kernel = replace(CASES[2], shapes={"conv": (4, 2, 3, 1), **REST})
    source = parameters(kernel, torch.float32)
    (run,) = kernel.build(source)
    advance([run], source, range(1))
    with pytest.raises(ValueError, match="has a kernel of 3 x 1"):
        convert(run.state_dict())


def test_what_a_target_cannot_express_is_told() -> None:
    params = parameters(CASES[4], torch.float32)
    optimizer = build_ours(CASES[4], params)
    advance([optimizer], params, range(1))
    state = optimizer.state_dict()
    for target, changes, message in (
        ("torch", {}, "'conv' has 4 axes, and torch.optim.Muon takes matrices alone"),
        ("moonlight", {"adjust_lr_fn": "match_rms_adamw"}, "'conv' has 4 axes, and moonlight takes matrices alone"),
        ("moonlight", {}, "'tall' has adjust_lr_fn=None, and moonlight has adjust_lr_fn='match_rms_adamw' built in"),
        ("muon_fsdp2", {}, "'conv' is not a matrix"),
        ("muon_fsdp2", {"nesterov": False}, "'tall' has nesterov=False"),
        ("kellerjordan", {"ns_steps": 7}, "'tall' has another ns_steps than the 5"),
        ("kellerjordan", {}, "'conv' has its learning rate scaled by 1.1547 here and by 1 in kellerjordan"),
        ("kellerjordan", {"ns_coefficients": "polar_express"}, "'tall' has ns_coefficients='polar_express'"),
        (
            "kellerjordan",
            {"ns_coefficients": "rational2", "ns_steps": None},
            "a rational function is known to no other",
        ),
        ("dion", {"ns_coefficients": "auto", "ns_steps": None}, "'tall' and 'wide' are to share a group"),
        ("dion", {}, "ns_coefficients='quintic' with ns_steps=6, which dion.Muon does not run"),
        (
            "fsdp_optimizers",
            {"weight_decay": 0.1},
            "'tall' has weight_decay=0.1, and fsdp_optimizers has weight_decay=0.0",
        ),
        ("fsdp_optimizers", {"per_head": 4}, "unknown key 'per_head'"),
    ):
        changed = change(change(state, 0, **changes), 1, **changes)
        if target in ("kellerjordan",) and "ns_steps" not in changes:
            changed = change(change(changed, 0, ns_steps=5), 1, ns_steps=5)
        with pytest.raises(ValueError, match=message):
            convert(changed, source="distmuon", target=target)
    rates = change(state, 2, lr=0.5)
    with pytest.raises(ValueError, match=r"'tall' and 'embed' are to share a group, and have lr=0.01 and lr=0.5"):
        convert(rates, target="fsdp_optimizers")


def test_whatever_polynomial_is_fastest_may_become_theirs() -> None:
    """``ns_coefficients="auto"`` names no iteration, so the target takes its own."""
    params = {name: param for name, param in parameters(CASES[0], torch.float32).items()}
    optimizer = distmuon.Muon(params.items(), lr=0.02, adamw_lr=1e-3)
    advance([optimizer], params, range(1))
    for target in ("kellerjordan", "kellerjordan_single", "muon_fsdp2", "torch"):
        assert convert(optimizer.state_dict(), target=target)
