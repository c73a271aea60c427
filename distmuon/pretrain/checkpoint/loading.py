"""A checkpoint into a run."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from distmuon.checkpoint import differences, enumerate_differences
from distmuon.pretrain.checkpoint.failures import reason
from distmuon.pretrain.checkpoint.manifest import read_manifest
from distmuon.pretrain.checkpoint.metadata import read_metadata
from distmuon.pretrain.checkpoint.reader import Planner, Reader
from distmuon.pretrain.checkpoint.state import AppState
from distmuon.pretrain.errors import UserError
from distmuon.pretrain.processes import agreed

RoutingTable = dict[str, dict[str, Any]]


def load_checkpoint(
    path: pathlib.Path,
    state: AppState,
    routing_changes: Literal["error", "reset"] = "error",
    *,
    layout: str | None = None,
) -> None:
    """Load a ``step-N`` folder, of this layout or another, into the run; all ranks have to call it.

    Args:
        path: The folder, from `open_run_folder`, which looks whether it is whole.
        state: The run.
        routing_changes: What becomes of parameters that another algorithm updates now: ``"reset"`` starts their
            optimizer state anew.
        layout: Arrangement of the ranks, in words; random numbers are those of the checkpoint if it was written in the
            same one. None: if it was written by as many ranks.

    Raises:
        UserError: On all ranks, if it cannot be read or does not fit the model and optimizer.
    """
    with agreed():
        try:
            _load(path, state, routing_changes, layout)
        except UserError:
            raise
        except (Exception, CheckpointException) as error:  # the latter is no Exception; a misfit raises plain ones
            raise UserError(
                f"the checkpoint {path} could not be loaded ({reason(error)}): resume from an older one with "
                "--resume FOLDER, or start a new run."
            ) from error


def _load(path: pathlib.Path, state: AppState, routing_changes: str, layout: str | None) -> None:
    # a reader that only some ranks have would leave the others waiting in DCP
    with agreed():
        try:
            manifest = read_manifest(path)
            metadata = read_metadata(path, manifest.files)
        except ValueError as error:
            raise UserError(
                f"the checkpoint {path} could not be loaded ({error}): resume from an older one with "
                "--resume FOLDER, or start a new run."
            ) from error
    reset = _changed(path, manifest.routing, state.routing(), routing_changes)
    template = state.template(reset)
    with warnings.catch_warnings():
        # there is one process on purpose
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(
            {"app": template},
            storage_reader=Reader(path, metadata),
            planner=Planner(),
            no_dist=not dist.is_initialized(),
        )
    state.load_state_dict(template, same_layout=layout in (None, manifest.layout))


def _changed(path: pathlib.Path, saved: RoutingTable, present: RoutingTable, routing_changes: str) -> set[str]:
    """The parameters whose optimizer state is not taken over.

    Raises:
        UserError: If that was not asked for, or if the weights do not fit either.
    """
    found = differences(saved, present)
    if found and routing_changes == "error":
        raise UserError(
            f"the checkpoint {path} was written by an optimizer that routed parameters differently "
            f"({enumerate_differences(found)}): restore the settings, or start the optimizer state of these parameters "
            "anew with --checkpoint.routing_changes reset."
        )
    missing = [name for name, entry in present.items() if saved.get(name, {}).get("shape") != entry["shape"]]
    if missing:
        fresh = differences({name: saved[name] for name in missing if name in saved}, {n: present[n] for n in missing})
        raise UserError(
            f"the checkpoint {path} does not hold the weights of this model ({enumerate_differences(fresh)}), and "
            "checkpoint.routing_changes reset is about optimizer state alone: restore the model, or start a new run."
        )
    return {name for name, entry in present.items() if saved[name]["on"] != entry["on"]}
