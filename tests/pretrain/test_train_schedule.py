"""Learning rate factors against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from distmuon.pretrain.config import OptimConfig
from distmuon.pretrain.schedule import build_scheduler, lr_factor


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (59, 1.0), (60, 1.0), (70, 0.775), (80, 0.55), (99, 0.1225)],
)
def test_wsd_warms_up_holds_and_goes_down(step: int, factor: float) -> None:
    found = lr_factor(step, steps=100, warmup_steps=3, warmdown_ratio=0.4, final_lr_frac=0.1)
    assert found == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.5), (1, 1.0), (51, 0.5), (101, 0.0)])
def test_cosine_starts_after_the_warmup(step: int, factor: float) -> None:
    assert lr_factor(step, steps=101, schedule="cosine", warmup_steps=1) == pytest.approx(factor, abs=1e-12)


def test_constant_stays() -> None:
    assert [lr_factor(step, steps=4, schedule="constant") for step in range(4)] == [1.0] * 4


def test_without_warmdown_the_last_step_has_the_peak_rate() -> None:
    assert lr_factor(9, steps=10, warmdown_ratio=0.0) == 1.0


def test_a_warmup_longer_than_the_run_never_reaches_the_peak() -> None:
    assert lr_factor(9, steps=10, warmup_steps=100) == pytest.approx(10 / 101)


def test_scheduler_scales_every_group() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 4.0}])
    scheduler = build_scheduler(optimizer, OptimConfig(warmup_steps=1, warmdown_ratio=0.5), steps=4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == [[1.0, 2.0], [2.0, 4.0], [2.0, 4.0], [1.0, 2.0]]
