"""Processes that are started again find each other in a store that still has the words of those before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from distmuon.pretrain import RankLost, TrainConfig, UserError
from distmuon.pretrain.batch import plan_batches
from distmuon.pretrain.meeting import arrive, welcome

SECONDS = timedelta(seconds=20)


def meet(store: dist.Store, world: int) -> set[str]:
    with ThreadPoolExecutor(world) as threads:
        others = [threads.submit(arrive, store, rank) for rank in range(1, world)]
        first = threads.submit(welcome, store, world, SECONDS)
        return {first.result(30), *(other.result(30) for other in others)}


def test_each_start_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    # on more ranks, on fewer, and after a start in which only some came
    names = []
    for world in (3, 4, 2):
        (name,) = meet(store, world)
        names.append(name)
        store.set("distmuon/hello/1", "of one that has ended")
    assert len(set(names)) == 3


def test_ranks_that_do_not_come_are_a_sentence() -> None:
    store = dist.HashStore()
    store.set("distmuon/hello/2", "of one that has ended")
    with pytest.raises(RankLost, match=r"rank 0: 2 of the 3 processes .* did not come within 0.3 s, rank 1 among them"):
        welcome(store, 3, timedelta(seconds=0.3))


@pytest.mark.parametrize(("ranks", "fits"), [(3, 2), (5, 4), (7, 4)])
def test_a_number_of_processes_that_does_not_divide_the_batch_says_which_does(ranks: int, fits: int) -> None:
    config = TrainConfig(steps=1, global_batch_tokens=256, device_batch=4)
    with pytest.raises(
        UserError, match=rf"x {ranks} data ranks .* or start as many processes as make {fits} data ranks"
    ):
        plan_batches(config, 32, ranks)
    assert plan_batches(config, 32, fits).tokens == 256
