"""NorMuon and AdaMuon over ranks: one process to the bit, whatever the layout, and through checkpoints.

One process is compared with the formulas of the papers in tests/test_family.py.
"""

import checkpoint_layouts
import pytest
import test_blocks
import torch
import torch.distributed as dist
from harness import Pool
from layouts import LAYOUTS, distribute, full, give_gradients, mesh_of, sharded_optimizer
from test_blocks import PARAMETERS, TRANSPOSED
from test_parity_ranks import WHERE, in_legs, parity
from torch.distributed.tensor import DTensor, Replicate, Shard

from distmuon.moments import STATE_KEY

VARIANTS = ("normuon", "adamuon")


# --- what ranks run


def moments_of(layout, variant):
    """Placements and shapes of the second moments by name, for this rank."""
    twins = LAYOUTS[layout](torch.float32)
    optimizer = sharded_optimizer(twins, variant=variant)
    give_gradients(twins, 0)
    optimizer.step()
    found = {}
    for name, param in twins.ours.items():
        moments = optimizer.state[param].get(STATE_KEY)
        if moments is not None:
            assert isinstance(moments, DTensor) == isinstance(param, DTensor)
            placements = moments.placements if isinstance(moments, DTensor) else ()
            found[name] = tuple(moments.shape), tuple(map(str, placements))
    return found


def narrow(variant):
    """A matrix of one column on ranks that share columns: most store none of it, and all store its rows' moments."""
    twins = LAYOUTS["experts columns"](torch.float32)
    distribute(twins, "narrow", (6, 1), mesh_of(4), [Shard(1)], torch.float32)
    distribute(twins, "grid", (5, 3), mesh_of(2, 2), [Shard(0), Shard(1)], torch.float32)
    distribute(twins, "grid, copies", (5, 3), mesh_of(2, 2), [Replicate(), Shard(1)], torch.float32)
    optimizer = sharded_optimizer(twins, variant=variant)
    for step in range(3):
        give_gradients(twins, step)
        optimizer.step()
    for name in twins.ours:
        moments = optimizer.state[twins.ours[name]][STATE_KEY]
        # a copy that some rank has missed would differ from the others
        mine = [full(moments), None]
        told = [None] * dist.get_world_size()
        local = moments.to_local() if variant == "normuon" and name == "narrow" else None
        dist.all_gather_object(told, local)
        assert local is None or all(torch.equal(other, mine[0]) for other in told), (name, told)


def blocks(layout, parameters, variant):
    """Blocks of parameters have the update of parameters of their own."""
    test_blocks.parity(layout, parameters, "distmuon", {"variant": variant, "adjust_lr_fn": "match_rms_adamw"})


def sent(variant, dtype):
    """Bytes that a rank sends, over those without second moments."""
    counts = []
    for settings in ({}, {"variant": variant}):
        twins = LAYOUTS["fsdp2 even"](torch.float32)
        optimizer = sharded_optimizer(twins, step_stats=True, wire_dtype=dtype, **settings)
        give_gradients(twins, 0)
        optimizer.step()
        counts.append(optimizer.last_step_stats()["optim/bytes_sent"])
    return counts


# --- tests


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world_size", "layout"), WHERE)
def test_layout(pools, world_size, layout, variant):
    pools(world_size, parity, layout, steps=3, settings={"variant": variant})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["fsdp2 uneven", "hsdp uneven", "fsdp2 columns"])
def test_numbers_of_other_widths(pools, layout, variant):
    """What travels in two words, in one, and in as many bits as it has."""
    pools(4, parity, layout, steps=2, dtype=torch.bfloat16, settings={"variant": variant})
    pools(4, parity, layout, steps=2, settings={"variant": variant, "ns_dtype": torch.float32})
    pools(4, parity, layout, steps=2, dtype=torch.float64, settings={"variant": variant, "ns_dtype": torch.float64})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bucket_bytes", [1, 200])
def test_buckets_change_no_bit(pools, bucket_bytes, variant):
    for layout in ("fsdp2 uneven", "hsdp uneven", "plain, mesh", "expert meshes"):
        pools(4, parity, layout, steps=2, settings={"variant": variant}, ours={"bucket_bytes": bucket_bytes})


@pytest.mark.parametrize("variant", VARIANTS)
def test_checksums_of_what_travels(pools, variant):
    for layout in ("fsdp2 uneven", "plain, mesh"):
        pools(2, parity, layout, steps=2, settings={"variant": variant}, ours={"verify_exchange": True})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world_size", "layout"), test_blocks.WHERE)
def test_blocks_of_parameters(pools, world_size, layout, variant):
    pools(world_size, blocks, layout, PARAMETERS, variant)
    pools(world_size, blocks, layout, TRANSPOSED, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_without_columns_keep_the_rows(pools, variant):
    pools(4, narrow, variant)


def test_state_is_laid_out_as_the_parameter(pools):
    for rank in pools(4, moments_of, "fsdp2 columns", "normuon"):
        assert rank["up.weight"] == ((16, 1), ("R",))
        assert rank["experts"] == ((4, 8, 1), ("S(1)",))
    for rank in pools(4, moments_of, "fsdp2 uneven", "normuon"):
        assert rank["up.weight"] == ((7, 1), ("S(0)",))
        assert rank["conv.weight"] == ((6, 1, 1), ("S(0)",))
    for rank in pools(4, moments_of, "hsdp uneven", "adamuon"):
        assert rank["up.weight"] == ((7, 6), ("R", "S(0)"))


def test_bytes_that_second_moments_take(pools):
    """float32 beside bfloat16 matrices is three times as much, there and back; rows are a few words."""
    for rank in pools(2, sent, "adamuon", torch.bfloat16):
        assert rank[1] == 3 * rank[0]
    for rank in pools(2, sent, "adamuon", torch.float32):
        assert rank[1] == 2 * rank[0]
    for rank in pools(2, sent, "normuon", torch.bfloat16):
        assert rank[0] < rank[1] < 1.5 * rank[0]


CHECKPOINTS = [
    ("fsdp4", "plain"),
    ("plain", "fsdp3"),
    ("hsdp2x2", "fsdp2"),
    ("ddp2", "hsdp2x2"),
    ("fsdp2", "tp2xfsdp2"),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("source", "target"), CHECKPOINTS)
def test_checkpoints(tmp_path, source, target, variant):
    case = checkpoint_layouts.Case({"variant": variant}, oracle="distmuon", width=8)
    on(source, checkpoint_layouts.save, tmp_path, case)
    ways = ["sharded", "flat", "full"] + (["plain"] if source in ("ddp2", "plain") else [])
    ways += ["broadcast"] if target not in ("plain", "tp2xfsdp2") else []
    on(target, checkpoint_layouts.load, tmp_path, ways, case)


def on(layout, function, *args):
    size = checkpoint_layouts.LAYOUTS[layout][0]
    if size == 0:
        assert function(layout, *args) == []
        return
    pool = Pool(size)
    try:
        assert [text for found in pool.run(function, layout, *args) for text in found] == []
    finally:
        pool.close()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["ddp", "hsdp uneven"])
def test_updates_that_come_back_in_legs(pools, layout, variant):
    for legs in pools(4, in_legs, layout, variant=variant):
        assert legs > 1
