"""A loop of accelerate computes what the same loop computes by hand on one process."""

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate_cases import alone, by_hand, resumed, scaled, trained

TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}


def assert_same(found, wanted, tolerance):
    losses, weights = found
    assert losses == pytest.approx(wanted[0], rel=max(tolerance, 1e-6))
    assert weights.keys() == wanted[1].keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, wanted[1][name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("order", ["before", "after"])
def test_one_process(order):
    with alone():
        losses, weights, kind, _ = trained("one", order)
    assert kind == "NO"
    assert_same((losses, weights), by_hand(1), 0.0)


@pytest.mark.parametrize(("kind", "order"), [("ddp", "before"), ("ddp", "after"), ("fsdp2", "before")])
def test_two_processes(pool, kind, order):
    """Accumulation, clipping and schedule; accelerate itself wants to shard model and optimizer together."""
    wanted = by_hand(2)
    for losses, weights, distributed, owners in pool.run(trained, kind, order):
        assert distributed == TYPES[kind]
        # the replicas of DDP share the work
        assert owners == ({0, 1} if kind == "ddp" else set())
        assert_same((losses, weights), wanted, 1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_bfloat16(pool, kind):
    """Forward passes in bfloat16, weights and updates in float32."""
    wanted, exact = by_hand(2, autocast=True), by_hand(2)
    for losses, weights, _, _ in pool.run(trained, kind, "before", "bf16"):
        assert all(value.dtype is torch.float32 for value in weights.values())
        assert losses == pytest.approx(wanted[0], rel=1e-2)
        assert losses != pytest.approx(exact[0], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, wanted[1][name], rtol=0.0, atol=1e-2, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_resumed(pool, tmp_path, kind):
    for differ, lr, count in pool.run(resumed, kind, tmp_path):
        assert differ == []
        assert (lr, count) == (0.02 / 5, 5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_all_ranks_skip_the_step_of_a_float16_overflow(pool, kind):
    for steps, finite in pool.run(scaled, kind):
        assert steps == [(False, True, 1024.0), (True, False, 512.0), (False, True, 512.0)]
        assert finite
