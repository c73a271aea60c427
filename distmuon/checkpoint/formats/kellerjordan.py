"""KellerJordan/Muon: ``MuonWithAuxAdam`` and ``SingleDeviceMuonWithAuxAdam``, and their forms without Adam.

Read in https://github.com/KellerJordan/Muon/blob/857d1adc159e098212f828d927460782d3da59e9/muon.py: ``use_muon`` and
three or four more keys in each group (168-181), momentum an average (35), Nesterov and five steps built in (34, 36),
the quintic (16-27), scale ``max(1, m/n)**0.5`` (40), AdamW as torch's with an integer step (130-135, 218-223).
``MuonWithAuxAdam`` sorts each Muon group by shape, the largest first (169), and each of its ranks keeps the momentum of
its own matrices alone (196-204). A missing gradient counts as zeros there (199-201): momentum and weights decay, which
they do not here.

A four-axis weight is orthogonalized as ``(out, in * kernel)`` and scaled by its last two axes, the kernel's (37-40).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    complete,
    has_keys,
    kept,
    read_adamw,
    read_groups,
    read_state,
    step_number,
    write_groups,
)
from distmuon.checkpoint.formats.settings import QUINTIC, check_built_in_scale, check_muon, repeated
from distmuon.numerics.update import lr_scale, resolve_lr_scale

_MUON = ("lr", "momentum", "weight_decay")
_ADAMW = ("lr", "betas", "eps", "weight_decay")
_STEPS = 5


class KellerJordan:
    """One state dict, or of ``MuonWithAuxAdam`` those of all ranks.

    Attributes:
        sorts: Whether the class sorts its matrices.
    """

    def __init__(self, name: str, *, sorts: bool) -> None:
        self.name, self.sorts = name, sorts

    def matches(self, state_dicts: Sequence[StateDict]) -> bool:
        """Group keys of these classes, and the order of the one that sorts or of the one that does not."""
        groups = [group for one in state_dicts for group in one["param_groups"]]
        for group in groups:
            keys = _MUON if group.get("use_muon", True) else _ADAMW
            if not has_keys([{"param_groups": [group]}], keys, ("use_muon",)):
                return False
        return self.sorts == all(map(_descends, state_dicts))

    def read(self, state_dicts: Sequence[StateDict], names: Sequence[str], shapes: Shapes | None) -> list[Entry]:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        entries = []
        for group in read_groups(_merge(state_dicts), names):
            use_muon = group.settings.get("use_muon", True)
            check_keys(group, self.name, _MUON if use_muon else _ADAMW, ("use_muon",))
            if use_muon:
                entries.extend(self._read_muon(group, shapes))
            else:
                entries.extend(read_adamw(group, kept(group.settings, *_ADAMW)))
        complete(
            entries,
            "each rank of MuonWithAuxAdam keeps that of its own matrices alone, so pass the state dicts of all ranks "
            "as a list.",
        )
        return entries

    def write(self, groups: Sequence[Sequence[Entry]]) -> StateDict:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        written: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        for members in groups:
            if members[0].use_muon:
                ordered = self._ordered(members)
                written.append((self._muon_group(members), [dict(entry.state) for entry in ordered]))
            else:
                settings = {**kept(common(members, ADAMW_KEYS), *_ADAMW), "use_muon": False}
                states = [{**e.state, "step": step_number(e.state["step"])} if e.state else {} for e in members]
                written.append((settings, states))
        return write_groups(written)

    def _read_muon(self, group: Group, shapes: Shapes | None) -> list[Entry]:
        names = group.names
        if self.sorts and shapes is not None and all(name in shapes for name in names):
            # the class is handed its parameters in any order; names that are sorted already stay as they are
            names = sorted(names, key=lambda name: tuple(shapes[name]), reverse=True)
        settings = {
            **kept(group.settings, *_MUON),
            "nesterov": True,
            "ns_coefficients": "quintic",
            "ns_steps": _STEPS,
            "eps": 1e-7,
        }
        entries = []
        for name, state in zip(names, group.states, strict=True):
            found = read_state(name, state, MUON_STATE)
            shape = found["momentum_buffer"].shape if found else (shapes or {}).get(name, ())
            scale = _scale_setting(name, shape)
            flatten = {3: False, 4: True}.get(len(shape))
            entries.append(Entry(name, group.number, True, {**settings, "adjust_lr_fn": scale}, found, flatten))
        return entries

    def _ordered(self, members: Sequence[Entry]) -> list[Entry]:
        if not self.sorts:
            return list(members)
        complete(members, "MuonWithAuxAdam sorts by shape, which is not known of it.")
        if not members[0].state:
            return list(members)
        return sorted(members, key=lambda entry: tuple(entry.state["momentum_buffer"].shape), reverse=True)

    def _muon_group(self, members: Sequence[Entry]) -> dict[str, Any]:
        for entry in members:
            check_muon(entry, self.name, nesterov=True)
            if repeated(entry, self.name, QUINTIC)[1] != _STEPS:
                raise ValueError(f"parameter {entry.name!r} has another ns_steps than the {_STEPS} of {self.name}.")
            self._check_scale(entry)
        return {**kept(common(members, (*_MUON, "initial_lr")), *_MUON), "use_muon": True}

    def _check_scale(self, entry: Entry) -> None:
        shape = tuple(entry.state["momentum_buffer"].shape) if entry.state else ()
        if len(shape) < 3:
            check_muon(entry, self.name, adjust_lr_fn="original")
            return
        if entry.flatten == (len(shape) == 3):
            raise ValueError(
                f"parameter {entry.name!r} of shape {shape} is not read as the same matrices by {self.name}."
            )
        rows, cols = (shape[0], math.prod(shape[1:])) if entry.flatten else shape[-2:]
        ours = lr_scale(resolve_lr_scale(entry.settings.get("adjust_lr_fn")), rows, cols)
        check_built_in_scale(entry, self.name, max(1.0, shape[-2] / shape[-1]) ** 0.5, ours)


def _scale_setting(name: str, shape: Sequence[int]) -> str:
    """The ``adjust_lr_fn`` that has Jordan's scale for a weight of this shape.

    Raises:
        ValueError: for a kernel that is higher than wide, whose scale depends on it, and for more than four axes.
    """
    if len(shape) < 4:
        return "original"
    if len(shape) > 4:
        raise ValueError(f"parameter {name!r} has {len(shape)} axes, and distmuon.Muon has no such stack of matrices.")
    if shape[-2] > shape[-1]:
        raise ValueError(
            f"parameter {name!r} has a kernel of {shape[-2]} x {shape[-1]}, by which Jordan's code scales its learning "
            "rate: no adjust_lr_fn of distmuon.Muon does."
        )
    return "none"


def _descends(state_dict: StateDict) -> bool:
    """Whether the matrices of each group stand in the order in which ``MuonWithAuxAdam`` puts them."""
    for group in state_dict["param_groups"]:
        if group.get("use_muon", True):
            states = [state_dict["state"].get(index, {}) for index in group["params"]]
            shapes = [tuple(state["momentum_buffer"].shape) for state in states if "momentum_buffer" in state]
            if shapes != sorted(shapes, reverse=True):
                return False
    return True


def _merge(state_dicts: Sequence[StateDict]) -> StateDict:
    """One state dict of those of several ranks, each of which lacks what others have."""
    first = state_dicts[0]
    sizes = [len(group["params"]) for group in first["param_groups"]]
    state: dict[Any, Any] = {}
    for rank, one in enumerate(state_dicts):
        if [len(group["params"]) for group in one["param_groups"]] != sizes:
            raise ValueError(f"the state dict of rank {rank} has groups of other sizes than that of rank 0.")
        for index, kept_there in one["state"].items():
            state.setdefault(index, kept_there)
    return {**first, "state": state}
