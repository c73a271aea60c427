"""A state dict brought into the groups and layouts of an optimizer."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from distmuon.checkpoint.matching import Match, find_match
from distmuon.checkpoint.routing_table import enumerate_differences
from distmuon.comm.layout import lay_out
from distmuon.groups import Group, group_names
from distmuon.moments import STATE_KEY, blank_moments, has_these, moments_in
from distmuon.plan.companions import Moments
from distmuon.plan.reading import READING_KEYS

_RESET = contextvars.ContextVar("distmuon.checkpoint.reset_changed", default=False)


@contextlib.contextmanager
def reset_changed() -> Iterator[None]:
    """Load with ``changed="reset"`` what other code loads: ``set_optimizer_state_dict``, accelerate, a trainer.

    Inside of it :meth:`distmuon.Muon.load_state_dict` lets parameters that changed start without state.
    """
    token = _RESET.set(True)
    try:
        yield
    finally:
        _RESET.reset(token)


def resets(changed: str) -> bool:
    """Whether parameters that changed may start without state: by the argument, or in :func:`reset_changed`."""
    return changed == "reset" or _RESET.get()


def fit(state_dict: Mapping[str, Any], groups: Sequence[Group], *, changed: str) -> dict[str, Any]:
    """Find the state of each parameter, by name where both sides have names and else by position.

    Args:
        state_dict: Not written.
        groups: The present parameter groups.
        changed: ``"error"`` or ``"reset"``, see :meth:`distmuon.Muon.load_state_dict`.

    Returns:
        A state dict for ``torch.optim.Optimizer.load_state_dict``: the present groups with the saved settings, and
        state in the layouts of the parameters. It shares tensors with the one given.

    Raises:
        ValueError: listing the parameters that moved between Muon and AdamW, have another shape or name, are missing
            or new; or if groups differ otherwise, or state is laid out over other ranks.
    """
    if changed not in ("error", "reset"):
        raise ValueError(f"changed={changed!r}: it is 'error' or 'reset'.")
    if not {"state", "param_groups"} <= {*state_dict}:
        raise ValueError(
            f"this is no state dict of an optimizer, which has 'state' and 'param_groups': it has "
            f"{enumerate_differences([repr(key) for key in state_dict])}. In the file of a whole run it is one of the "
            "entries."
        )
    reset = resets(changed)
    match = find_match(state_dict["param_groups"], state_dict["state"], groups, reset=reset)
    if not reset:
        _refuse_changes(match)
    _warn_of_changes(match, groups)
    merged, state = _assemble(match, state_dict["state"], groups)
    return {**state_dict, "state": state, "param_groups": merged}


def _refuse_changes(match: Match) -> None:
    if match.found:
        raise ValueError(
            f"the state dict is not of the parameters that the optimizer has: {enumerate_differences(match.found)}. "
            "Build the model and the optimizer as in the run that saved it, or let these parameters start without "
            "state by load_state_dict(..., changed='reset') or with distmuon.checkpoint.reset_changed()."
        )
    if match.regrouped:
        raise ValueError(
            f"{match.regrouped}: build the optimizer with the groups of the run that saved it, or load by name with "
            "load_state_dict(..., changed='reset')."
        )


def _warn_of_changes(match: Match, groups: Sequence[Group]) -> None:
    texts = [*_other_readings(match, groups)]
    if match.found:
        texts.append(f"these parameters changed and start without state: {enumerate_differences(match.found)}")
    if match.elsewhere:
        texts.append(f"the optimizer lacks parameters of the state dict: {enumerate_differences(match.elsewhere)}")
    unset = [str(index) for index, settings in enumerate(match.settings) if settings is None]
    if unset:
        texts.append(f"no saved group has the parameters of group {', '.join(unset)}, which keeps its settings")
    if texts:
        warnings.warn(f"{'; '.join(texts)}.", stacklevel=4)


def _other_readings(match: Match, groups: Sequence[Group]) -> Iterator[str]:
    """What saved groups say of their variant or norm, and of the axes of parameters, that present ones do not."""
    for index, (group, settings) in enumerate(zip(groups, match.settings, strict=True)):
        if settings is None or not (group["use_muon"] or group.get("lmo")):
            continue
        mine = ("variant", *READING_KEYS) if group["use_muon"] else ("lmo", "flatten", "transposed")
        stacked = any(param.ndim > 2 for param in group["params"])
        # of two axes nothing is to be flattened
        keys = [key for key in mine if key in settings and (stacked or key != "flatten")]
        saved = _settings({key: settings[key] for key in keys})
        changed = [key for key in keys if saved[key] != _as_tuples(group[key])]
        if changed:
            theirs, ours = (", ".join(f"{key}={of[key]!r}" for key in changed) for of in (saved, group))
            yield f"group {index} was saved with {theirs} and keeps its own {ours}"


def _assemble(
    match: Match, state: Mapping[Hashable, Any], groups: Sequence[Group]
) -> tuple[list[Group], dict[Hashable, Any]]:
    """The present groups with saved settings, and the state that their parameters keep."""
    merged: list[Group] = []
    kept: dict[Hashable, Any] = {}
    for index, (group, settings, ids) in enumerate(zip(groups, match.settings, match.ids, strict=True)):
        # a parameter without state needs a key that no other has
        params = [(index, place) if id_ is None else id_ for place, id_ in enumerate(ids)]
        # a state dict from before there were periods is at the start of one
        begun = group["block_step"] if settings is None else settings.get("block_step", 0)
        new = {
            **group,
            **_settings(settings or {}),
            **_own(group, settings or {}),
            "block_step": begun,
            "params": params,
        }
        merged.append(new)
        for name, param, id_ in zip(group_names(group, f"group {index}"), group["params"], ids, strict=True):
            if id_ is not None and id_ in state:
                moments = moments_in(group, param)
                # a variant that the group no longer has left others
                stale = set() if has_these(state[id_], moments) else {STATE_KEY}
                kept[id_] = {
                    key: _lay_out(name, key, value, moments, param)
                    for key, value in state[id_].items()
                    if key not in stale
                }
    return merged, kept


def _settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a saved group, with the tuples that a full state dict of torch has turned into lists."""
    return {key: value if key == "param_names" else _as_tuples(value) for key, value in saved.items()}


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _own(group: Group, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a group keeps of its own: who its parameters are, who updates them and how, and what their axes mean."""
    keys = ("use_muon", "lmo", "param_names", "variant", *READING_KEYS)
    if saved.get("variant") != group["variant"]:
        keys = (*keys, "muon_beta2")  # which stood for nothing there, or for other moments
    return {key: group[key] for key in keys if key in group}


def _lay_out(name: str, key: str, value: Any, moments: Moments | None, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    like = param
    if key == STATE_KEY:
        assert moments is not None
        like = blank_moments(param, moments, value.dtype)
    return lay_out(f"{key} of {name!r}", value, like) if value.shape == like.shape else value
