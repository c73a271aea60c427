"""Which shapes and sizes are measured: some for the fit, and others that say how good it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Shape = tuple[int, int]


@dataclass(frozen=True)
class Shapes:
    """Rows and columns of matrices.

    Attributes:
        fitted: What rates are fitted to: square and wide, on either side of each change in how products are run.
        held_out: What predictions are compared on, between those.
    """

    fitted: tuple[Shape, ...]
    held_out: tuple[Shape, ...]

    @property
    def all(self) -> tuple[Shape, ...]:
        """Both, in order."""
        return tuple(sorted({*self.fitted, *self.held_out}))


@dataclass(frozen=True)
class Sizes:
    """Bytes that travel, or rows of square matrices.

    Attributes:
        fitted: What rates are fitted to.
        held_out: What predictions are compared on, between those.
    """

    fitted: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """Both, in order."""
        return tuple(sorted({*self.fitted, *self.held_out}))


def shapes_for(device: torch.device) -> Shapes:
    """The shapes that tell a kind of device."""
    return CPU if device.type == "cpu" else ACCELERATOR


# Changes at 64 | 65 rows (batches) and 384 | 385 (one thread a matrix): distmuon.numerics.recipe
CPU = Shapes(
    fitted=(
        (32, 64),
        (64, 64),
        (64, 512),
        (96, 96),
        (128, 1024),
        (192, 192),
        (256, 256),
        (384, 1536),
        (448, 448),
        (512, 2048),
        (768, 768),
        (1024, 4096),
        (1536, 1536),
        (2048, 2048),
    ),
    held_out=(
        (48, 192),
        (64, 128),
        (128, 256),
        (192, 768),
        (320, 320),
        (512, 512),
        (640, 2560),
        (1280, 1280),
        (3072, 768),
    ),
)
# Mirrored kernels from 2048 rows on
ACCELERATOR = Shapes(
    fitted=(
        (64, 256),
        (256, 256),
        (256, 2048),
        (512, 512),
        (1024, 1024),
        (1024, 4096),
        (2048, 2048),
        (2048, 8192),
        (3072, 3072),
        (4096, 4096),
        (4096, 16384),
        (8192, 8192),
    ),
    held_out=(
        (128, 512),
        (768, 768),
        (1536, 6144),
        (2048, 4096),
        (2560, 2560),
        (3072, 768),
        (4096, 11008),
        (6144, 6144),
    ),
)
_KI = 1 << 10
# Bytes that leave a rank in one collective
LINK_SIZES = Sizes(
    fitted=(64 * _KI, 256 * _KI, 1024 * _KI, 4096 * _KI, 16384 * _KI),
    held_out=(128 * _KI, 512 * _KI, 2048 * _KI, 8192 * _KI),
)
# Elements of all shards of one size together: past the caches of a CPU, as a model is
PASS_NUMEL = 1 << 23
# Rows of the square shards that passes go over
PASS_SIDES = Sizes(fitted=(256, 512, 1024, 2048), held_out=(384, 768, 1536))
