"""docs/coming_from.md: its calls make the updates of the projects that they come from."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import convert_sources
import migration_sources
import pytest
import torch
from convert_cases import assert_same_way
from torch import Tensor, nn

import distmuon

PAGE = (Path(__file__).parent.parent / "docs/coming_from.md").read_text(encoding="utf-8")
STEPS = 4
# theirs add eps to a norm that ours bounds by it, which is 1e-7 of it or less
TOLERANCE = 1e-6


class Model(nn.Module):
    """A wide, a tall and a square matrix, and what AdamW takes; names that all projects route alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(9, 8)
        self.linear_qkv = nn.Linear(8, 32, bias=False)
        self.square = nn.Linear(8, 8)
        self.down = nn.Linear(32, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 9, bias=False)


MATRICES = ("linear_qkv.weight", "square.weight", "down.weight")


def snippets(section: str) -> list[str]:
    """The Python blocks under a heading of the page."""
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", body, flags=re.M | re.S)


def run_snippet(code: str, model: nn.Module, **names: Any) -> dict[str, Any]:
    """What a block of the page defines; ours iterates in the dtype of the weights, as the transcriptions do."""
    dtype = next(model.parameters()).dtype
    muon = functools.partial(distmuon.Muon, ns_dtype=dtype) if dtype == torch.float64 else distmuon.Muon
    scope = {"distmuon": SimpleNamespace(Muon=muon), "torch": torch, "model": model, **names}
    exec(code, scope)
    return scope


def split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    named = dict(model.named_parameters())
    return [named[name] for name in MATRICES], [param for name, param in named.items() if name not in MATRICES]


def pair(dtype: torch.dtype = torch.float64) -> tuple[Model, Model]:
    torch.manual_seed(0)
    theirs = Model().to(dtype)
    return theirs, copy.deepcopy(theirs)


def advance(optimizers: list[Any], model: nn.Module, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """The updates of each step, from gradients that depend on step and name alone."""
    found = []
    named = dict(model.named_parameters())
    for step in range(steps):
        before = {name: param.detach().clone() for name, param in named.items()}
        for number, param in enumerate(named.values()):
            generator = torch.Generator().manual_seed(100 * step + number)
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()
        found.append({name: param.detach() - before[name] for name, param in named.items()})
    return found


def assert_same_steps(ours: Any, theirs: Any, models: tuple[nn.Module, nn.Module]) -> None:
    """Every update of every step, to a part of its norm."""
    expected = advance([theirs], models[0])
    for mine, wanted in zip(advance([ours], models[1]), expected, strict=True):
        assert_same_way(mine, wanted, TOLERANCE)


def keller(model: nn.Module, **changes: Any) -> Any:
    hidden, rest = split(model)
    muon = {"params": hidden, "use_muon": True, "lr": 0.02, "momentum": 0.95, "weight_decay": 0, **changes}
    adam = {"params": rest, "use_muon": False, "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0}
    return convert_sources.KellerJordanSingle([muon, adam])


def dion(model: nn.Module, **changes: Any) -> Any:
    hidden, rest = split(model)
    return convert_sources.Dion([{"params": hidden, **changes}, {"params": rest, "algorithm": "adamw"}])


def fsdp2(model: nn.Module, **changes: Any) -> Any:
    hidden, rest = split(model)
    groups = [{"params": hidden, "use_muon": True, **changes}, {"params": rest, "use_muon": False}]
    return migration_sources.MuonFsdp2Package(groups)


def moonlight(model: nn.Module, **changes: Any) -> Any:
    return convert_sources.Moonlight(*split(model), **changes)


def deepspeed(model: nn.Module, **changes: Any) -> Any:
    return migration_sources.DeepSpeed(list(model.named_parameters()), changes)


def megatron(model: nn.Module, **changes: Any) -> Any:
    return migration_sources.Megatron(*split(model), **changes)


THEIRS = {
    "KellerJordan/Muon": keller,
    "Moonlight": moonlight,
    "dion": dion,
    "muon-fsdp2": fsdp2,
    "DeepSpeed": deepspeed,
    "Megatron-LM": megatron,
}


@pytest.mark.parametrize("section", THEIRS)
def test_the_call_of_the_page_makes_the_updates_of_their_defaults(section: str) -> None:
    theirs, ours = pair()
    optimizer = run_snippet(snippets(section)[0], ours)["optimizer"]
    assert_same_steps(optimizer, THEIRS[section](theirs), (theirs, ours))


def test_groups_of_keller_jordan_are_read_as_they_are() -> None:
    theirs, ours = pair()
    hidden, rest = split(ours)
    optimizer = run_snippet(snippets("KellerJordan/Muon")[1], ours, hidden=hidden, rest=rest)["optimizer"]
    assert_same_steps(optimizer, keller(theirs), (theirs, ours))


# arguments that are not defaults, by the tables: theirs, and ours beside the call of the page
CHANGED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "kellerjordan": (
        keller,
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.3},
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.3, "ns_steps": 5, "adamw_weight_decay": 0.0},
    ),
    "moonlight": (
        moonlight,
        {"lr": 0.004, "wd": 0.3, "nesterov": False, "ns_steps": 6, "momentum": 0.7, "adamw_betas": (0.7, 0.8)},
        {"lr": 0.004, "weight_decay": 0.3, "nesterov": False, "ns_steps": 6, "momentum": 0.7}
        | {"adjust_lr_fn": "match_rms_adamw", "adamw_betas": (0.7, 0.8)},
    ),
    "dion rms_norm": (
        dion,
        {"adjust_lr": "rms_norm", "nesterov": True, "mu": 0.8},
        {"adjust_lr_fn": "rms_norm", "momentum": 0.8, "weight_decay": 0.01, "lr": 0.01, "adamw_lr": 0.01},
    ),
    "dion None": (
        dion,
        {"adjust_lr": None, "weight_decay": 0.2},
        {"adjust_lr_fn": "none", "nesterov": False, "weight_decay": 0.2, "lr": 0.01, "adamw_lr": 0.01}
        | {"adamw_weight_decay": 0.01},
    ),
    "muon-fsdp2": (
        fsdp2,
        {"rms_scale": False, "nesterov": False, "weight_decay": 0.1, "ns_steps": 4},
        {"adjust_lr_fn": "original", "nesterov": False, "weight_decay": 0.1, "ns_steps": 4, "lr": 0.02}
        | {"adamw_weight_decay": 0.0},
    ),
    "deepspeed": (
        deepspeed,
        {"lr": 0.01, "muon_lr": 0.04, "weight_decay": 0.2, "momentum": 0.9, "betas": (0.8, 0.9), "eps": 1e-8},
        {"lr": 0.04, "adamw_lr": 0.01, "weight_decay": 0.2, "momentum": 0.9, "adamw_betas": (0.8, 0.9)}
        | {"adamw_eps": 1e-8, "ns_steps": 5},
    ),
    **{
        f"megatron {mode}": (
            megatron,
            {"scale_mode": mode, "extra_scale_factor": 0.4, "lr": 0.01, "weight_decay": 0.0, "nesterov": True},
            {"adjust_lr_fn": name, "lr": factor * 0.4 * 0.01, "weight_decay": 0.0, "adamw_lr": 0.01}
            | {"adamw_betas": (0.9, 0.999), "ns_coefficients": "quintic5"},
        )
        for mode, name, factor in (
            ("spectral", "match_rms_adamw", 5.0),
            ("unit_rms_norm", "unit_rms_norm", 1.0),
            ("shape_scaling", "shape_scaling", 1.0),
        )
    },
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_arguments_by_the_tables(name: str) -> None:
    build, changes, arguments = CHANGED[name]
    theirs, ours = pair()
    given = {"adamw_lr": 3e-4, "adamw_eps": 1e-10} if build in (keller, fsdp2) else {}
    if build is dion:
        given = {"ns_coefficients": run_snippet(snippets("dion")[0], copy.deepcopy(ours))["stages"]}
    optimizer = distmuon.Muon(ours, **{"ns_dtype": torch.float64, **given, **arguments})
    assert_same_steps(optimizer, build(theirs, **changes), (theirs, ours))


def test_torchs_updates_are_made_bit_for_bit() -> None:
    theirs, ours = pair(torch.float32)
    hidden, rest = split(theirs)
    both = [torch.optim.Muon(hidden), torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)]
    optimizer = run_snippet(snippets("torch.optim.Muon")[0], ours)["optimizer"]
    for mine, wanted in zip(advance([optimizer], ours), advance(both, theirs), strict=True):
        for name, update in wanted.items():
            assert torch.equal(mine[name], update), name


def test_convolutions_of_keller_jordan() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(2, 24, 3, bias=False)).double()
    ours = copy.deepcopy(theirs)
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0}
    group = {"params": list(ours.parameters()), "use_muon": True, "flatten": True, "adjust_lr_fn": "none", **settings}
    optimizer = distmuon.Muon([group], ns_steps=5, ns_dtype=torch.float64)
    source = convert_sources.KellerJordanSingle([{"params": list(theirs.parameters()), "use_muon": True, **settings}])
    assert_same_steps(optimizer, source, (theirs, ours))


def test_sums_of_gradients_for_momentum_change_nothing_but_the_buffer() -> None:
    """B is 1 / (1 - momentum) times the average, and the iteration divides by the norm."""
    theirs, ours = pair()
    optimizer = run_snippet(snippets("Moonlight")[0], ours)["optimizer"]
    source = moonlight(theirs)
    assert_same_steps(optimizer, source, (theirs, ours))
    for mine, wanted in zip(split(ours)[0], split(theirs)[0], strict=True):
        total, average = source.state[wanted]["momentum_buffer"], optimizer.state[mine]["momentum_buffer"]
        assert torch.allclose(total * (1 - 0.95), average, rtol=1e-12)


def test_cautious_decay_by_hooks() -> None:
    theirs, ours = pair()
    (call, hooks), weight_decay = snippets("dion"), 2.0
    optimizer = run_snippet(call.replace("weight_decay=0.01", "weight_decay=0.0"), ours)["optimizer"]
    run_snippet(hooks, ours)["cautious"](optimizer, weight_decay)
    source = dion(theirs, weight_decay=0.0)
    for group in source.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(STEPS):
        before = {name: param.detach().clone() for name, param in theirs.named_parameters()}
        for name, bare in advance([source], theirs, 1)[0].items():
            # dion/muon.py 326-336: decay where weight and what is subtracted from it have the same sign
            mask = before[name] * -bare >= 0
            assert mask.numel() < 20 or 0.2 < mask.double().mean() < 0.8
            dict(theirs.named_parameters())[name].data.sub_(before[name] * mask * 0.01 * weight_decay)
        advance([optimizer], ours, 1)
        for (name, mine), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(mine, wanted, rtol=0, atol=1e-8), name


def test_fused_qkv_of_megatron_by_a_parametrization() -> None:
    theirs, ours = pair()
    fused = dict(theirs.named_parameters())["linear_qkv.weight"]
    source = migration_sources.Megatron(*split(theirs), qkv=[fused], qkv_shapes=(8, 4, 4))
    call, parametrization = snippets("Megatron-LM")
    run_snippet(parametrization, ours)
    assert torch.equal(ours.linear_qkv.weight, fused)
    optimizer = run_snippet(call, ours)["optimizer"]
    assert {row.shape for row in optimizer.report().rows if "linear_qkv" in row.name} == {(16, 8), (8, 8)}
    for step in range(STEPS):
        before = fused.detach().clone(), ours.linear_qkv.weight.detach().clone()
        fused.grad = torch.randn(fused.shape, generator=torch.Generator().manual_seed(step), dtype=fused.dtype)
        optimizer.zero_grad()
        (ours.linear_qkv.weight * fused.grad).sum().backward()
        source.step()
        optimizer.step()
        expected, got = fused.detach() - before[0], ours.linear_qkv.weight.detach() - before[1]
        assert (got - expected).norm() < TOLERANCE * expected.norm()


def test_the_rest_is_updated_as_by_adamw_and_matrices_as_far() -> None:
    theirs, ours = pair(torch.float32)
    source = torch.optim.AdamW(theirs.parameters(), lr=2e-3, weight_decay=0.05)
    optimizer = run_snippet(snippets("AdamW")[0], ours)["optimizer"]
    for mine, wanted in zip(advance([optimizer], ours, 30), advance([source], theirs, 30), strict=True):
        for name, update in wanted.items():
            if name not in MATRICES:
                assert torch.equal(mine[name], update), name
    for name in MATRICES:
        # the last step: AdamW's is 0.23 lr an element on noise, and Muon's 0.2
        sizes = [found[name].square().mean().sqrt().item() / 2e-3 for found in (mine, wanted)]
        assert sizes[0] == pytest.approx(0.2, rel=0.1) and sizes[1] == pytest.approx(0.23, rel=0.3)
    suggested = distmuon.suggest_lr(ours, adamw_lr=2e-3, weight_decay=0.05)
    assert (suggested.lr, suggested.weight_decay) == (2e-3, 0.05)
