"""Steps of lmo groups and of cautious decay over ranks are steps on one process, whatever the layout."""

import pytest
import torch
from harness import Pool
from layouts import LAYOUTS, SETTINGS, assert_same_bits, give_gradients, groups_of, sharded_optimizer

import distmuon


@pytest.fixture(scope="module")
def pools():
    made = {}

    def run(world_size, function, *args, **kwargs):
        return made.setdefault(world_size, Pool(world_size)).run(_call, function, args, kwargs)

    yield run
    for pool in made.values():
        pool.close()


def _call(function, args, kwargs):
    return function(*args, **kwargs)


class Whole:
    """One optimizer of this package over the whole parameters, by which those over ranks are judged."""

    def __init__(self, twins, groups, **settings):
        self.twins, self.optimizer = twins, distmuon.Muon(groups, **{**SETTINGS, **settings})

    def step(self):
        self.optimizer.step()

    def state(self, name):
        return self.optimizer.state.get(self.twins.whole[name], {})


# --- what ranks run


def cautious(layout, dtype):
    twins = LAYOUTS[layout](dtype)
    settings = dict(cautious_wd=True, weight_decay=1.5, adamw_weight_decay=2.5)
    optimizer, whole = sharded_optimizer(twins, **settings), Whole(twins, groups_of(twins.whole), **settings)
    for step in range(3):
        give_gradients(twins, step)
        optimizer.step()
        whole.step()
    assert_same_bits(twins, optimizer, whole)


# --- tests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, "fsdp2 uneven"), (4, "fsdp2 few"), (4, "fsdp2 columns"), (4, "hsdp uneven"), (4, "tp x fsdp2"), (2, "ddp")],
)
def test_cautious_decay_has_the_bits_of_one_process(pools, world_size, layout, dtype):
    pools(world_size, cautious, layout, dtype)
