"""How many processes a run has and how they are arranged."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from distmuon.pretrain.config import ParallelConfig
from distmuon.pretrain.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The arrangement of processes, no -1 left; the product is the world size."""

    dp_replicate: int
    dp_shard: int
    tp: int


def world_size() -> int:
    """Processes of this run, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_layout(config: ParallelConfig, world: int) -> Layout:
    """Fill the -1 and check the product.

    Args:
        config: The ``parallel`` section.
        world: Number of processes.

    Raises:
        UserError: If the product is not ``world``, saying what would fit, or if ``world`` is over 1.
    """
    sizes = {"dp_replicate": config.dp_replicate, "dp_shard": config.dp_shard, "tp": config.tp}
    for key, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"parallel.{key} is {size}, and it is a number of processes: give 1 or more, or -1.")
    free = [key for key, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"parallel.{' and parallel.'.join(free)} are both -1, and only one can be: fix the others.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and world % known == 0:
        sizes[free[0]] = world // known
    if math.prod(sizes.values()) != world:
        product = " x ".join(f"{key} {size}" for key, size in sizes.items())
        raise UserError(
            f"parallel.{product} does not make the {world} process{'es' * (world > 1)} of this run: "
            f"{_fitting(sizes, world)}, or start {known} process{'es' * (known > 1)}."
        )
    if world > 1:
        raise UserError(
            f"this run has {world} processes, and this version trains on one: start it without torchrun "
            "(sharding arrives with the sharded step)."
        )
    return Layout(**sizes)


def _fitting(sizes: dict[str, int], world: int) -> str:
    for key in ("dp_shard", "dp_replicate", "tp"):
        others = math.prod(size for name, size in sizes.items() if name != key and size != -1)
        if world % others == 0:
            return f"set parallel.{key} to {world // others}"
    return f"set parallel.dp_shard to {world} and the others to 1"
