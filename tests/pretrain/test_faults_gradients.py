"""NaN in the gradient of one rank, and clipping that leaves such gradients as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_helpers import LOSS, assert_codes, losses, said
from fault_runs import Fault
from soak_ranks import attempt
from torch import nn

import distmuon
from distmuon.pretrain import UserError, load_config
from distmuon.pretrain.finite import MOST_SKIPPED, FiniteGuard
from distmuon.pretrain.metrics import read_metrics

Tiny = Callable[..., Path]
CHANGES = {"train__steps": 6, "train__device_batch": 4, "train__eval_every": 0, "checkpoint__every": 2}
FLAGS = ["--parallel.dp_shard=2"]
NAN = Fault("NaN in a gradient", 1, 4)


def test_raise_ends_all_with_the_name_and_saves_nothing_of_it(tiny: Tiny, tmp_path: Path) -> None:
    ended = attempt([f"--config={tiny(**CHANGES)}", *FLAGS], 2, tmp_path, [NAN])
    assert_codes(ended, [1, 1])
    assert said(ended[1]) == ""
    sentence = said(ended[0]).splitlines()[-1]
    assert sentence.startswith("error: the loss or its gradient is not finite at step 4 with optim.lr 0.003 (NaN or an")
    # of this rank alone, as clipping has not scaled the others by NaN
    assert "in the gradient of 'model.embed_tokens.weight' on rank 1: nothing was updated)" in sentence
    assert "--resume auto and a lower rate, such as --optim.lr 0.001" in sentence
    assert [path.name for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()] == ["step-2"]


def test_skip_leaves_the_step_out_and_counts_it(tiny: Tiny, tmp_path: Path) -> None:
    flags = [f"--config={tiny(**CHANGES)}", *FLAGS, "--optim.on_nonfinite=skip"]
    ended = attempt(flags, 2, tmp_path, [NAN])
    assert_codes(ended, [0, 0])
    records = read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert [record["optim/skipped_steps"] for record in records] == [0, 0, 0, 1, 1, 1]
    assert all(math.isfinite(record[LOSS]) for record in records)
    # step 5 begins with the weights of step 4
    whole = attempt([f"--config={tiny('whole', **CHANGES)}", *FLAGS], 2, tmp_path)
    assert_codes(whole, [0, 0])
    skipped, expected = losses(tmp_path / "runs" / "tiny"), losses(tmp_path / "runs" / "whole")
    assert [skipped[step] == expected[step] for step in (1, 2, 3)] == [True] * 3
    assert skipped[4][0] == expected[4][0]
    assert skipped[5][0] != expected[5][0]


def test_adamw_ends_before_its_step(tiny: Tiny, tmp_path: Path) -> None:
    ended = attempt([f"--config={tiny(**CHANGES)}", *FLAGS, "--optim.name=adamw"], 2, tmp_path, [NAN])
    assert_codes(ended, [1, 1])
    assert "not finite at step 4 with optim.lr 0.003: go on from the last checkpoint" in said(ended[0])


def _guard(tiny: Tiny, *flags: str) -> tuple[FiniteGuard, nn.Parameter, torch.optim.Optimizer]:
    param = nn.Parameter(torch.ones(4, 4))
    config = load_config(tiny(), *flags)
    optimizer = distmuon.Muon([("w", param)], lr=0.1, on_nonfinite=config.optim.on_nonfinite)
    return FiniteGuard(config, optimizer, torch.device("cpu")), param, optimizer


def _step(guard: FiniteGuard, param: nn.Parameter, optimizer: torch.optim.Optimizer, step: int, value: float) -> None:
    param.grad = torch.full_like(param, value)
    guard.note(step, torch.tensor(1.0), param.grad.norm())
    with guard.deciding(step):
        optimizer.step()
    guard.check()


def test_too_many_skipped_steps_in_a_row_are_the_end(tiny: Tiny) -> None:
    guard, param, optimizer = _guard(tiny, "--optim.on_nonfinite=skip")
    bad = [math.nan] * (MOST_SKIPPED - 1)
    # a good step in between starts the count again
    for step, value in enumerate([1.0, *bad, 1.0, *bad], start=1):
        _step(guard, param, optimizer, step, value)
    assert guard.skipped_steps == 2 * (MOST_SKIPPED - 1)
    with pytest.raises(UserError, match=r"at step 41 .* \(20 steps in a row were left out\)"):
        _step(guard, param, optimizer, 41, math.inf)


def test_without_a_choice_the_gradient_reaches_no_momentum(tiny: Tiny) -> None:
    guard, param, optimizer = _guard(tiny, "--optim.on_nonfinite=null")
    _step(guard, param, optimizer, 1, 1.0)
    before = param.detach().clone(), optimizer.state[param]["momentum_buffer"].clone()
    with pytest.raises(UserError, match="not finite at step 2 with"):
        _step(guard, param, optimizer, 2, math.nan)
    assert torch.equal(param, before[0])
    assert torch.equal(optimizer.state[param]["momentum_buffer"], before[1])


def test_a_norm_that_overflows_is_told_though_each_gradient_is_finite(tiny: Tiny) -> None:
    guard, param, optimizer = _guard(tiny, "--optim.on_nonfinite=raise")
    with pytest.raises(UserError, match="not finite at step 1 with"):
        _step(guard, param, optimizer, 1, 3e38)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_can_leave_gradients_of_no_norm_as_they_are(bad: float) -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    first.grad, second.grad = torch.tensor([1.0, bad, 2.0]), torch.ones(2)
    norm = distmuon.clip_grad_norm_([first, second], 0.5, keep_nonfinite=True)
    assert not norm.isfinite()
    assert torch.equal(second.grad, torch.ones(2))
    assert torch.equal(first.grad.isfinite(), torch.tensor([True, False, True]))
    # where it is finite, torch's bits
    first.grad[1] = 1.0
    pairs = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    pairs[0].grad, pairs[1].grad = first.grad.clone(), second.grad.clone()
    nn.utils.clip_grad_norm_(pairs, 0.5)
    distmuon.clip_grad_norm_([first, second], 0.5, keep_nonfinite=True)
    assert torch.equal(first.grad, pairs[0].grad)
    assert torch.equal(second.grad, pairs[1].grad)
