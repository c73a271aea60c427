"""MuonClip: Muon with QK-Clip, as Moonshot trains Kimi K2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distmuon.muon import Muon
from distmuon.qk_clip.attach import QKClip, attach_qk_clip
from distmuon.qk_clip.heads import Heads


class MuonClip(Muon):
    """Muon without Nesterov momentum, with the scale of AdamW's updates, decay and QK-Clip.

    That is algorithm 1 of Kimi K2 (arXiv 2507.20534): ``W <- W - lr * (0.2 sqrt(max(m, n)) O + weight_decay W)``, and
    after each step attention heads are scaled whose logits were above ``tau``. AdamW, with the same rate, updates the
    rest.

    Args:
        model: As for :func:`distmuon.attach_qk_clip`.
        lr: Learning rate of everything, as AdamW has it.
        weight_decay: Decoupled weight decay.
        momentum: Weight of the past in the momentum average.
        tau: Bound of attention logits.
        alpha: See :func:`distmuon.attach_qk_clip`, as for the next five.
        gqa: Where query heads share a key.
        every: Steps from one clip to the next.
        qk_norm: Layers that normalize queries and keys.
        layout: Of fused projections.
        attention: Which modules they are.
        **kwargs: Other arguments of :class:`distmuon.Muon`.

    Attributes:
        qk_clip: The handle, with metrics. None on a copy of this object, which clips nothing until
            :func:`distmuon.attach_qk_clip` is called for it.

    Raises:
        TypeError: as :class:`distmuon.Muon`, as are ValueErrors.
        ValueError: as :func:`distmuon.attach_qk_clip`.
    """

    qk_clip: QKClip | None = None

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 2e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        tau: float = 100.0,
        alpha: float = 0.5,
        gqa: str = "group",
        every: int = 1,
        qk_norm: str = "refuse",
        layout: str | None = None,
        attention: Mapping[str, Heads] | None = None,
        **kwargs: Any,
    ) -> None:
        settings = {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", **kwargs}
        super().__init__(model, lr, weight_decay, momentum, **settings)
        self.qk_clip = attach_qk_clip(
            model,
            self,
            tau=tau,
            alpha=alpha,
            gqa=gqa,
            every=every,
            qk_norm=qk_norm,
            layout=layout,
            attention=attention,
        )
