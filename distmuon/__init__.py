"""DistMuon: the Muon optimizer for whole models, on one device or many."""

from distmuon._version import __version__
from distmuon.checking.check import check
from distmuon.checking.report import CheckReport
from distmuon.clip import clip_grad_norm_
from distmuon.comm.waiting import hang_report
from distmuon.ddp import ddp_hook
from distmuon.learning_rates import SuggestedRates, suggest_lr
from distmuon.muon import Muon
from distmuon.muon_clip import MuonClip
from distmuon.numerics.orthogonalize import orthogonalize
from distmuon.qk_clip.apply import qk_clip_
from distmuon.qk_clip.attach import QKClip, attach_qk_clip
from distmuon.qk_clip.record import record_max_logits
from distmuon.report import RoutingReport, RoutingRow
from distmuon.scion import Scion
from distmuon.wrapped import WrappedMuon
from distmuon.wrapping import unwrap, wrap

__all__ = [
    "CheckReport",
    "Muon",
    "MuonClip",
    "QKClip",
    "RoutingReport",
    "RoutingRow",
    "Scion",
    "SuggestedRates",
    "WrappedMuon",
    "__version__",
    "attach_qk_clip",
    "check",
    "clip_grad_norm_",
    "ddp_hook",
    "hang_report",
    "orthogonalize",
    "qk_clip_",
    "record_max_logits",
    "suggest_lr",
    "unwrap",
    "wrap",
]
