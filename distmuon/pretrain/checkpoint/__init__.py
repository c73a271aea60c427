"""Checkpoints: ``step-N`` folders of ``torch.distributed.checkpoint``, whole or not there."""

from distmuon.pretrain.checkpoint.loading import load_checkpoint
from distmuon.pretrain.checkpoint.names import step_of
from distmuon.pretrain.checkpoint.saving import Saver
from distmuon.pretrain.checkpoint.state import AppState
from distmuon.pretrain.checkpoint.store import (
    list_checkpoints,
    newest_checkpoint,
    set_aside_newer,
    step_folders,
    unfinished,
)
from distmuon.pretrain.checkpoint.verify import find_problem

__all__ = [
    "AppState",
    "Saver",
    "find_problem",
    "list_checkpoints",
    "load_checkpoint",
    "newest_checkpoint",
    "set_aside_newer",
    "step_folders",
    "step_of",
    "unfinished",
]
