"""distmuon.Muon in one process beside the transcriptions of the papers: twenty steps in float64.

Once with the transcription given distmuon's own function as its Newton-Schulz iteration, so that all else is compared,
and once with the exact polar factor on one side and as many steps as reach it on the other.
"""

import functools

import pytest
import torch
from family_reference import (
    AdaMuon,
    AdamW,
    Muon,
    MuonBP,
    MuonClip,
    NorMuon,
    Scion,
    jordan_scale,
    lmo_bias,
    lmo_col_norm,
    lmo_row_norm,
    lmo_sign,
    lmo_spectral,
    moonlight_scale,
    polar,
    size_of,
    spectral_scale,
    unit_scale,
)
from torch import nn

import distmuon

SHAPES = {"square": (12, 12), "tall": (20, 8), "wide": (8, 20)}
SCALES = {
    "original": jordan_scale,
    "match_rms_adamw": moonlight_scale,
    "spectral": spectral_scale,
    "none": unit_scale,
}
FULL = {"ns_coefficients": "polar_express", "ns_steps": 24}  # to the polar factor, but for rounding
STEPS, LR, DECAY = 20, 0.02, 0.1


def trained(shape, rule, **settings):
    """The weight after steps of distmuon and after those of a rule, from the same gradients."""
    generator = torch.Generator().manual_seed(3)
    param = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    expected = param.detach().clone()
    settings = {"lr": LR, "weight_decay": DECAY, "ns_dtype": torch.float64, **settings}
    optimizer = distmuon.Muon([{"params": [param], "use_muon": True}], **settings)
    for _ in range(STEPS):
        param.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        expected = rule(expected, param.grad)
        optimizer.step()
    return param.detach(), expected


def trained_beside(shape, rule, **group):
    """The same of what is not on Muon, beside a matrix that is."""
    generator = torch.Generator().manual_seed(4)
    param = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    expected = param.detach().clone()
    beside = nn.Parameter(torch.eye(3, dtype=torch.float64))
    groups = [{"params": [param], "use_muon": False, **group}, {"params": [beside], "use_muon": True}]
    optimizer = distmuon.Muon(groups, lr=LR, adamw_lr=LR)
    for _ in range(STEPS):
        param.grad, beside.grad = (
            torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in (param, beside)
        )
        expected = rule(expected, param.grad)
        optimizer.step()
    return param.detach(), expected


def steps_of(**settings):
    """The iteration of distmuon, for a rule."""
    names = {"ns_coefficients": "coefficients", "ns_steps": "steps"}
    return functools.partial(distmuon.orthogonalize, **{names[key]: value for key, value in settings.items()})


def assert_same(actual, expected, atol=1e-10):
    assert torch.allclose(actual, expected, rtol=0, atol=atol), f"largest difference {(actual - expected).abs().max()}"


CASES = {
    "muon": (Muon, {}),
    "normuon": (NorMuon, {"variant": "normuon"}),
    "normuon-short": (functools.partial(NorMuon, beta2=0.5), {"variant": "normuon", "muon_beta2": 0.5}),
    "adamuon": (AdaMuon, {"variant": "adamuon"}),
    "adamuon-short": (functools.partial(AdaMuon, beta2=0.5), {"variant": "adamuon", "muon_beta2": 0.5}),
    "muonbp": (functools.partial(MuonBP, period=3, blocks=4), {"block_period": 3, "blocks": 4}),
    "muonbp-half": (
        functools.partial(MuonBP, period=5, blocks=2, block_lr_ratio=0.5),
        {"block_period": 5, "blocks": 2, "block_lr_ratio": 0.5},
    ),
}


def rule_of(case, orthogonalize, *, adjust_lr_fn, **keywords):
    kind, _ = CASES[case]
    scale = SCALES[adjust_lr_fn]
    sized = {"size": size_of(scale)} if case.startswith(("normuon", "adamuon")) else {"scale": scale}
    return kind(orthogonalize, lr=LR, weight_decay=DECAY, **sized, **keywords)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adjust_lr_fn", SCALES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_steps_of_newton_schulz(case, shape, adjust_lr_fn, nesterov):
    """All scales, whose papers have other steps than the default ones."""
    settings = {"ns_coefficients": "quintic", "ns_steps": 5}
    rule = rule_of(case, steps_of(**settings), adjust_lr_fn=adjust_lr_fn, nesterov=nesterov)
    keywords = {**settings, **CASES[case][1], "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    assert_same(*trained(SHAPES[shape], rule, **keywords))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cautious_wd", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_default_coefficients(case, shape, cautious_wd):
    rule = rule_of(case, steps_of(), adjust_lr_fn="match_rms_adamw", nesterov=True, cautious_wd=cautious_wd)
    keywords = {**CASES[case][1], "adjust_lr_fn": "match_rms_adamw", "cautious_wd": cautious_wd}
    assert_same(*trained(SHAPES[shape], rule, **keywords))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cautious_wd", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_exact_polar_factor(case, shape, cautious_wd):
    """The paper's formula and nothing else on the other side."""
    rule = rule_of(case, polar, adjust_lr_fn="match_rms_adamw", nesterov=False, cautious_wd=cautious_wd)
    keywords = {**FULL, **CASES[case][1], "adjust_lr_fn": "match_rms_adamw", "cautious_wd": cautious_wd}
    assert_same(*trained(SHAPES[shape], rule, nesterov=False, **keywords))


@pytest.mark.parametrize("shape", SHAPES)
def test_update_of_muonclip(shape):
    """Algorithm 1 of Kimi K2 before it clips; the settings are those of distmuon.MuonClip."""
    rule = MuonClip(polar, lr=LR, weight_decay=DECAY)
    assert_same(*trained(SHAPES[shape], rule, nesterov=False, adjust_lr_fn="match_rms_adamw", **FULL))


@pytest.mark.parametrize("cautious_wd", [False, True])
def test_adamw(cautious_wd):
    rule = AdamW(lr=0.05, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-8, cautious_wd=cautious_wd)
    group = {"lr": 0.05, "weight_decay": 0.3, "betas": (0.8, 0.9), "cautious_wd": cautious_wd}
    assert_same(*trained_beside((6, 5), rule, **group))


ORACLES = {
    "sign": (lmo_sign, {"lmo": "sign"}),
    "row_norm": (functools.partial(lmo_row_norm, eps=1e-8), {"lmo": "row_norm"}),
    "col_norm": (functools.partial(lmo_col_norm, eps=1e-8), {"lmo": "col_norm"}),
    # torch.nn.Embedding stores the first layer of the paper transposed
    "embedding": (lambda average: lmo_col_norm(average.T, eps=1e-8).T, {"lmo": "col_norm", "transposed": True}),
    "bias_rms": (functools.partial(lmo_bias, eps=1e-8), {"lmo": "bias_rms"}),
}


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("name", ORACLES)
def test_oracles_of_scion(name, constrained):
    """A step of gamma in a ball of some radius is a rate of their product and a decay of one over the radius."""
    lmo, keys = ORACLES[name]
    rule = Scion(lmo, gamma=0.01, radius=3.0, alpha=0.2, constrained=constrained)
    decay = 1 / 3 if constrained else 0.0
    group = {"lr": 0.03, "weight_decay": decay, "momentum": 0.8, "nesterov": False, "eps": 1e-8, **keys}
    assert_same(*trained_beside((7,) if name == "bias_rms" else (7, 5), rule, **group))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("constrained", [True, False])
def test_hidden_matrices_of_scion(shape, constrained):
    rule = Scion(lmo_spectral, gamma=0.01, radius=3.0, alpha=0.2, constrained=constrained)
    settings = {"lr": 0.03, "weight_decay": 1 / 3 if constrained else 0.0, "momentum": 0.8, "nesterov": False}
    assert_same(*trained(SHAPES[shape], rule, adjust_lr_fn="spectral", **settings, **FULL))
