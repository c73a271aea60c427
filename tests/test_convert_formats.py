"""What is particular to a format, and to the state that it comes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import convert_sources as theirs
import pytest
import torch
from convert_cases import (
    ADAMW,
    CASES,
    DION,
    MATRICES,
    MUON,
    REST,
    TOLERANCE,
    advance,
    assert_same_way,
    build_ours,
    change,
    matrices,
    names_of,
    parameters,
    rest,
    small,
    through_file,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import distmuon
from distmuon.checkpoint import convert
from distmuon.checkpoint.formats import FORMATS


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
