"""The format of :class:`distmuon.Muon`."""

from __future__ import annotations

from collections.abc import Sequence

from distmuon.checkpoint.formats.entries import (
    ADAMW_KEYS,
    ADAMW_STATE,
    MUON_STATE,
    Entry,
    Shapes,
    StateDict,
    check_keys,
    common,
    has_keys,
    read_groups,
    read_state,
    write_groups,
)
from distmuon.groups import GROUP_KEYS
from distmuon.moments import STATE_KEY
from distmuon.plan.reading import READING_KEYS
from distmuon.values import FAMILY_DEFAULTS

_REQUIRED = ("use_muon", "lr", "weight_decay", "momentum", "adjust_lr_fn", "flatten", "betas")
_OPTIONAL = tuple(key for key in GROUP_KEYS if key not in (*_REQUIRED, "params"))
_ADAMW_KEYS = (*ADAMW_KEYS, "cautious_wd")
_LMO_KEYS = ("lmo", "momentum", "nesterov", *_ADAMW_KEYS)
# What a group has beside the settings of its matrices
_NOT_MUON = ("use_muon", *READING_KEYS, "betas", "lmo", "name")


class DistMuon:
    """``use_muon`` and all settings in the group; see :meth:`distmuon.Muon.state_dict`."""

    name = "distmuon"

    def matches(self, state_dicts: Sequence[StateDict]) -> bool:
        """Group keys of this class."""
        return len(state_dicts) == 1 and has_keys(state_dicts, _REQUIRED, _OPTIONAL)

    def read(self, state_dicts: Sequence[StateDict], names: Sequence[str], shapes: Shapes | None) -> list[Entry]:
        """See :class:`distmuon.checkpoint.formats.entries.Format`."""
        entries = []
        for group in read_groups(state_dicts[0], names):
            check_keys(group, self.name, _REQUIRED, _OPTIONAL)
            use_muon, lmo = group.settings["use_muon"], group.settings.get("lmo") is not None
            settings = {
                key: value
                for key, value in group.settings.items()
                if (key not in _NOT_MUON if use_muon else key in (_LMO_KEYS if lmo else _ADAMW_KEYS))
                # what is Muon itself needs no word, as other projects have no key for it
                and not (key in FAMILY_DEFAULTS and value == FAMILY_DEFAULTS[key])
                and (key, value) != ("block_step", 0)
            }
            for name, state in zip(group.names, group.states, strict=True):
                keys = MUON_STATE if use_muon or lmo else ADAMW_STATE
                keys = {**keys, STATE_KEY: STATE_KEY} if use_muon and STATE_KEY in state else keys
                kept = read_state(name, state, keys)
                flatten = group.settings["flatten"] if use_muon else None
                entries.append(Entry(name, group.number, use_muon, settings, kept, flatten))
        return entries

    def write(self, groups: Sequence[Sequence[Entry]]) -> StateDict:
        """Groups that say what they know; :meth:`distmuon.Muon.load_state_dict` adds the rest."""
        written = []
        for members in groups:
            keys = dict.fromkeys(key for entry in members for key in entry.settings)
            settings = {"use_muon": members[0].use_muon, **common(members, keys)}
            if any(entry.flatten for entry in members):
                settings["flatten"] = True
            written.append((settings, [entry.state for entry in members]))
        state = write_groups(written)
        for group, members in zip(state["param_groups"], groups, strict=True):
            group["param_names"] = [entry.name for entry in members]
        return state
