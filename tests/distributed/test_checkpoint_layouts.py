"""Optimizers that are saved in one layout and loaded in another go on as if nothing had happened."""

from concurrent.futures import ThreadPoolExecutor

import checkpoint_layouts as layouts
import pytest
import torch
from checkpoint_layouts import EVEN, UNEVEN, Case
from harness import Pool
from test_teams import TABLES

NAMES = list(layouts.LAYOUTS)


@pytest.fixture(scope="module")
def on():
    """Calls a function with the name of a layout on the ranks of that layout; what any of them found."""
    pools = {}

    def run(layout, function, *args):
        size = layouts.LAYOUTS[layout][0]
        if size == 0:
            return function(layout, *args)
        results = pools.setdefault(size, Pool(size)).run(function, layout, *args)
        return [f"rank {rank}: {text}" for rank, found in enumerate(results) for text in found]

    yield run
    # ranks with many groups take seconds to leave them
    with ThreadPoolExecutor() as threads:
        list(threads.map(Pool.close, pools.values()))


@pytest.fixture(scope="module")
def saved(on, tmp_path_factory):
    """The folder of a layout, where a case was saved in each way."""
    folders = {}

    def folder_of(source, case=UNEVEN):
        key = source, repr(case)
        if key not in folders:
            folder = tmp_path_factory.mktemp(source)
            assert on(source, layouts.save, folder, case) == []
            folders[key] = folder
        return folders[key]

    return folder_of


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_from_to(on, saved, source, target):
    """By torch.distributed.checkpoint, each rank what it stores."""
    assert on(target, layouts.load, saved(source), ["sharded"], UNEVEN) == []


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_full_from_to(on, saved, source, target):
    """By one file of whole tensors that every rank reads, or, in every other cell, rank 0 alone."""
    case = EVEN if target == "tp2xfsdp2" else UNEVEN
    broadcast = (NAMES.index(source) + NAMES.index(target)) % 2 and target != "plain"
    assert on(target, layouts.load, saved(source, case), ["broadcast" if broadcast else "full"], case) == []


# Each layout once as source and once as target
RING = list(zip(NAMES, NAMES[3:] + NAMES[:3], strict=True))


@pytest.mark.parametrize(("source", "target"), RING)
def test_flattened_from_to(on, saved, source, target):
    assert on(target, layouts.load, saved(source), ["flat"], UNEVEN) == []


@pytest.mark.parametrize("target", ["ddp2", "plain", "fsdp3", "hsdp2x2", "tp2xfsdp2"])
@pytest.mark.parametrize("source", ["ddp2", "plain"])
def test_torch_save_from_to(on, saved, source, target):
    """A file of plain ``state_dict()``; ranks that shard take their parts of it."""
    assert on(target, layouts.load, saved(source, EVEN), ["plain"], EVEN) == []


@pytest.mark.parametrize("layout", NAMES)
def test_the_dummy_step_of_dcp_changes_nothing(on, layout):
    assert on(layout, layouts.dummy_step) == []


@pytest.mark.parametrize(("source", "target"), [("fsdp4", "plain"), ("plain", "fsdp2"), ("hsdp2x2", "ddp2")])
def test_loading_while_there_are_gradients(on, saved, source, target):
    """DCP then makes no dummy step, so that it finds only the state that the optimizer says it has."""
    ways = ["sharded", "flat", "full", "broadcast"][: 3 if target == "plain" else 4]
    assert on(target, layouts.load, saved(source), ways, UNEVEN, None, True) == []


@pytest.mark.parametrize(("source", "target"), [("fsdp4", "ddp2"), ("plain", "tp2xfsdp2")])
def test_parameters_that_had_no_gradient_before_saving(on, saved, source, target):
    case = Case(oracle="distmuon", width=8, missing=("few.weight", "norm.bias", "conv.weight"))
    assert on(target, layouts.load, saved(source, case), ["sharded", "flat", "full"], case) == []


@pytest.mark.parametrize(("dtype", "momentum"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize(("source", "target"), [("fsdp4", "ddp2"), ("ddp2", "fsdp3"), ("hsdp2x2", "plain")])
def test_momentum_dtype(on, saved, source, target, dtype, momentum):
    case = Case({"momentum_dtype": getattr(torch, momentum)}, getattr(torch, dtype), oracle="distmuon")
    assert on(target, layouts.load, saved(source, case), ["sharded", "full"], case) == []


@pytest.mark.parametrize("target", ["ddp2", "plain"])
def test_rates_that_are_tensors(on, saved, target):
    case = Case({"lr": torch.tensor(0.03), "adamw_lr": torch.tensor(0.004)})
    other = {"lr": torch.tensor(0.5), "adamw_lr": torch.tensor(0.7)}
    assert on(target, layouts.load, saved("fsdp2", case), ["sharded", "full"], case, other) == []


def test_shards_of_another_layout_are_an_error(on):
    """torch takes them, and the next step would take a shard for the whole or for another one."""
    for source, target in [("fsdp2", "ddp2"), ("fsdp4", "hsdp2x2")]:
        found = on(source, layouts.loaded_without_torch, target)
        assert len(found) == layouts.LAYOUTS[source][0]
        assert all("momentum_buffer of 'experts' is (Shard(dim=0),) on DeviceMesh" in text for text in found)
        assert all("with torch.distributed.checkpoint and its get_optimizer_state_dict" in text for text in found)


PLANS = {
    "small buckets": (dict(bucket_bytes=64), False),
    "replicas repeat": (dict(replicas="repeat"), False),
    "teams": (dict(cost_table=TABLES["split"]), True),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["hsdp2x2", "fsdp2"])
def test_owners_buckets_and_teams_are_not_saved(on, tmp_path, layout, plan):
    assert on(layout, layouts.other_plan, tmp_path, *PLANS[plan]) == []
