"""What tests of conversion share: every project with its settings, and ours with the same."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import convert_sources as theirs
import pytest
import torch
from torch import Tensor, nn

import distmuon

MATRICES = {"tall": (12, 4), "wide": (4, 6), "square": (6, 6), "twin": (6, 6)}
REST = {"embed": (9, 4), "norm.weight": (5,), "norm.bias": (5,)}
# more output channels than in * kernel, where Jordan's scale of a convolution is not that of its flattened matrix
CONVOLUTION = {"conv": (16, 2, 2, 3)}
STACK = {"experts": (3, 6, 4)}
MUON = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}
ADAMW = {"lr": 0.004, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.05}

Params = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Case:
    """A project: its name, the shapes that it takes, its optimizer, and ours with the same settings."""

    source: str
    build: Callable[[Params], list[Any]]
    ours: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: {**MATRICES, **REST})
    conv_scale: str | None = None
    sum: bool = False
    adamw: dict[str, Any] = field(default_factory=lambda: ADAMW)
    options: dict[str, Any] = field(default_factory=dict)


def matrices(params: Params) -> list[nn.Parameter]:
    return [param for name, param in params.items() if name not in REST]


def rest(params: Params) -> list[nn.Parameter]:
    return [param for name, param in params.items() if name in REST]


def keller(kind: type) -> Callable[[Params], list[Any]]:
    def build(params: Params) -> list[Any]:
        groups = [{"params": rest(params), "use_muon": False, **ADAMW}]
        return [kind([*groups, {"params": matrices(params), "use_muon": True, **MUON}])]

    return build


def torch_pair(params: Params) -> list[Any]:
    muon = torch.optim.Muon(matrices(params), **MUON, nesterov=False, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest(params), **ADAMW)]


def moonlight(kind: type) -> Callable[[Params], list[Any]]:
    def build(params: Params) -> list[Any]:
        return [kind(matrices(params), rest(params), lr=0.01, momentum=0.9, ns_steps=6)]

    return build


def dion(adjust_lr: str | None, nesterov: bool) -> Callable[[Params], list[Any]]:
    def build(params: Params) -> list[Any]:
        conv = [params[name] for name in params if name in CONVOLUTION]
        muon = [param for param in matrices(params) if all(param is not one for one in conv)]
        shared = {"mu": 0.9, "lr": 0.03, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr": adjust_lr}
        return [
            theirs.Dion(
                [
                    {"params": muon, **shared},
                    {"params": conv, "flatten": True, **shared},
                    {"params": rest(params), "algorithm": "adamw", "lr": 0.004, "beta2": 0.9, "epsilon": 1e-7},
                ]
            )
        ]

    return build


def fsdp2(params: Params) -> list[Any]:
    groups = [{"params": matrices(params), "use_muon": True, "lr": 0.03, "wd": 0.1, "momentum": 0.9, "ns_steps": 5}]
    adamw = {"lr": 0.004, "wd": 0.05, "betas": (0.8, 0.9), "eps": 1e-8}
    return [theirs.MuonFsdp2([*groups, {"params": rest(params), "use_muon": False, **adamw}])]


ONE_RATE = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
ALL = {**MATRICES, **CONVOLUTION, **STACK, **REST}
CASES = [
    Case(
        "torch",
        torch_pair,
        {"nesterov": False, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"},
        options={"ns_dtype": torch.bfloat16, "foreach": False},
    ),
    Case("kellerjordan", keller(theirs.KellerJordan), {"ns_steps": 5}, ALL, "none"),
    Case("kellerjordan_single", keller(theirs.KellerJordanSingle), {"ns_steps": 5}, ALL, "none"),
    Case(
        "moonlight",
        moonlight(theirs.Moonlight),
        {"lr": 0.01, "ns_steps": 6, "adjust_lr_fn": "match_rms_adamw"},
        sum=True,
        adamw=ONE_RATE,
    ),
    Case(
        "fsdp_optimizers",
        moonlight(theirs.FsdpOptimizers),
        {"lr": 0.01, "ns_steps": 6, "weight_decay": 0.0},
        {**MATRICES, **CONVOLUTION, **REST},
        sum=True,
        adamw=ONE_RATE,
    ),
    *(
        Case(
            "dion",
            dion(scale, nesterov),
            {"ns_coefficients": "auto", "adjust_lr_fn": scale or "none", "nesterov": nesterov},
            ALL,
            sum=True,
            adamw={"lr": 0.004, "betas": (0.9, 0.9), "eps": 1e-7, "weight_decay": 0.01},
        )
        for scale, nesterov in (("spectral_norm", False), ("rms_norm", True), (None, True))
    ),
    Case("muon_fsdp2", fsdp2, {"ns_steps": 5}),
]
IDS = [case.source if case.source != "dion" else f"dion-{case.ours['adjust_lr_fn']}" for case in CASES]
cases = pytest.mark.parametrize("case", CASES, ids=IDS)


def parameters(case: Case, dtype: torch.dtype, order: Iterable[str] | None = None) -> Params:
    made = {}
    for seed, (name, shape) in enumerate(case.shapes.items()):
        made[name] = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))
    return {name: made[name] for name in order or case.shapes}


def build_ours(case: Case, params: Params, *, matching: bool = True, conv_first: bool = False) -> distmuon.Muon:
    """Our optimizer; without ``matching`` its settings are others, which those of the source have to replace."""
    conv = [(name, param) for name, param in params.items() if name in CONVOLUTION]
    muon = [(name, param) for name, param in params.items() if name not in (*CONVOLUTION, *REST)]
    groups: list[dict[str, Any]] = [{"params": muon, "use_muon": True}]
    if conv:
        scale = {"adjust_lr_fn": case.conv_scale} if case.conv_scale and matching else {}
        groups.insert(0 if conv_first else 1, {"params": conv, "use_muon": True, "flatten": True, **scale})
    adamw = [(name, param) for name, param in params.items() if name in REST]
    groups.append({"params": adamw, "use_muon": False, **(case.adamw if matching else {"lr": 0.5})})
    chosen = {**MUON, "ns_coefficients": "quintic", **case.ours} if matching else {"lr": 0.7}
    return distmuon.Muon(groups, **{**chosen, "ns_dtype": next(iter(params.values())).dtype, **case.options})


def advance(optimizers: Iterable[Any], params: Params, steps: Iterable[int]) -> dict[str, Tensor]:
    """Take steps with gradients that depend on step and name alone; how far each parameter went."""
    before = {name: param.detach().clone() for name, param in params.items()}
    for step in steps:
        for name, param in params.items():
            generator = torch.Generator().manual_seed(1000 * step + sorted(ALL).index(name))
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        for optimizer in optimizers:
            optimizer.step()
    return {name: param.detach() - before[name] for name, param in params.items()}


def names_of(optimizers: Iterable[Any], params: Params) -> list[str]:
    by_id = {id(param): name for name, param in params.items()}
    return [by_id[id(param)] for one in optimizers for group in one.param_groups for param in group["params"]]


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_of(optimizers: list[Any]) -> Any:
    states = [through_file(optimizer.state_dict()) for optimizer in optimizers]
    return states if len(states) > 1 else states[0]


def assert_same_way(ours: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Updates, not weights: their norm bounds the difference."""
    for name, update in expected.items():
        error = (ours[name] - update).norm() / update.norm()
        assert error <= rtol, f"{name}: {error:.1e}"


def copy_weights(source: Params, target: Params) -> None:
    with torch.no_grad():
        for name, param in source.items():
            target[name].copy_(param)


# eps is added to a norm there and a bound of it here: 1e-7 of it; the rest is rounding of weights
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}


def ours_names(optimizer: distmuon.Muon) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def small(kind: type = theirs.KellerJordanSingle) -> tuple[Params, Any, distmuon.Muon]:
    case = replace(CASES[2], shapes={**MATRICES, **REST})
    source = parameters(case, torch.float32)
    (run,) = keller(kind)(source)
    advance([run], source, range(2))
    return source, run, build_ours(case, parameters(case, torch.float32))


def change(state: Any, group: int | None = None, *, drop: Iterable[str] = (), **settings: Any) -> Any:
    """The state dict with other settings in one group, or in all."""
    groups = [dict(one) for one in state["param_groups"]]
    for number, one in enumerate(groups):
        if group in (None, number):
            one.update(settings)
            for key in drop:
                del one[key]
    return {"state": {i: dict(one) for i, one in state["state"].items()}, "param_groups": groups}


# theirs divide by 1.02 times the norm
A, B, C = theirs.DION[0]
DION = ((A / 1.02, B / 1.02**3, C / 1.02**5), *theirs.DION[1:])
