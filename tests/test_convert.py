"""State of other Muons, taken over and given back: the next updates are theirs, and nothing is lost on the way."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import convert_sources as theirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import distmuon
from distmuon.checkpoint import convert
from distmuon.checkpoint.formats import FORMATS

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


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_next_updates_are_theirs(case: Case, dtype: torch.dtype) -> None:
    source = parameters(case, dtype, reversed(case.shapes))
    run = case.build(source)
    advance(run, source, range(4))
    params = parameters(case, dtype)
    copy_weights(source, params)
    optimizer = build_ours(case, params, matching=False, conv_first=True)
    state = convert(state_of(run), source=case.source, optimizer=optimizer, names=names_of(run, source))
    optimizer.load_state_dict(state)
    expected = advance(run, source, range(4, 7))
    tolerance = 0.0 if case.source == "torch" else TOLERANCE[dtype]
    assert_same_way(advance([optimizer], params, range(4, 7)), expected, tolerance)


@cases
def test_their_momentum_is_ours_but_for_one_rounding(case: Case) -> None:
    source = parameters(case, torch.float32)
    run = case.build(source)
    advance(run, source, range(4))
    optimizer = build_ours(case, parameters(case, torch.float32))
    state = convert(state_of(run), source=case.source, optimizer=optimizer, names=names_of(run, source))
    kept = {id(param): one.state[param] for one in run for param in one.state}
    for index, name in enumerate(ours_names(optimizer)):
        old, new = kept[id(source[name])], state["state"][index]
        if name in REST:
            second = next(old[key] for key in ("exp_avg_sq", "moment2", "variance") if key in old)
            first = next(old[key] for key in ("exp_avg", "moment1", "momentum") if key in old)
            assert torch.equal(new["exp_avg"], first)
            assert torch.equal(new["exp_avg_sq"], second)
            assert new["step"].item() == 4
            continue
        buffer = next(old[key] for key in ("momentum_buffer", "momentum", "m") if key in old)
        exact = buffer.double() * (1 - 0.9) if case.sum else buffer.double()
        assert torch.equal(new["momentum_buffer"], exact.float().view(case.shapes[name])), name


def ours_names(optimizer: distmuon.Muon) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


@cases
def test_a_run_of_ours_goes_on_as_theirs(case: Case) -> None:
    dtype = torch.float64
    params = parameters(case, dtype)
    optimizer = build_ours(case, params)
    advance([optimizer], params, range(4))
    back = parameters(case, dtype, reversed(case.shapes))
    copy_weights(params, back)
    run = case.build(back)
    names = iter(names_of(run, back))
    wanted = [[next(names) for _ in group["params"]] for one in run for group in one.param_groups]
    states = convert(through_file(optimizer.state_dict()), target=case.source, target_names=wanted)
    for one, state in zip(run, states if isinstance(states, tuple) else [states], strict=True):
        one.load_state_dict(through_file(state))
    if case.source == "dion":
        # which iteration it is, is an argument of their optimizer; ours takes theirs
        for group in optimizer.param_groups[:-1]:
            group["ns_coefficients"] = DION
    expected = advance(run, back, range(4, 7))
    assert_same_way(advance([optimizer], params, range(4, 7)), expected, TOLERANCE[dtype])


# theirs divide by 1.02 times the norm
A, B, C = theirs.DION[0]
DION = ((A / 1.02, B / 1.02**3, C / 1.02**5), *theirs.DION[1:])


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_identity(case: Case, dtype: torch.dtype) -> None:
    params = parameters(case, dtype)
    optimizer = build_ours(case, params)
    advance([optimizer], params, range(3))
    before = optimizer.state_dict()
    there = through_file(convert(before, target=case.source))
    names = ours_names(optimizer)
    if case.source == "kellerjordan":
        # theirs are sorted; the names of groups that are not are those that were handed over
        names = [*sorted(names[:5], key=ALL.__getitem__, reverse=True), *names[5:]]
    after = convert(there, source=case.source, optimizer=optimizer, names=names)
    assert after["state"].keys() == before["state"].keys()
    for index, old in before["state"].items():
        new = after["state"][index]
        assert new.keys() == old.keys()
        for key, value in old.items():
            if case.sum and key == "momentum_buffer":
                lower, upper = (torch.nextafter(value, torch.full_like(value, end)) for end in (-torch.inf, torch.inf))
                assert ((lower <= new[key]) & (new[key] <= upper)).all()
            else:
                assert torch.equal(new[key], value), (index, key)
                assert new[key].dtype == value.dtype
    for old, new in zip(before["param_groups"], after["param_groups"], strict=True):
        for key in (
            "use_muon",
            "lr",
            "weight_decay",
            *(("momentum", "nesterov") if old["use_muon"] else ("betas", "eps")),
        ):
            assert new[key] == old[key], key


@settings(max_examples=25)
@given(st.sampled_from(CASES), st.randoms(use_true_random=False))
def test_any_order_of_parameters(case: Case, draw: Any) -> None:
    first, second = list(case.shapes), list(case.shapes)
    draw.shuffle(first)
    draw.shuffle(second)
    source = parameters(case, torch.float64, first)
    run = case.build(source)
    advance(run, source, range(2))
    params = parameters(case, torch.float64, second)
    copy_weights(source, params)
    optimizer = build_ours(case, params, matching=False)
    optimizer.load_state_dict(
        convert(state_of(run), source=case.source, optimizer=optimizer, names=names_of(run, source))
    )
    expected = advance(run, source, [2])
    assert_same_way(advance([optimizer], params, [2]), expected, TOLERANCE[torch.float64])


@cases
def test_without_names_parameters_keep_their_order(case: Case) -> None:
    if case.source == "fsdp_optimizers":
        case = replace(case, shapes={**MATRICES, **REST})
    source = parameters(case, torch.float64)
    run = case.build(source)
    advance(run, source, range(3))
    state = convert(state_of(run), source=case.source)
    order = names_of(run, source)
    params = parameters(case, torch.float64)
    copy_weights(source, params)
    # groups of two readings of axes come apart, so the names of the result are taken from those that are handed in
    named = convert(state_of(run), source=case.source, names=order)
    members = [group["param_names"] for group in named["param_groups"]]
    assert [len(group["params"]) for group in state["param_groups"]] == list(map(len, members))
    assert all("param_names" not in group for group in state["param_groups"])
    groups = [
        {
            "params": [params[name] for name in names],
            "use_muon": group["use_muon"],
            "flatten": group.get("flatten", False),
        }
        for names, group in zip(members, state["param_groups"], strict=True)
    ]
    optimizer = distmuon.Muon(groups, adamw_lr=0.5, **{"ns_dtype": torch.float64, **case.options})
    optimizer.load_state_dict(state)
    expected = advance(run, source, range(3, 6))
    assert_same_way(advance([optimizer], params, range(3, 6)), expected, TOLERANCE[torch.float64])


@cases
def test_the_source_is_recognized(case: Case) -> None:
    source = parameters(case, torch.float32)
    run = case.build(source)
    advance(run, source, range(1))
    optimizer = build_ours(case, parameters(case, torch.float32))
    arguments = {"optimizer": optimizer, "names": names_of(run, source)}
    told, guessed = (convert(state_of(run), source=name, **arguments) for name in (case.source, None))
    assert str(told) == str(guessed)


def small(kind: type = theirs.KellerJordanSingle) -> tuple[Params, Any, distmuon.Muon]:
    case = replace(CASES[2], shapes={**MATRICES, **REST})
    source = parameters(case, torch.float32)
    (run,) = keller(kind)(source)
    advance([run], source, range(2))
    return source, run, build_ours(case, parameters(case, torch.float32))


def test_the_ranks_of_muon_with_aux_adam_are_put_together() -> None:
    case = replace(CASES[1], shapes={**MATRICES, **REST})
    whole = parameters(case, torch.float32)
    (run,) = case.build(whole)
    advance([run], whole, range(3))
    states = []
    for rank in range(3):
        params = parameters(case, torch.float32)
        groups = [{"params": rest(params), "use_muon": False, **ADAMW}]
        groups.append({"params": matrices(params), "use_muon": True, **MUON})
        mine = theirs.KellerJordan(groups, rank=rank, world=3)
        advance([mine], params, range(3))
        states.append(through_file(mine.state_dict()))
    optimizer = build_ours(case, parameters(case, torch.float32))
    arguments: Any = {"source": "kellerjordan", "optimizer": optimizer, "names": [*REST, *MATRICES]}
    assert str(convert(states, **arguments)) == str(convert(run.state_dict(), **arguments))
    with pytest.raises(ValueError, match="'square' has no state and others have: each rank of MuonWithAuxAdam"):
        convert(states[0], **arguments)


def test_the_two_classes_of_kellerjordan_are_not_guessed() -> None:
    source, run, optimizer = small(theirs.KellerJordan)
    # sorted state, and names that are not: of the class that sorts, or of one that was handed other parameters
    with pytest.raises(ValueError, match=r"may be of MuonWithAuxAdam.*pass source='kellerjordan' or"):
        convert(run.state_dict(), optimizer=optimizer, names=[*REST, "wide", "tall", "square", "twin"])
    told = convert(
        run.state_dict(), source="kellerjordan", optimizer=optimizer, names=[*REST, "wide", "tall", "square", "twin"]
    )
    assert str(told) == str(convert(run.state_dict(), optimizer=optimizer, names=names_of([run], source)))


def test_the_classes_of_kellerjordan_without_adam_do_not_say_use_muon() -> None:
    source, run, _ = small()
    state = run.state_dict()
    alone = {
        "state": {index: state["state"][3 + index] for index in range(4)},
        "param_groups": [{"params": [0, 1, 2, 3], "lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}],
    }
    params = {name: param for name, param in source.items() if name not in REST}
    optimizer = distmuon.Muon([{"params": list(params.items()), "use_muon": True}])
    optimizer.load_state_dict(convert(alone, optimizer=optimizer, names=MATRICES))
    for param in params.values():
        assert torch.equal(optimizer.state[param]["momentum_buffer"], run.state[param]["momentum_buffer"])


def test_what_the_documentation_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.source == "moonlight")
    source = parameters(case, torch.float32)
    (run,) = case.build(source)
    advance([run], source, range(2))
    monkeypatch.chdir(tmp_path)
    torch.save(run.state_dict(), "moonlight.pt")
    text = (Path(__file__).parents[1] / "docs" / "convert.md").read_text(encoding="utf-8")
    known = {"optimizer": build_ours(case, parameters(case, torch.float32)), "names": names_of([run], source)}
    exec(text.split("```python\n")[1].split("```")[0], known)
    assert known["theirs"]["param_groups"] == run.state_dict()["param_groups"]
    assert all(f"| `{name}` |" in text for name in FORMATS)


def test_settings_of_the_optimizer_can_stay() -> None:
    source, run, optimizer = small()
    for group in optimizer.param_groups:
        group["lr"], group["initial_lr"] = 0.125, 0.25
    state = convert(run.state_dict(), optimizer=optimizer, names=names_of([run], source), settings="optimizer")
    before = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == before
    param = optimizer.param_groups[0]["params"][0]
    assert torch.equal(optimizer.state[param]["momentum_buffer"], run.state[source["tall"]]["momentum_buffer"])


def test_schedulers_find_their_base_rate() -> None:
    source, run, optimizer = small()
    torch.optim.lr_scheduler.LambdaLR(run, lambda step: 0.5)
    optimizer.load_state_dict(convert(run.state_dict(), optimizer=optimizer, names=names_of([run], source)))
    assert [(group["initial_lr"], group["lr"]) for group in optimizer.param_groups] == [(0.03, 0.015), (0.004, 0.002)]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    back = convert(optimizer.state_dict(), target="kellerjordan_single")
    assert not any(isinstance(group["lr"], Tensor) for group in back["param_groups"])
    assert [(group["initial_lr"], group["lr"]) for group in back["param_groups"]] == [(0.03, 0.015), (0.004, 0.002)]


def test_states_of_dion_from_before_its_counters_moved() -> None:
    case = CASES[5]
    source = parameters(case, torch.float32)
    (run,) = case.build(source)
    advance([run], source, range(3))
    new, old = run.state_dict(), run.state_dict()
    old["state"] = {i: {k: v for k, v in one.items() if k != "step_dev"} for i, one in old["state"].items()}
    assert str(convert(old)) == str(convert(new))
    assert {int(one["step"]) for one in convert(old)["state"].values() if "step" in one} == {3}


def test_jordans_scale_is_one_of_dions_for_tall_and_another_for_wide_matrices() -> None:
    case = replace(CASES[5], ours={"ns_coefficients": DION, "nesterov": True, "adjust_lr_fn": None})
    case = replace(case, shapes={**MATRICES, **REST})
    params = parameters(case, torch.float64)
    optimizer = build_ours(case, params)
    advance([optimizer], params, range(3))
    wanted = [["tall", "square"], ["twin", "wide"], list(REST)]
    state = convert(optimizer.state_dict(), target="dion", target_names=wanted)
    assert [group["adjust_lr"] for group in state["param_groups"]] == ["spectral_norm", None, "spectral_norm"]
    back = {name: nn.Parameter(params[name].detach().clone()) for members in wanted for name in members}
    groups: list[dict[str, Any]] = [{"params": [back[name] for name in members]} for members in wanted]
    run = theirs.Dion([*groups[:2], {**groups[2], "algorithm": "adamw"}])
    run.load_state_dict(through_file(state))
    expected = advance([run], back, range(3, 6))
    assert_same_way(advance([optimizer], params, range(3, 6)), expected, TOLERANCE[torch.float64])


def test_torch_muon_alone() -> None:
    params = [nn.Parameter(torch.ones(4, 3))]
    muon = torch.optim.Muon(params)
    params[0].grad = torch.ones(4, 3)
    muon.step()
    ours = distmuon.Muon([("blocks.0.w", nn.Parameter(torch.ones(4, 3)))])
    ours.load_state_dict(convert(muon.state_dict(), optimizer=ours, names=["module.blocks.0._orig_mod.w"]))
    kept = ours.state[ours.param_groups[0]["params"][0]]["momentum_buffer"]
    assert torch.equal(kept, muon.state[params[0]]["momentum_buffer"])
    back, adamw = convert(ours.state_dict(), target="torch")
    assert adamw == {"state": {}, "param_groups": []}
    assert back["param_groups"] == muon.state_dict()["param_groups"]


def test_what_dcp_makes_of_two_optimizers_knows_its_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.LayerNorm(6))
    matrices = [model[0].weight, model[1].weight]
    others = [param for param in model.parameters() if all(param is not one for one in matrices)]
    run = [torch.optim.Muon(matrices, **MUON), torch.optim.AdamW(others, **ADAMW)]
    params = dict(model.named_parameters())
    for _ in range(3):
        model(torch.randn(5, 4)).square().sum().backward()
        for one in run:
            one.step()
    state = through_file(get_optimizer_state_dict(model, run))
    optimizer = distmuon.Muon([{"params": [(n, p) for n, p in params.items() if p.ndim == 2], "use_muon": True}])
    optimizer.add_param_group(
        {"params": [(n, p) for n, p in params.items() if p.ndim < 2], "use_muon": False, "lr": 0.5}
    )
    found = convert(state, optimizer=optimizer)
    names = {**{id(p): n for n, p in params.items()}}
    pair = convert(
        [one.state_dict() for one in run], optimizer=optimizer, names=[names[id(p)] for p in [*matrices, *others]]
    )
    assert str(found) == str(pair)


def test_dtensors_stay_dtensors(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        case = next(case for case in CASES if case.source == "moonlight")
        shard = [torch.distributed.tensor.Shard(0)]
        whole = parameters(case, torch.float32)
        sharded = {
            name: nn.Parameter(torch.distributed.tensor.distribute_tensor(param.detach(), mesh, shard))
            for name, param in whole.items()
        }
        (run,) = case.build(whole)
        advance([run], whole, range(2))
        state = change(run.state_dict())
        for one in state["state"].values():
            for key, value in one.items():
                if isinstance(value, Tensor):
                    one[key] = torch.distributed.tensor.distribute_tensor(value, mesh, shard)
        optimizer = build_ours(case, sharded)
        found = convert(state, optimizer=optimizer, names=names_of([run], whole))
        assert isinstance(found["state"][0]["momentum_buffer"], torch.distributed.tensor.DTensor)
        optimizer.load_state_dict(found)
        momentum = optimizer.state[sharded["tall"]]["momentum_buffer"].full_tensor()
        exact = run.state[whole["tall"]]["momentum_buffer"].double() * (1 - 0.9)
        assert torch.equal(momentum, exact.float())
        # whole tensors, as a file from one device has them, are cut when they are loaded
        other = build_ours(case, sharded)
        other.load_state_dict(convert(run.state_dict(), optimizer=other, names=names_of([run], whole)))
        assert torch.equal(other.state[sharded["tall"]]["momentum_buffer"].full_tensor(), momentum)
    finally:
        torch.distributed.destroy_process_group()


def change(state: Any, group: int | None = None, *, drop: Iterable[str] = (), **settings: Any) -> Any:
    """The state dict with other settings in one group, or in all."""
    groups = [dict(one) for one in state["param_groups"]]
    for number, one in enumerate(groups):
        if group in (None, number):
            one.update(settings)
            for key in drop:
                del one[key]
    return {"state": {i: dict(one) for i, one in state["state"].items()}, "param_groups": groups}


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
