"""QK-Clip over ranks is that of one process with the whole batch.

Heads of 4 rows are cut into shards of 6, 3 or 2, and those of Qwen2, 3 heads of 6 rows, into 5, 5, 5 and 3.
"""

import pytest
import qk_clip_cases as cases
import torch
from harness import Pool, RankError

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}  # gradients are summed in another order


@pytest.fixture(scope="module")
def pools():
    made = {}
    yield lambda world_size: made.setdefault(world_size, Pool(world_size))
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize(
    ("layout", "world_size", "kind", "gqa"),
    [
        ("ddp", 2, "llama", "group"),
        ("fsdp", 2, "llama", "query"),
        ("fsdp early", 2, "llama", "group"),
        ("fsdp columns", 2, "llama", "group"),
        ("fsdp", 4, "llama", "group"),
        ("fsdp", 4, "qwen2", "group"),
        ("fsdp", 4, "deepseek_v3", "group"),
        ("hsdp", 4, "llama", "query"),
        ("tp", 4, "llama", "group"),
    ],
)
def test_equals_one_process(pools, layout, world_size, kind, gqa):
    expected_maxima, expected = cases.alone(kind, gqa)
    assert all((maxima > cases.TAU).any() for maxima in expected_maxima[:1])
    results = pools(world_size).run(cases.in_layout, layout, kind, gqa)
    for maxima, weights in results:
        for found, wanted in zip(maxima, expected_maxima, strict=True):
            torch.testing.assert_close(found, wanted, **TOLERANCE)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
            )
    for maxima, weights in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(maxima, results[0][0], strict=True))
        if layout in ("ddp", "fsdp", "hsdp"):
            assert all(torch.equal(weight, results[0][1][name]) for name, weight in weights.items())


def test_a_rank_that_saw_nothing(pools):
    (weights, metrics), (others, same) = pools(2).run(cases.silent_rank)
    assert metrics == same and metrics["qk_clip/clipped_heads"] > 0
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    fresh = cases.make_model().state_dict()
    assert any(not torch.equal(weight, fresh[name]) for name, weight in weights.items())


def test_replicas_that_the_optimizer_knows(pools):
    found, same = pools(2).run(cases.mesh_of_the_optimizer)
    assert found == same and found[0] == found[1]
    assert found[0]["qk_clip/clipped_heads"] > 0


def test_one_collective_for_all_layers(pools):
    for counts in pools(2).run(cases.collectives):
        assert [sum(count.values()) for count in counts] == [1, 0, 1]
        assert "allreduce" in str(counts[0]).replace("_", "")


def test_plain_parameters_of_unknown_replicas(pools):
    with pytest.raises(RankError) as caught:
        pools(2).run(cases.plain_and_unknown)
    for error in caught.value.errors.values():
        assert error.startswith("ValueError: QK-Clip finds plain parameters in a job of 2 ranks")


def test_optimizers_of_shards(pools):
    for refused, whole, layers in pools(2).run(cases.optimizers_of_shards):
        assert "updates none of the attention projections" in refused and "before fully_shard" in refused
        assert whole and len(layers) == cases.LAYERS
