"""DistMuon: the Muon optimizer for whole models, on one device or many."""

from distmuon._version import __version__
from distmuon.clip import clip_grad_norm_
from distmuon.ddp import ddp_hook
from distmuon.muon import Muon
from distmuon.numerics.orthogonalize import orthogonalize
from distmuon.report import RoutingReport, RoutingRow

__all__ = ["Muon", "RoutingReport", "RoutingRow", "__version__", "clip_grad_norm_", "ddp_hook", "orthogonalize"]
