"""The members of the Muon family that family.py compares, and how each is built."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import distmuon

WEIGHT_DECAY, BETAS, SOAP_PERIOD = 0.1, (0.9, 0.95), 10
# of the matrices' updates that stand for AdamW's: where grids begin
RATES = (1e-2, 2e-2, 4e-2)


@dataclass(frozen=True)
class Member:
    """An optimizer of a whole model.

    Attributes:
        build: From the module and the rate; of distmuon, further arguments of its class too.
        settings: What ``build`` goes by, for the records.
        rates: The first grid, apart by factors of two.
        period: Steps after which its kinds of steps come again.
        package: What must be installed for it.
        ours: Whether it is of distmuon.
    """

    build: Callable[..., Optimizer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    period: int = 1
    package: str | None = None
    ours: bool = True

    @property
    def missing(self) -> str | None:
        """The package that must be installed first."""
        return self.package if self.package and importlib.util.find_spec(self.package) is None else None


def _adamw(model: nn.Module, rate: float) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=WEIGHT_DECAY)


def _muon(**settings: Any) -> Member:
    """Embedding, head and norms take AdamW at the rate, matrices what ``suggest_lr`` finds to stand for it."""

    def build(model: nn.Module, rate: float, **more: Any) -> Optimizer:
        scale = settings.get("adjust_lr_fn", "match_rms_adamw")
        rates = distmuon.suggest_lr(model, adamw_lr=rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn=scale)
        return distmuon.Muon(model, adamw_betas=BETAS, **{**rates.arguments(), **settings, **more})

    return Member(build, settings, period=settings.get("block_period", 1))


def _scion(**settings: Any) -> Member:
    """The rate is Scion's own, in the radii of the paper's GPT."""

    def build(model: nn.Module, rate: float, **more: Any) -> Optimizer:
        return distmuon.Scion(model, rate, **settings, **more)

    return Member(build, settings, rates=(2**-12, 2**-11, 2**-10))


def _soap(model: nn.Module, rate: float) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(
        model.parameters(), lr=rate, betas=(0.95, 0.95), weight_decay=WEIGHT_DECAY, precondition_frequency=SOAP_PERIOD
    )


REFERENCE = "Moonlight"

MEMBERS: dict[str, Member] = {
    "AdamW": Member(_adamw, rates=(5e-3, 1e-2, 2e-2), ours=False),
    REFERENCE: _muon(),
    "Muon, original": _muon(adjust_lr_fn="original"),
    "Muon, spectral": _muon(adjust_lr_fn="spectral"),
    # the matrices' rule of Scion, to tell apart what its other rules do
    "spectral, momentum 0.9": _muon(adjust_lr_fn="spectral", momentum=0.9, nesterov=False),
    "no Nesterov (MuonClip)": _muon(nesterov=False),
    "NorMuon": _muon(variant="normuon"),
    "AdaMuon": _muon(variant="adamuon"),
    "cautious decay": _muon(cautious_wd=True),
    "MuonBP": _muon(block_period=5, blocks=4),
    "Scion": _scion(constrained=True),
    "Scion, unconstrained": _scion(constrained=False),
    "SOAP": Member(_soap, rates=(5e-3, 1e-2, 2e-2), period=SOAP_PERIOD, package="pytorch_optimizer", ours=False),
}
"""By name; all of distmuon but the scales and Scion have Moonlight's, ``match_rms_adamw``."""
