"""How other Muons lay out their state; each file cites where its project does."""

from __future__ import annotations

from distmuon.checkpoint.formats.dion import Dion
from distmuon.checkpoint.formats.entries import Entry, Format, Shapes, StateDict
from distmuon.checkpoint.formats.kellerjordan import KellerJordan
from distmuon.checkpoint.formats.moonlight import Moonlight
from distmuon.checkpoint.formats.muon_fsdp2 import MuonFsdp2
from distmuon.checkpoint.formats.ours import DistMuon
from distmuon.checkpoint.formats.torch_optim import TorchOptim

__all__ = ["FORMATS", "Entry", "Format", "Shapes", "StateDict"]

_ALL: tuple[Format, ...] = (
    DistMuon(),
    TorchOptim(),
    KellerJordan("kellerjordan", sorts=True),
    KellerJordan("kellerjordan_single", sorts=False),
    Dion(),
    Moonlight("moonlight", "match_rms_adamw", "wd", decays_matrices=True, flag=bool, flattens=False),
    Moonlight(
        "fsdp_optimizers",
        "original",
        "adamw_wd",
        decays_matrices=False,
        flag=int,
        flattens=True,
        extra=("adamw_lr_ratio",),
    ),
    MuonFsdp2(),
)
FORMATS: dict[str, Format] = {found.name: found for found in _ALL}
