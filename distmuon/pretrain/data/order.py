"""The endless, seeded order of training samples, with a position that can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from distmuon.pretrain.errors import UserError


class ShuffledBatches:
    """A batch sampler: each epoch is a permutation of all samples that only seed and epoch determine.

    The samples of all ranks together form one fixed sequence. At each step the ranks take
    ``world_size * batch`` of it, rank r the r-th run of ``batch``; a global batch is therefore the same set at
    any number of ranks. Batches run on over the end of an epoch, so none is short.

    Args:
        samples: How many samples there are.
        batch: Samples in one batch of one rank.
        seed: Seed of the permutations, 0 or more.
        rank: This process.
        world_size: How many processes read.
    """

    def __init__(self, samples: int, batch: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch < 1:
            raise UserError(f"the device batch is {batch}, but must be at least 1; set a positive number.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} must lie in 0..{world_size - 1} for world_size {world_size}.")
        self.samples = samples
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        return _Position(self)


class _Position:
    """The iterator; its state is one number, so saving costs nothing."""

    def __init__(self, order: ShuffledBatches) -> None:
        self._order = order
        self._consumed = 0  # samples taken by all ranks together
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __iter__(self) -> _Position:
        return self

    def __next__(self) -> list[int]:
        order = self._order
        start = self._consumed + order.rank * order.batch
        self._consumed += order.world_size * order.batch
        return [self._sample(number) for number in range(start, start + order.batch)]

    def _sample(self, number: int) -> int:
        epoch, offset = divmod(number, self._order.samples)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._order.seed, epoch]))
            self._permutation = generator.permutation(self._order.samples)
            self._epoch = epoch
        return int(self._permutation[offset])

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; they fit any batch size and number of ranks."""
        return {"consumed": self._consumed, "samples": self._order.samples, "seed": self._order.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            UserError: The state belongs to other data or to another seed.
        """
        for key, found, change in (
            ("samples", self._order.samples, "the data or data.sequence_length changed"),
            ("seed", self._order.seed, "the data seed changed"),
        ):
            if state[key] != found:
                raise UserError(
                    f"the checkpoint was reading data with {key} {state[key]}, but this run has {found}: "
                    f"{change}; restore the setting, or start a new run."
                )
        self._consumed = int(state["consumed"])
