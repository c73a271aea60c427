"""microsoft/dion's ``Muon``, and why ``NorMuon``, ``Dion`` and Lion have no place here.

Read in https://github.com/microsoft/dion/tree/0a059a4542e5aa74b40dcd1dce363836c7afcd48/dion: group keys ``muon.py``
90-103, momentum a sum ``muon.py`` 299-303, ``algorithm`` in each group ``megabatch_base.py`` 176-186, state
``momentum``, ``variance`` and, since July 2026, ``step_dev`` 198-216 (before, the group's ``step``), scales 984-1002,
decay by ``lr * weight_decay`` unscaled ``muon.py`` 342-347, torch's fused AdamW ``scalar_opts.py`` 211-219. Which
iteration a run used is not in its state: the default since March 2026 is ``polar_express.py`` 10-16 with norms times
1.02 (35).

``NorMuon`` divides by ``variance_neuron`` (``normuon.py`` 374-399), ``Dion`` multiplies by ``Q`` (``dion.py`` 718):
other updates, with state that :class:`distmuon.Muon` does not keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distmuon.checkpoint.formats.entries import (
    Entry,
    Group,
    Shapes,
    StateDict,
    as_average,
    as_sum,
    check_keys,
    common,
    kept,
    number,
    read_adamw,
    read_groups,
    read_state,
    step_number,
    step_tensor,
    write_groups,
)
from distmuon.checkpoint.formats.settings import check_muon, check_stages
from distmuon.numerics.coefficients import TABLES, Stage, with_safety
from distmuon.numerics.update import resolve_lr_scale

_KEYS = (
    "lr",
    "mu",
    "beta1",
    "beta2",
    "weight_decay",
    "algorithm",
    "step",
    "epsilon",
    "nesterov",
    "flatten",
    "adjust_lr",
)
_OPTIONAL = ("cautious_wd", "num_heads", "split_sizes")
_OTHERS = {
    "normuon": "second moments by neuron (variance_neuron)",
    "dion": "a low-rank basis (Q)",
    "lion": "the sign of its momentum",
}
# Theirs divide by 1.02 times the norm, which the first stage here takes over
POLAR_EXPRESS: tuple[Stage, ...] = (
    *with_safety([(8.156554524902461, -22.48329292557795, 15.878769915207462)], 1.02),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_SCALES = {"spectral": "spectral_norm", "match_rms_adamw": "rms_norm", "none": None}
_ADAMW_STATE = {"step": "step_dev", "exp_avg": "momentum", "exp_avg_sq": "variance"}


class Dion:
    """One state dict of ``dion.Muon``."""

    name = "dion"

    def matches(self, state_dicts: Sequence[StateDict]) -> bool:
        """``mu`` and ``algorithm`` in each group; those of ``NorMuon`` and ``Dion`` too, to say what is wrong."""
        return len(state_dicts) == 1 and all({"mu", "algorithm"} <= {*g} for g in state_dicts[0]["param_groups"])

    def read(self, state_dicts: Sequence[StateDict], names: Sequence[str], shapes: Shapes | None) -> list[Entry]:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        entries = []
        for group in read_groups(state_dicts[0], names):
            found = group.settings
            if found.get("algorithm") not in ("muon", "adamw"):
                raise ValueError(_refusal(group))
            check_keys(group, "dion.Muon", _KEYS, _OPTIONAL)
            for key, harmless in (("cautious_wd", False), ("num_heads", 1), ("split_sizes", None)):
                if found.get(key) not in (None, harmless) and not (key == "cautious_wd" and not found["weight_decay"]):
                    raise ValueError(
                        f"parameter {group.names[0]!r} has {key}={found[key]!r}, which is not carried over: give that "
                        f"group key to the optimizer that loads the state, and set it to {harmless!r} in the state "
                        "dict first."
                    )
            entries.extend(_read_muon(group) if found["algorithm"] == "muon" else _read_adamw(group))
        return entries

    def write(self, groups: Sequence[Sequence[Entry]]) -> StateDict:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        written = []
        for members in groups:
            settings = _muon_group(members) if members[0].use_muon else _adamw_group(members)
            written.append((settings, [_write_state(entry) for entry in members]))
        return write_groups(written)


def _refusal(group: Group) -> str:
    algorithm = group.settings.get("algorithm")
    what = _OTHERS.get(str(algorithm), "an update of its own")
    return (
        f"parameter {group.names[0]!r} is in a group of algorithm={algorithm!r}, which has {what} where Muon has "
        "nothing: this state does not carry over. Convert that of dion.Muon, or start without optimizer state."
    )


def _read_muon(group: Group) -> list[Entry]:
    found = group.settings
    settings = {
        **kept(found, "lr", "weight_decay", "nesterov"),
        "momentum": number(found["mu"]),
        "eps": number(found["epsilon"]),
        "adjust_lr_fn": "none" if found["adjust_lr"] is None else resolve_lr_scale(found["adjust_lr"]),
        "ns_coefficients": POLAR_EXPRESS,
        "ns_steps": None,
    }
    entries = []
    for name, state in zip(group.names, group.states, strict=True):
        read = read_state(name, state, {"momentum_buffer": "momentum"})
        if read:
            read["momentum_buffer"] = as_average(name, read["momentum_buffer"], settings["momentum"])
        entries.append(Entry(name, group.number, True, settings, read, bool(found["flatten"])))
    return entries


def _read_adamw(group: Group) -> list[Entry]:
    found = group.settings
    settings = {
        **kept(found, "lr", "weight_decay"),
        "betas": (number(found["beta1"]), number(found["beta2"])),
        "eps": number(found["epsilon"]),
    }
    for state in group.states:
        if state:
            # states from before July 2026 have the counter in the group
            state.setdefault("step_dev", found["step"])
    return read_adamw(group, settings, _ADAMW_STATE)


def _muon_group(members: Sequence[Entry]) -> dict[str, Any]:
    for entry in members:
        check_muon(entry, "dion.Muon")
        check_stages(entry, "dion.Muon", (POLAR_EXPRESS, TABLES["quintic5"].stages))
    found = common(members, ("lr", "weight_decay", "momentum", "nesterov", "eps", "adjust_lr_fn", "initial_lr"))
    return {
        **_DEFAULTS,
        **kept(found, "lr", "weight_decay", "nesterov"),
        "mu": number(found["momentum"]),
        "epsilon": number(found.get("eps", 1e-8)),
        "adjust_lr": _scale(members, resolve_lr_scale(found.get("adjust_lr_fn"))),
        "flatten": any(entry.flatten for entry in members),
        "algorithm": "muon",
    }


def _scale(members: Sequence[Entry], name: str) -> str | None:
    """Their name of a scale; Jordan's is one of theirs for tall matrices and another for wide ones.

    Raises:
        ValueError: for a group of both, naming one of each.
    """
    if name in _SCALES:
        return _SCALES[name]
    sides = [(entry, *_rows_and_cols(entry)) for entry in members if entry.state]
    tall = [entry.name for entry, rows, cols in sides if rows > cols]
    wide = [entry.name for entry, rows, cols in sides if rows < cols]
    if tall and wide:
        raise ValueError(
            f"parameters {tall[0]!r} and {wide[0]!r} are to share a group with adjust_lr_fn={name!r}, which is "
            "'spectral_norm' of dion for tall matrices and None for wide ones: name them in groups of their own by "
            "target_names=."
        )
    return _SCALES["spectral"] if tall else _SCALES["none"]


def _rows_and_cols(entry: Entry) -> tuple[int, int]:
    shape = entry.state["momentum_buffer"].shape
    return (shape[0], math.prod(shape[1:])) if entry.flatten else (shape[-2], shape[-1])


def _adamw_group(members: Sequence[Entry]) -> dict[str, Any]:
    found = common(members, ("lr", "weight_decay", "betas", "eps", "initial_lr"))
    steps = [step_number(entry.state["step"]) for entry in members if entry.state]
    return {
        **_DEFAULTS,
        **kept(found, "lr", "weight_decay"),
        "beta1": found["betas"][0],
        "beta2": found["betas"][1],
        "epsilon": number(found["eps"]),
        "algorithm": "adamw",
        "step": max(steps, default=0),
    }


_DEFAULTS = {
    "mu": 0.95,
    "beta1": 0.9,
    "beta2": 0.95,
    "cautious_wd": False,
    "step": 0,
    "nesterov": False,
    "flatten": False,
    "adjust_lr": "spectral_norm",
}


def _write_state(entry: Entry) -> dict[str, Any]:
    if not entry.state:
        return {}
    if entry.use_muon:
        return {"momentum": as_sum(entry.name, entry.state["momentum_buffer"], entry.settings["momentum"])}
    renamed = {theirs: entry.state[ours] for ours, theirs in _ADAMW_STATE.items()}
    return {**renamed, "step_dev": step_tensor(renamed["step_dev"])}
