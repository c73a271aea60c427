"""Steps whose numbers cannot be right: what ends the run, and what is left out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from distmuon.pretrain.config import Config
from distmuon.pretrain.errors import AgreedError

MOST_SKIPPED = 20
"""Steps left out one after the other after which a run ends: it does not recover by itself."""


class FiniteGuard:
    """Watches loss and gradient norm of the steps of a run, the same on all ranks.

    Without ``optim.on_nonfinite`` it ends the run itself, on a CPU before the optimizer has seen the gradient, and
    on an accelerator, where looking waits, when somebody looks at the loss anyway; no checkpoint is saved in between.
    With it the optimizer decides, before it touches momentum or parameters.

    Args:
        config: All settings.
        optimizer: Of the run.
        device: Of loss and norm.
    """

    def __init__(self, config: Config, optimizer: Optimizer, device: torch.device) -> None:
        self._config, self._optimizer = config, optimizer
        self._decides = config.optim.on_nonfinite if config.optim.name == "muon" else None
        self._waits = device.type != "cpu"
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = 0

    @property
    def skipped_steps(self) -> int | None:
        """Steps left out since the start or the resume; None if none would be."""
        return int(getattr(self._optimizer, "skipped_steps", 0)) if self._decides == "skip" else None

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Take note of a step, before the optimizer's; does not wait for an accelerator.

        Raises:
            AgreedError: On a CPU, if they are not finite and the optimizer does not decide.
        """
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) & (self._first_bad == 0)
        self._first_bad = torch.where(bad, step, self._first_bad)
        if self._decides is None and not self._waits:
            self.check()

    @contextlib.contextmanager
    def deciding(self, step: int) -> Iterator[None]:
        """The optimizer's step.

        Raises:
            AgreedError: If the optimizer refuses the gradient, or has left out too many steps in a row; or if
                ``optim.verify_exchange`` found that something arrived changed.
        """
        before = self.skipped_steps
        try:
            yield
        except FloatingPointError as error:
            # its first sentence names the parameters
            raise AgreedError(self._sentence(step, str(error).split(". ")[0])) from error
        except RuntimeError as error:
            # of verify_exchange, on all ranks
            if "arrived changed" not in str(error):
                raise
            raise AgreedError(f"in step {step}, {error} with --resume auto.") from error
        if before is None:
            return
        if self.skipped_steps == before:
            self._in_a_row = 0
            return
        self._first_bad.zero_()
        self._in_a_row += 1
        if self._in_a_row >= MOST_SKIPPED:
            raise AgreedError(self._sentence(step, f"{MOST_SKIPPED} steps in a row were left out"))

    def check(self) -> None:
        """Look at what was noted; waits for an accelerator.

        Raises:
            AgreedError: If a step was not finite and was not left out.
        """
        step = int(self._first_bad)
        if step > 0:
            raise AgreedError(self._sentence(step))

    def _sentence(self, step: int, detail: str = "") -> str:
        every, lr = self._config.checkpoint.every, self._config.optim.lr
        way = "go on from the last checkpoint with --resume auto" if 0 < every < step else "start again"
        more = f" ({detail.rstrip('.')})" if detail else ""
        return (
            f"the loss or its gradient is not finite at step {step} with optim.lr {lr:g}{more}: {way} and a lower "
            f"rate, such as --optim.lr {lr / 3:.1g}; what was written up to then is kept."
        )
