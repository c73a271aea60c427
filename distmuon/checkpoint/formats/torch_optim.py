"""torch.optim.Muon of torch 2.13, and the torch.optim.AdamW that goes with it.

Read in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/_muon.py (defaults 116-125, momentum 333-334,
scale 72-84) and https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/adam.py. The momentum is an average; keys,
units and the order of operations are those of this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distmuon.checkpoint.formats.entries import (
    ADAMW_KEYS,
    MUON_STATE,
    Entry,
    Group,
    Shapes,
    StateDict,
    check_keys,
    common,
    has_keys,
    kept,
    read_adamw,
    read_groups,
    read_state,
    write_groups,
)
from distmuon.checkpoint.formats.settings import check_muon, repeated
from distmuon.numerics.update import resolve_lr_scale

_PROJECT = "torch.optim.Muon"
_MUON = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
_ADAMW = ("lr", "weight_decay", "betas", "eps")
# What torch.optim.AdamW has beside; True is refused
_REFUSED = ("amsgrad", "maximize")
_FREE = ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
_DEFAULTS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class TorchOptim:
    """The state dicts of Muon and of AdamW, or one that ``torch.distributed.checkpoint`` made of both."""

    name = "torch"

    def matches(self, state_dicts: Sequence[StateDict]) -> bool:
        """Groups of torch.optim.Muon, and perhaps others of AdamW."""
        groups = [group for one in state_dicts for group in one["param_groups"]]
        adamw = [group for group in groups if not _is_muon(group)]
        muon = [group for group in groups if _is_muon(group)]
        rest = (*_REFUSED, *_FREE)
        return (
            bool(muon)
            and has_keys([{"param_groups": muon}], _MUON)
            and has_keys([{"param_groups": adamw}], _ADAMW, rest)
        )

    def read(self, state_dicts: Sequence[StateDict], names: Sequence[str], shapes: Shapes | None) -> list[Entry]:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        entries: list[Entry] = []
        before = 0
        for state_dict in state_dicts:
            groups = read_groups(state_dict, names[len(entries) :])
            for group in groups:
                read = _read_muon if _is_muon(group.settings) else _read_adamw
                entries.extend(replace(entry, group=before + entry.group) for entry in read(group))
            before += len(groups)
        return entries

    def write(self, groups: Sequence[Sequence[Entry]]) -> tuple[StateDict, StateDict]:
        """The state dicts of Muon and of AdamW."""
        parts: dict[bool, list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {True: [], False: []}
        for members in groups:
            use_muon = members[0].use_muon
            settings = _muon_group(members) if use_muon else {**common(members, ADAMW_KEYS), **_DEFAULTS}
            parts[use_muon].append((settings, [dict(entry.state) for entry in members]))
        return write_groups(parts[True]), write_groups(parts[False])


def _is_muon(settings: Mapping[str, Any]) -> bool:
    return "ns_coefficients" in settings


def _read_muon(group: Group) -> list[Entry]:
    check_keys(group, _PROJECT, _MUON)
    settings = kept(group.settings, *_MUON)
    return [
        Entry(name, group.number, True, settings, read_state(name, state, MUON_STATE))
        for name, state in zip(group.names, group.states, strict=True)
    ]


def _read_adamw(group: Group) -> list[Entry]:
    check_keys(group, "torch.optim.AdamW", _ADAMW, (*_REFUSED, *_FREE))
    found = group.settings
    for key in _REFUSED:
        if found.get(key):
            raise ValueError(f"parameter {group.names[0]!r} has {key}=True in AdamW, which distmuon.Muon has not.")
    if found["weight_decay"] and not found.get("decoupled_weight_decay", True):
        raise ValueError(
            f"parameter {group.names[0]!r} has weight_decay={found['weight_decay']} in torch.optim.Adam, which "
            "adds it to the gradient: distmuon.Muon decays as AdamW does."
        )
    return read_adamw(group, kept(found, *_ADAMW))


def _muon_group(members: Sequence[Entry]) -> dict[str, Any]:
    for entry in members:
        momentum = entry.state.get("momentum_buffer")
        if momentum is not None and momentum.ndim != 2:
            raise ValueError(
                f"parameter {entry.name!r} has {momentum.ndim} axes, and torch.optim.Muon takes matrices alone: "
                "there is no state for it there."
            )
        check_muon(entry, _PROJECT)
        if resolve_lr_scale(entry.settings.get("adjust_lr_fn")) not in ("original", "match_rms_adamw"):
            raise ValueError(
                f"parameter {entry.name!r} has adjust_lr_fn={entry.settings['adjust_lr_fn']!r}, and torch.optim.Muon "
                "knows 'original' and 'match_rms_adamw' alone: its steps would be others."
            )
    found = common(members, ("lr", "weight_decay", "momentum", "nesterov", "eps", "adjust_lr_fn", "initial_lr"))
    iterations = {repeated(entry, _PROJECT) for entry in members}
    if len(iterations) > 1:
        raise ValueError(
            f"the matrices of the group of {members[0].name!r} have several ns_coefficients or "
            "ns_steps: make them equal."
        )
    stage, steps = iterations.pop()
    scale = found.get("adjust_lr_fn")  # an alias has to go, None may stay
    found["adjust_lr_fn"] = None if scale is None else resolve_lr_scale(scale)
    return {**found, "ns_coefficients": stage, "ns_steps": steps}
