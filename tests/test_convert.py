"""State of other Muons, taken over and given back: the next updates are theirs, and nothing is lost on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from convert_cases import (
    ALL,
    CASES,
    DION,
    MATRICES,
    REST,
    TOLERANCE,
    Case,
    advance,
    assert_same_way,
    build_ours,
    cases,
    copy_weights,
    names_of,
    ours_names,
    parameters,
    state_of,
    through_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import distmuon
from distmuon.checkpoint import convert


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
