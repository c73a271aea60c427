"""Steps over ranks are steps on one process, to the bit, whatever the layout."""

import pytest
import torch
from harness import Pool
from layouts import LAYOUTS, Reference, assert_same_bits, give_gradients, sharded_optimizer


@pytest.fixture(scope="module")
def pools():
    made = {}
    yield lambda world_size: made.setdefault(world_size, Pool(world_size))
    for pool in made.values():
        pool.close()


def parity(layout, *, dtype=torch.float32, steps=5, oracle="distmuon", settings=None, ours=None, split=None):
    twins = LAYOUTS[layout](dtype)
    optimizer = sharded_optimizer(twins, split, **{**(settings or {}), **(ours or {})})
    reference = Reference(twins, oracle, split, **(settings or {}))
    for step in range(steps):
        give_gradients(twins, step)
        optimizer.step()
        reference.step()
        assert_same_bits(twins, optimizer, reference, f"{layout}, step {step}")


ANY = ["fsdp2 even", "fsdp2 uneven", "fsdp2 few", "ddp", "plain, mesh", "plain, group", "plain, repeat", "plain beside"]
PAIR = ["fsdp2 columns", "tp", "experts 5 on 2", "experts 1 on 2"]
FOUR = ["fsdp2 columns", "hsdp even", "hsdp uneven", "hsdp repeat", "tp", "tp x fsdp2", "expert meshes"]
FOUR += [name for name in LAYOUTS if name.startswith("experts ") and not name.endswith("on 2")]
WHERE = [(1, name) for name in ANY] + [(2, name) for name in ANY + PAIR] + [(3, name) for name in ANY]
WHERE += [(4, name) for name in ANY + FOUR]


def run(pool, *args, **kwargs):
    pool.run(call, *args, kwargs)


def call(function, *args):
    *args, kwargs = args
    return function(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("world_size", "layout"), WHERE)
def test_layout(pools, world_size, layout, dtype):
    run(pools(world_size), parity, layout, dtype=dtype)
