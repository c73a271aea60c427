"""How many processes a run has and how they are arranged: numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distmuon.pretrain.config import ParallelConfig, TrainConfig
from distmuon.pretrain.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The arrangement of processes, no -1 left; the product is the world size.

    Ranks of one ``tp`` group are neighbours, then come those of ``dp_shard``, then those of ``dp_replicate``.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.dp_replicate * self.dp_shard * self.tp

    @property
    def data_ranks(self) -> int:
        """Parts that a global batch is cut into."""
        return self.dp_replicate * self.dp_shard

    @property
    def fully_shards(self) -> bool:
        """Whether FSDP2 holds the parameters; DDP takes no tensor parallel ones, so replicas of those are HSDP."""
        return self.dp_shard > 1 or (self.tp > 1 and self.dp_replicate > 1)

    @property
    def replicates(self) -> bool:
        """Whether every rank holds the whole model and DDP averages the gradients."""
        return self.dp_replicate > 1 and not self.fully_shards

    @property
    def mesh_dims(self) -> dict[str, int]:
        """Names and sizes of the device mesh; what is not used is left out."""
        dims = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "tp": self.tp}
        return {name: size for name, size in dims.items() if size > 1 or (name == "dp_shard" and self.fully_shards)}

    def data_rank(self, rank: int) -> int:
        """Which part of a global batch a process reads; ranks of one ``tp`` group read the same."""
        return rank // self.tp

    def __str__(self) -> str:
        used = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "tp": self.tp}
        return " x ".join(f"{name} {size}" for name, size in used.items() if size > 1) or "one process"


def resolve_layout(config: ParallelConfig, world: int) -> Layout:
    """Fill the -1 and check the product.

    Args:
        config: The ``parallel`` section.
        world: Number of processes.

    Raises:
        UserError: If the product is not ``world``, saying what would fit.
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
    return Layout(**sizes)


def check_features(layout: Layout, config: TrainConfig) -> None:
    """Check that the ``train`` section asks for nothing that a layout cannot do.

    Raises:
        UserError: For a compiled and recomputed tensor parallel model.
    """
    if layout.tp > 1 and config.compile and config.activation_checkpointing:
        raise UserError(
            f"parallel.tp is {layout.tp} with train.compile and train.activation_checkpointing, and torch compiles no "
            "tensor parallel block that is recomputed: set one of the three off."
        )


def _fitting(sizes: dict[str, int], world: int) -> str:
    for key in ("dp_shard", "dp_replicate", "tp"):
        others = math.prod(size for name, size in sizes.items() if name != key and size != -1)
        if world % others == 0:
            return f"set parallel.{key} to {world // others}"
    return f"set parallel.dp_shard to {world} and the others to 1"
