"""DistMuon: the Muon optimizer for whole models, on one device or many."""

from distmuon._version import __version__
from distmuon.checking.check import check
from distmuon.checking.report import CheckReport
from distmuon.clip import clip_grad_norm_
from distmuon.comm.waiting import hang_report
from distmuon.ddp import ddp_hook
from distmuon.learning_rates import SuggestedRates, suggest_lr
from distmuon.muon import Muon
from distmuon.numerics.orthogonalize import orthogonalize
from distmuon.report import RoutingReport, RoutingRow
from distmuon.wrapped import WrappedMuon
from distmuon.wrapping import unwrap, wrap

__all__ = [
    "CheckReport",
    "Muon",
    "RoutingReport",
    "RoutingRow",
    "SuggestedRates",
    "WrappedMuon",
    "__version__",
    "check",
    "clip_grad_norm_",
    "ddp_hook",
    "hang_report",
    "orthogonalize",
    "suggest_lr",
    "unwrap",
    "wrap",
]
