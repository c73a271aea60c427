"""MoonshotAI/Moonlight's ``Muon``, and that of ethansmith2000/fsdp_optimizers, which is built alike.

Read in https://github.com/MoonshotAI/Moonlight/blob/c2ad5b20c605086526a179d36901bfc41b52b44b/examples/toy_train.py: one
group, matrices first (129-132), ``use_muon`` in the state of each parameter (137, 140), momentum a sum (189), steps of
the quintic (60, 67), scale ``0.2 sqrt(max(m, n))`` (146), decay by ``lr * wd`` unscaled (200), AdamW with ``moment1``,
``moment2`` and an integer step (220-237). And in https://github.com/ethansmith2000/fsdp_optimizers/blob/baa43aaa21a7a04f40da445cfada98ff5cf87a09/
fsdp_optimizers/muon.py: ``use_muon`` 1 or 0 (79-83), scale ``max(1, m/n)**0.5`` of a flattened gradient (133, 149), no
decay of matrices (152), AdamW with the same ``lr`` (``adamw_lr_ratio`` is never read) and ``adamw_wd`` (175).

Both add AdamW's eps before the bias correction, so that it counts for ``eps / sqrt(1 - beta2**step)``: what torch adds,
after some ``1 / (1 - beta2)`` steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distmuon.checkpoint.formats.entries import (
    MUON_STATE,
    Entry,
    Shapes,
    StateDict,
    as_average,
    as_sum,
    check_keys,
    common,
    has_keys,
    kept,
    number,
    read_adamw_state,
    read_groups,
    read_state,
    step_number,
    write_groups,
)
from distmuon.checkpoint.formats.settings import QUINTIC, check_muon, repeated

_SHARED = ("lr", "momentum", "nesterov", "ns_steps", "adamw_betas", "adamw_eps")
_ADAMW_STATE = {"step": "step", "exp_avg": "moment1", "exp_avg_sq": "moment2"}


@dataclass(frozen=True)
class Moonlight:
    """One group for all parameters.

    Attributes:
        name: See :class:`distmuon.checkpoint.formats.entries.Format`.
        adjust_lr_fn: What is built in.
        decay: Group key of AdamW's weight decay.
        decays_matrices: Whether the same decay acts on matrices.
        flag: Makes ``use_muon`` of the state.
        flattens: Whether it takes weights of more axes, flattened.
        extra: Other group keys.
    """

    name: str
    adjust_lr_fn: str
    decay: str
    decays_matrices: bool
    flag: type
    flattens: bool
    extra: tuple[str, ...] = ()

    def matches(self, state_dicts: Sequence[StateDict]) -> bool:
        """Group keys of this class."""
        return len(state_dicts) == 1 and has_keys(state_dicts, (*_SHARED, self.decay, *self.extra))

    def read(self, state_dicts: Sequence[StateDict], names: Sequence[str], shapes: Shapes | None) -> list[Entry]:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        entries = []
        for group in read_groups(state_dicts[0], names):
            check_keys(group, self.name, (*_SHARED, self.decay, *self.extra))
            muon, adamw = self._settings(group.settings)
            if self.flattens and not muon["nesterov"]:
                raise ValueError(
                    f"the state dict has nesterov=False, with which {self.name} steps along the plain gradient: "
                    "distmuon.Muon has no such step."
                )
            for name, state in zip(group.names, group.states, strict=True):
                if "use_muon" not in state:
                    raise ValueError(f"parameter {name!r} lacks the state 'use_muon' that {self.name} gives to each.")
                use_muon = bool(state.pop("use_muon"))
                if use_muon:
                    found = read_state(name, state, MUON_STATE)
                    if found:
                        average = as_average(name, found["momentum_buffer"], muon["momentum"])
                        found["momentum_buffer"] = average
                    entries.append(Entry(name, group.number, True, muon, found, True if self.flattens else None))
                else:
                    found = read_adamw_state(name, state, _ADAMW_STATE)
                    entries.append(Entry(name, group.number, False, adamw, found))
        return entries

    def write(self, groups: Sequence[Sequence[Entry]]) -> StateDict:
        """One group; matrices come first, as the class puts them."""
        entries = [entry for members in groups for entry in members]
        muon = [entry for entry in entries if entry.use_muon]
        adamw = [entry for entry in entries if not entry.use_muon]
        settings = {"momentum": 0.95, "nesterov": True, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, self.decay: 0.0}
        settings |= {"ns_steps": 5, **kept(common(entries, ("lr", "initial_lr")), "lr")}
        if muon:
            settings |= self._muon_settings(muon)
            if self.decays_matrices:
                settings[self.decay] = common(entries, ("weight_decay",))["weight_decay"]
        if adamw:
            found = common(adamw, ("betas", "eps", "weight_decay"))
            settings |= {"adamw_betas": found["betas"], "adamw_eps": found["eps"], self.decay: found["weight_decay"]}
        for key in self.extra:
            settings[key] = 1.0
        return write_groups([(settings, [self._write_state(entry) for entry in (*muon, *adamw)])])

    def _settings(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {**kept(group, "lr"), "weight_decay": number(group[self.decay])}
        muon = {
            **shared,
            **kept(group, "momentum", "nesterov", "ns_steps"),
            "weight_decay": shared["weight_decay"] if self.decays_matrices else 0.0,
            "ns_coefficients": "quintic",
            "eps": 1e-7,
            "adjust_lr_fn": self.adjust_lr_fn,
        }
        return muon, {**shared, "betas": tuple(group["adamw_betas"]), "eps": group["adamw_eps"]}

    def _muon_settings(self, muon: Sequence[Entry]) -> dict[str, Any]:
        built_in: dict[str, Any] = {"adjust_lr_fn": self.adjust_lr_fn}
        if not self.decays_matrices:
            built_in |= {"weight_decay": 0.0, "nesterov": True}
        steps = set()
        for entry in muon:
            check_muon(entry, self.name, **built_in)
            steps.add(repeated(entry, self.name, QUINTIC)[1])
            axes = entry.state["momentum_buffer"].ndim if entry.state else 2
            if axes > 2 and not (self.flattens and entry.flatten):
                raise ValueError(f"parameter {entry.name!r} has {axes} axes, and {self.name} takes matrices alone.")
        if len(steps) > 1:
            raise ValueError(
                f"the matrices have ns_steps {sorted(steps)}, and {self.name} has one group: make them equal."
            )
        return {**common(muon, ("momentum", "nesterov")), "ns_steps": steps.pop()}

    def _write_state(self, entry: Entry) -> dict[str, Any]:
        state: dict[str, Any] = {"use_muon": self.flag(entry.use_muon)}
        if not entry.state:
            return state
        if entry.use_muon:
            momentum = entry.state["momentum_buffer"]
            flat = momentum.flatten(1) if momentum.ndim > 2 else momentum
            return {**state, "momentum_buffer": as_sum(entry.name, flat, entry.settings["momentum"])}
        renamed = {theirs: entry.state[ours] for ours, theirs in _ADAMW_STATE.items()}
        return {**state, **renamed, "step": step_number(entry.state["step"])}
