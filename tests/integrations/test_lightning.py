"""Lightning's automatic optimization computes what its loop computes by hand on one process."""

import pytest
import torch

pytest.importorskip("lightning")

from lightning_cases import EPOCHS, by_hand, trained

TOLERANCE = 1e-5


def assert_same(found, wanted, tolerance=0.0):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance, msg=name)


def test_one_process(tmp_path):
    losses, weights, _, with_state = trained("one", tmp_path)
    wanted = by_hand(1)
    assert losses == pytest.approx(wanted[0], rel=1e-6)
    assert_same(weights, wanted[1])
    assert with_state == {name for name in weights if not name.startswith("frozen.")}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_and_resumed(pool, tmp_path, kind):
    """Accumulation, clipping and schedule; a run of one epoch goes on as one that was not disturbed."""
    wanted = by_hand(2)
    found = pool.run(trained, kind, tmp_path)
    pool.run(first_epoch, kind, tmp_path)
    again = pool.run(second_epoch, kind, tmp_path)
    means = [sum(pair) / 2 for pair in zip(found[0][0], found[1][0], strict=True)]
    assert means == pytest.approx(wanted[0], rel=TOLERANCE)
    for (_, weights, owners, with_state), (_, resumed, _, _) in zip(found, again, strict=True):
        assert_same(weights, wanted[1], TOLERANCE)
        assert_same(resumed, weights)
        assert owners == ({0, 1} if kind == "ddp" else set())
        assert with_state == {name for name in weights if not name.startswith("frozen.")}


def first_epoch(kind, folder):
    trained(kind, folder, epochs=1)


def second_epoch(kind, folder):
    return trained(kind, folder, epochs=EPOCHS, checkpoint="1.ckpt")
