"""The recipe for TorchTitan in examples/, with its containers; where TorchTitan is installed."""

import pytest
import torch

pytest.importorskip("torchtitan.components.optimizer", exc_type=ImportError)

from titan_cases import by_hand, saved_and_gone_on


def test_two_processes_and_resumed(pool, tmp_path):
    wanted = by_hand()
    for weights, differ in pool.run(saved_and_gone_on, tmp_path):
        assert differ == []
        for name, value in weights.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
