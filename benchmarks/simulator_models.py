"""The models of simulator.py: shapes of matrices, how they are sharded, and how the optimizer is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A model.

    Attributes:
        layout: ``"FSDP2"`` or ``"replicated"``.
        blocks: Shapes ``(out, in)`` of the matrices of each block.
        settings: Of the optimizer.
        large: Whether it takes seconds a step, and is measured only if it is asked for.
    """

    layout: str
    blocks: tuple[tuple[Shape, ...], ...]
    settings: dict[str, Any] = field(default_factory=dict)
    large: bool = False


_EQUAL = (((512, 512),) * 4 + ((2048, 512), (512, 2048)),) * 8
_MIXED = (((640, 640), (160, 640), (160, 640), (640, 640), (1728, 640), (640, 1728)),) * 3 + (((1024, 320),),) * 2
_DOMINATES = (((4096, 4096),),) + (((256, 256),) * 4,) * 3
_ONE = (((1280, 1280),),) + (((256, 256),) * 4,) * 3

CASES = {
    "48 of 512 and MLPs": Case("FSDP2", _EQUAL),
    "48, replicated": Case("replicated", _EQUAL),
    "mix of shapes": Case("FSDP2", _MIXED),
    "mix, small buckets": Case("FSDP2", _MIXED, {"bucket_bytes": 1 << 20}),
    "1280 and 12 of 256": Case("FSDP2", _ONE),
    "1280, no teams": Case("FSDP2", _ONE, {"teams": False}),
    "4096 and 12 of 256": Case("FSDP2", _DOMINATES, large=True),
    "4096, no teams": Case("FSDP2", _DOMINATES, {"teams": False}, large=True),
}
