"""The largest logits of one optimizer step, of all layers in one tensor on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Maxima:
    """Collects maxima until the step that uses them.

    What is collected twice, as by recomputation in the backward pass, and in pieces, as by gradient accumulation,
    comes to the same.

    Args:
        sizes: Heads of each layer.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._values: Tensor | None = None

    @torch.no_grad()
    def collect(self, layer: int, found: Tensor, first: int = 0) -> None:
        """Take maxima of some heads of a layer.

        Args:
            layer: Its number.
            found: float32 ``(heads,)``. Infinities and NaN are of overflows and not counted.
            first: Number of the first of these heads, where other ranks have others.
        """
        values = self.on(found.device)
        start = sum(self.sizes[:layer]) + first
        mine = values[start : start + found.numel()]
        finite = found.detach().float().nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        mine.copy_(torch.maximum(mine, finite.to(mine.device)))

    def on(self, device: torch.device) -> Tensor:
        """All values, of all layers in turn, -inf where nothing was collected; made on ``device`` the first time."""
        if self._values is None:
            self._values = torch.full((sum(self.sizes),), -torch.inf, dtype=torch.float32, device=device)
        return self._values

    def reset(self) -> None:
        """Forget everything."""
        if self._values is not None:
            self._values.fill_(-torch.inf)
