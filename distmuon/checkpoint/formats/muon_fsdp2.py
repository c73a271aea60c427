"""samsja/muon_fsdp_2, the package ``muon-fsdp2``: its ``Muon``, which takes DTensors.

Read in https://github.com/samsja/muon_fsdp_2/blob/241754802b88160d7e5dfa9f7a8a4a945abb275f/src/muon_fsdp2/muon_fsdp2/
__init__.py: ``use_muon`` and ``wd`` in each group (110-125), state ``m``, or ``exp_avg``, ``exp_avg_sq`` and an integer
``step``, from the beginning (135-147), momentum an average and Nesterov built in (156-157), ``ns_steps`` of the quintic
(23, 39-49), scale ``max(1, m/n)**0.5`` (211). Its ``MuonDDP`` keeps buffers in its groups and each rank its own
momentum (335-343, 411-421): not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distmuon.checkpoint.formats.entries import (
    Entry,
    Shapes,
    StateDict,
    check_keys,
    common,
    complete,
    has_keys,
    kept,
    number,
    read_adamw,
    read_groups,
    read_state,
    step_number,
    write_groups,
)
from distmuon.checkpoint.formats.settings import QUINTIC, check_muon, repeated

_PROJECT = "muon_fsdp2"
_MUON = ("use_muon", "lr", "wd", "momentum", "ns_steps")
_ADAMW = ("use_muon", "lr", "wd", "betas", "eps")


class MuonFsdp2:
    """One state dict, its tensors DTensors or whole."""

    name = "muon_fsdp2"

    def matches(self, state_dicts: Sequence[StateDict]) -> bool:
        """Group keys of this class."""
        groups = state_dicts[0]["param_groups"]
        keys = [(group, _MUON if group.get("use_muon") else _ADAMW) for group in groups]
        return len(state_dicts) == 1 and all(has_keys([{"param_groups": [group]}], wanted) for group, wanted in keys)

    def read(self, state_dicts: Sequence[StateDict], names: Sequence[str], shapes: Shapes | None) -> list[Entry]:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        entries = []
        for group in read_groups(state_dicts[0], names):
            use_muon = bool(group.settings.get("use_muon"))
            check_keys(group, _PROJECT, _MUON if use_muon else _ADAMW)
            settings = {**kept(group.settings, "lr"), "weight_decay": number(group.settings["wd"])}
            if use_muon:
                settings |= kept(group.settings, "momentum", "ns_steps")
                settings |= {"nesterov": True, "ns_coefficients": "quintic", "eps": 1e-7, "adjust_lr_fn": "original"}
                for name, state in zip(group.names, group.states, strict=True):
                    found = read_state(name, state, {"momentum_buffer": "m"})
                    entries.append(Entry(name, group.number, True, settings, found))
            else:
                entries += read_adamw(group, settings | kept(group.settings, "betas", "eps"))
        complete(entries, "muon_fsdp2 makes it for all parameters at the beginning, so the file is not whole.")
        return entries

    def write(self, groups: Sequence[Sequence[Entry]]) -> StateDict:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        written = []
        for members in groups:
            complete(members, "muon_fsdp2 makes no state when it is missing, so take a step with all gradients first.")
            settings = _muon_group(members) if members[0].use_muon else _adamw_group(members)
            written.append((settings, [_write_state(entry) for entry in members]))
        return write_groups(written)


def _muon_group(members: Sequence[Entry]) -> dict[str, Any]:
    steps = set()
    for entry in members:
        check_muon(entry, _PROJECT, nesterov=True, adjust_lr_fn="original")
        steps.add(repeated(entry, _PROJECT, QUINTIC)[1])
        if entry.state and entry.state["momentum_buffer"].ndim != 2:
            raise ValueError(f"parameter {entry.name!r} is not a matrix, and {_PROJECT} takes no others.")
    if len(steps) > 1:
        raise ValueError(f"the group of {members[0].name!r} has ns_steps {sorted(steps)}: make them equal.")
    found = common(members, ("lr", "weight_decay", "momentum", "initial_lr"))
    settings = {**kept(found, "lr", "momentum"), "wd": number(found["weight_decay"])}
    return {**settings, "ns_steps": steps.pop(), "use_muon": True}


def _adamw_group(members: Sequence[Entry]) -> dict[str, Any]:
    found = common(members, ("lr", "weight_decay", "betas", "eps", "initial_lr"))
    return {**kept(found, "lr", "betas", "eps"), "wd": number(found["weight_decay"]), "use_muon": False}


def _write_state(entry: Entry) -> dict[str, Any]:
    if not entry.state:
        return {}
    if entry.use_muon:
        return {"m": entry.state["momentum_buffer"]}
    return {**entry.state, "step": step_number(entry.state["step"])}
