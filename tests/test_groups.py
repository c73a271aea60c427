from unittest import mock

import pytest
import torch
from torch import nn

import distmuon


def matrix(rows=6, cols=4):
    return nn.Parameter(torch.randn(rows, cols))


def muon_group(**keys):
    return {"params": [matrix()], "use_muon": True, **keys}


def model():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 9))


def test_a_module_becomes_groups():
    optimizer = distmuon.Muon(model(), lr=0.02, adamw_lr=3e-4, weight_decay=0.01)
    assert [group["name"] for group in optimizer.param_groups] == ["muon", "adamw"]
    muon, adamw = optimizer.param_groups
    assert (muon["lr"], muon["eps"], muon["weight_decay"]) == (0.02, 1e-7, 0.01)
    assert (adamw["lr"], adamw["eps"], adamw["weight_decay"]) == (3e-4, 1e-8, 0.01)
    assert muon["param_names"] == ["1.weight"]


def test_named_parameters_are_routed_by_name():
    optimizer = distmuon.Muon(
        [("embed.weight", matrix()), ("mlp.weight", matrix()), ("mlp.bias", nn.Parameter(torch.zeros(4)))],
        lr=0.02,
        adamw_lr=1e-3,
    )
    assert [group["param_names"] for group in optimizer.param_groups] == [["mlp.weight"], ["embed.weight", "mlp.bias"]]


def test_rms_matched_rate_serves_both():
    optimizer = distmuon.Muon(model(), lr=3e-3, adjust_lr_fn="rms_norm")
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 3e-3]


def test_zero_is_a_value():
    optimizer = distmuon.Muon(model(), lr=0.02, weight_decay=0.1, adamw_lr=0.0, adamw_weight_decay=0.0)
    adamw = optimizer.param_groups[1]
    assert adamw["lr"] == 0.0
    assert adamw["weight_decay"] == 0.0


def test_groups_override_defaults():
    optimizer = distmuon.Muon(
        [
            muon_group(lr=0.1, momentum=0.5, ns_coefficients="polar_express", ns_steps=6),
            {"params": [matrix()], "algorithm": "adamw", "lr": 1e-3, "betas": (0.5, 0.6), "name": "rest"},
        ]
    )
    muon, rest = optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["ns_steps"]) == (0.1, 0.5, 6)
    assert (rest["use_muon"], rest["betas"], rest["eps"], rest["name"]) == (False, (0.5, 0.6), 1e-8, "rest")


def test_group_of_named_parameters_is_routed():
    named = [("lm_head.weight", matrix()), ("mlp.weight", matrix())]
    optimizer = distmuon.Muon([{"params": named, "lr": 0.01}])
    assert [(group["use_muon"], group["lr"]) for group in optimizer.param_groups] == [(True, 0.01), (False, 0.01)]


def test_wrapper_prefixes_are_not_stored():
    optimizer = distmuon.Muon([("_orig_mod.mlp.weight", matrix())])
    assert optimizer.param_groups[0]["param_names"] == ["mlp.weight"]


shared = matrix()


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([matrix()], ValueError, r"group 0 holds bare parameters and does not say use_muon.*transformers\.MuonFactory"),
        ([muon_group(lr="3e-4")], TypeError, r"lr='3e-4' \(a str, which YAML reads from 3e-4.*takes a number"),
        ([muon_group(weight_decay=None)], TypeError, r"weight_decay=None \(a NoneType\): it takes a number"),
        ([muon_group(betas=0.9)], ValueError, "betas=0.9: it takes two numbers"),
        ([{"params": [matrix()], "name": "blocks"}], ValueError, r"group 0 \(blocks\) holds bare parameters"),
        ([muon_group(momentun=0.9)], ValueError, "unknown key 'momentun': did you mean 'momentum'"),
        ([muon_group(maximize=True)], ValueError, "unknown key 'maximize'"),
        ([muon_group(algorithm="adamw")], ValueError, "says use_muon=True and algorithm='adamw'"),
        ([{"params": [matrix()], "algorithm": "lion"}], ValueError, "algorithm='lion'"),
        ([{"params": [matrix()], "use_muon": "yes"}], ValueError, "use_muon='yes'"),
        ([{"use_muon": True}], ValueError, "has no 'params'"),
        ([muon_group() | {"params": []}], ValueError, "no parameters"),
        ([], ValueError, "params is empty"),
        (matrix(), TypeError, "single tensor"),
        ([matrix(), ("a", matrix())], TypeError, "mixes"),
        ([muon_group(lr=-1.0)], ValueError, "lr=-1.0: it must be 0 or more"),
        ([muon_group(lr=float("nan"))], ValueError, "lr=nan"),
        ([muon_group(lr=torch.ones(2))], ValueError, "tensor lr of 2 elements"),
        ([muon_group(momentum=1.0)], ValueError, "momentum=1.0: it must be at least 0 and less than 1"),
        ([muon_group(weight_decay=-0.1)], ValueError, "weight_decay=-0.1"),
        ([muon_group(betas=(0.9,))], ValueError, "takes two numbers"),
        ([muon_group(betas=(0.9, 1.5))], ValueError, "betas=1.5"),
        ([muon_group(adjust_lr_fn="huge")], ValueError, "group 0: adjust_lr_fn='huge' is unknown"),
        ([muon_group(ns_coefficients="cans", ns_steps=9)], ValueError, "group 0: .*pass ns_steps=5"),
        ([muon_group(), {"params": [matrix()], "use_muon": False}], ValueError, "pass adamw_lr|Pass adamw_lr"),
        ([{"params": [matrix()], "use_muon": False, "lr": 1.0}], ValueError, "no parameter goes to Muon"),
        ([muon_group() | {"params": [shared]}, muon_group() | {"params": [shared]}], ValueError, "again in group 1"),
        ([muon_group() | {"params": [shared, shared]}], ValueError, "again in group 0"),
        ([muon_group() | {"params": [nn.Parameter(torch.zeros(5))]}], ValueError, "holds no matrix"),
        ([muon_group() | {"params": [nn.Parameter(torch.zeros(2, 3, 4, 5))]}], ValueError, "flatten=True"),
        ([muon_group() | {"params": [nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))]}], TypeError, "complex"),
        ([muon_group() | {"params": [torch.zeros(3, 3, dtype=torch.int8)]}], TypeError, "quantized"),
        (
            [muon_group() | {"params": [nn.Parameter(torch.zeros(3, 3).to(torch.float8_e4m3fn), requires_grad=False)]}],
            TypeError,
            "quantized",
        ),
        ([muon_group() | {"params": [torch.eye(3).to_sparse()]}], TypeError, "sparse"),
        ([muon_group() | {"params": ["w"]}], TypeError, "str where parameters are wanted"),
    ],
)
def test_what_is_wrong_is_named(params, error, message):
    with pytest.raises(error, match=message):
        distmuon.Muon(params)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(maximize=True), ValueError, "maximize=True is not supported: negate the loss"),
        (dict(bucket_bytes=0), ValueError, "bucket_bytes=0"),
        (dict(compile=True, foreach=False), ValueError, "exclude each other"),
        (dict(fused=True, foreach=True), ValueError, "exclude each other"),
        (dict(ns_dtype=torch.int32), TypeError, "ns_dtype"),
        (dict(momentum_dtype=torch.float8_e4m3fn), TypeError, "momentum_dtype"),
        (dict(muon_names=["*"]), ValueError, "choose among names"),
        (dict(adamw_names="head*"), TypeError, r"adamw_names='head\*' is a single string.*\['head\*'\]"),
        (dict(mesh=mock.Mock(get_group=None, ndim=2)), ValueError, "mesh is a mesh of 2 axes: pass one of them"),
        (dict(mesh=2), TypeError, r"mesh=2 is a int: it takes a DeviceMesh.*group\.WORLD"),
        (dict(stages="pp"), TypeError, "stages='pp' is a str"),
    ],
)
def test_wrong_options(keywords, error, message):
    with pytest.raises(error, match=message):
        distmuon.Muon([muon_group()], **keywords)


def test_flattened_models_are_told_what_to_do():
    flat = nn.Module()
    flat.flat_param = nn.Parameter(torch.zeros(1000))
    with pytest.raises(ValueError, match="fully_shard"):
        distmuon.Muon(flat, adamw_lr=1e-3)


def test_fsdp1_is_refused():
    class FullyShardedDataParallel(nn.Module):
        """Of the name of torch's, which needs a process group."""

        def __init__(self):
            super().__init__()
            self.flat_param = nn.Parameter(torch.zeros(1000))

    whole = nn.Sequential(nn.Linear(4, 4), FullyShardedDataParallel(), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"^1 is a FullyShardedDataParallel \(FSDP1\).*fully_shard"):
        distmuon.Muon(whole, adamw_lr=1e-3)
    with pytest.raises(TypeError, match="FSDP1"):
        distmuon.wrap(whole, torch.optim.AdamW(whole.parameters()))


def test_add_param_group():
    optimizer = distmuon.Muon([muon_group()], lr=0.02, adamw_lr=1e-3)
    optimizer.add_param_group({"params": [matrix(3, 3)], "use_muon": False})
    assert optimizer.param_groups[1]["lr"] == 1e-3
    with pytest.raises(ValueError, match="group 2 holds bare parameters"):
        optimizer.add_param_group({"params": [matrix()]})
    with pytest.raises(ValueError, match="again in group 2"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"], "use_muon": True})
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    added = matrix(2, 5)
    optimizer.add_param_group({"params": [added], "use_muon": True, "lr": 0.1})
    added.grad = torch.ones_like(added)
    before = added.detach().clone()
    optimizer.step()
    assert not torch.equal(added, before)
