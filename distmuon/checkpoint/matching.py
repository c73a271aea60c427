"""Whose state is whose: where the present parameters stand in a state dict, and what differs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from distmuon.checkpoint.routing_table import (
    ALGORITHMS,
    RoutingTable,
    changed_parameters,
    differences,
    enumerate_differences,
)
from distmuon.groups import Group
from distmuon.routing import clean_name

State: TypeAlias = Mapping[Hashable, Mapping[str, Any]]
Names: TypeAlias = list[list[str]]

# The key of state that tells a route, and the route that it is taken for where nothing else tells
_KEY_OF = {"muon": "momentum_buffer", "lmo": "momentum_buffer", "adamw": "exp_avg", None: ""}
_ROUTE_OF = {"momentum_buffer": "muon", "exp_avg": "adamw"}
_UNKNOWN: dict[str, Any] = {"on": None, "shape": None}
_NOTHING: dict[str, Any] = {}


@dataclass
class Match:
    """Where the present parameters stand in a state dict.

    Attributes:
        ids: For each group and parameter its key in the saved state; None: it starts without.
        settings: For each group the saved one whose settings are its own; None: those of no single one are.
        found: What differs, one text for each parameter.
        elsewhere: Parameters of the state dict that this optimizer lacks, where that may be right.
        regrouped: How the same parameters are grouped in another way; empty if they are not.
    """

    ids: list[list[Hashable]]
    settings: list[Group | None]
    found: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    regrouped: str = ""


def find_match(saved: Sequence[Group], state: State, groups: Sequence[Group], *, reset: bool) -> Match:
    """Find each parameter: by name where both sides have names, else by position.

    Args:
        saved: Groups of a state dict, whose ``params`` are numbers, or names that ``torch.distributed.checkpoint``
            hands over in the order of the present parameters.
        state: By such a number or name.
        groups: Of the optimizer.
        reset: Whether parameters that changed may start without state.

    Raises:
        ValueError: if there are no names and groups differ.
    """
    names, saved_names = names_of(groups), names_of(saved)
    aligned = [len(group["params"]) for group in saved] == [len(group["params"]) for group in groups]
    if aligned and any(isinstance(id_, str) for group in saved for id_ in group["params"]):
        return _by_qualified_name(saved, state, groups, names)
    if names is not None and saved_names is not None:
        return _by_name(saved, state, groups, names, saved_names)
    return _by_position(saved, state, groups, reset=reset)


def names_of(groups: Sequence[Group]) -> Names | None:
    """Clean names by group; None where there are none, or where they do not tell parameters apart."""
    names = [[clean_name(name) for name in group.get("param_names", ())] for group in groups]
    flat = [name for members in names for name in members]
    whole = all(len(members) == len(group["params"]) for members, group in zip(names, groups, strict=True))
    return names if whole and len(set(flat)) == len(flat) else None


def _by_name(saved: Sequence[Group], state: State, groups: Sequence[Group], names: Names, saved_names: Names) -> Match:
    present = _table(groups, names)
    told: RoutingTable = {}
    places: dict[str, tuple[int, Hashable]] = {}
    for index, (group, members) in enumerate(zip(saved, saved_names, strict=True)):
        for name, id_ in zip(members, group["params"], strict=True):
            told[name] = _tell(_route(group), state.get(id_, {}), present.get(name, _UNKNOWN)["on"])
            places[name] = index, id_
    changed = changed_parameters(told, present)
    kept = {name: place for name, place in places.items() if name in present and name not in changed}
    ids = [[kept[name][1] if name in kept else None for name in members] for members in names]
    sources = [{kept[name][0] for name in members if name in kept} for members in names]
    settings = [saved[min(source)] if len(source) == 1 else None for source in sources]
    return Match(ids, settings, differences(told, present), regrouped=_regrouped(saved, settings, names))


def _regrouped(saved: Sequence[Group], settings: Sequence[Group | None], names: Names) -> str:
    """How the present groups are not the saved ones, if they hold the same parameters; empty if they are."""
    if len(saved) != len(names):
        return f"the state dict has {len(saved)} parameter groups and the optimizer {len(names)}"
    for index, (group, members) in enumerate(zip(settings, names, strict=True)):
        if group is None or len(group["params"]) != len(members):
            return f"the parameters of group {index} are not those of any group of the state dict"
    return ""


def _by_qualified_name(saved: Sequence[Group], state: State, groups: Sequence[Group], names: Names | None) -> Match:
    """Of what torch.distributed.checkpoint hands over, which has the present parameters and the saved settings."""
    labels = names or [[str(id_) for id_ in group["params"]] for group in saved]
    state = {id_: entry for id_, entry in state.items() if not entry or _has_tensors(entry)}
    ids: list[list[Hashable]] = [list(group["params"]) for group in saved]
    _check_not_empty(state, ids, groups)
    present = _table(groups, labels)
    # what the saved groups say, which know their parameters by the names that the optimizer had
    told = {clean_name(name): _tell(_route(g)) for g in saved for name in g.get("param_names", ())} if names else {}
    named = bool(told)
    for group, members, keys, new in zip(saved, labels, ids, groups, strict=True):
        for name, id_, param in zip(members, keys, new["params"], strict=True):
            if id_ in state:
                route = told.get(name, _UNKNOWN)["on"]
                told[name] = _tell(route if route != present[name]["on"] else None, state[id_], present[name]["on"])
            elif not named or not param.requires_grad:
                told.setdefault(name, _tell(_route(group)))
    changed = changed_parameters(told, present)
    ids = [
        [id_ if name not in changed and id_ in state else None for name, id_ in zip(members, keys, strict=True)]
        for members, keys in zip(labels, ids, strict=True)
    ]
    # a group of which no parameter was saved comes without settings; names are in the order of the saved groups
    settings = [
        {key: value for key, value in old.items() if key != "param_names"}
        if len(old) > 1 and _route(old) in (None, _route(new))
        else None
        for old, new in zip(saved, groups, strict=True)
    ]
    found = differences(told, present)
    if not changed and present.keys() <= told.keys():
        # a stage of a pipeline lacks the parameters of other stages, and rightly
        return Match(ids, settings, elsewhere=found)
    return Match(ids, settings, found)


def _by_position(saved: Sequence[Group], state: State, groups: Sequence[Group], *, reset: bool) -> Match:
    if len(saved) != len(groups):
        raise ValueError(
            f"the state dict has {len(saved)} parameter groups and the optimizer {len(groups)}: build the "
            "optimizer with the groups of the run that saved it."
        )
    names = [[f"group {index}, parameter {k}" for k in range(len(g["params"]))] for index, g in enumerate(groups)]
    present = _table(groups, names)
    told: RoutingTable = {}
    for index, (old, new) in enumerate(zip(saved, groups, strict=True)):
        was, now = _route(old), _route(new)
        if was is not None and now is not None and was != now and not reset:
            raise ValueError(
                f"group {index} was saved on {ALGORITHMS[was]} and is on {ALGORITHMS[now]} "
                "now: its state does not carry over. Route it as before, or start without optimizer state."
            )
        if len(old["params"]) != len(new["params"]):
            raise ValueError(
                f"group {index} of the state dict has {len(old['params'])} parameters and that of the optimizer "
                f"{len(new['params'])}: build the optimizer with the groups of the run that saved it."
            )
        for name, id_ in zip(names[index], old["params"], strict=True):
            told[name] = _tell(_route(old), state.get(id_, {}), present[name]["on"])
    changed = changed_parameters(told, present)
    ids: list[list[Hashable]] = [
        [None if name in changed else id_ for name, id_ in zip(members, old["params"], strict=True)]
        for members, old in zip(names, saved, strict=True)
    ]
    settings = [old if _route(old) in (None, _route(new)) else None for old, new in zip(saved, groups, strict=True)]
    return Match(ids, settings, differences(told, present))


def _check_not_empty(state: State, ids: Sequence[Sequence[Hashable]], groups: Sequence[Group]) -> None:
    """Refuse what torch makes of flattened state if it does not know the optimizer's keys.

    Raises:
        ValueError: listing the parameters.
    """
    empty = [
        str(id_)
        for keys, group in zip(ids, groups, strict=True)
        for id_, param in zip(keys, group["params"], strict=True)
        if param.requires_grad and id_ in state and not state[id_]
    ]
    if empty:
        raise ValueError(
            f"the state of {enumerate_differences(empty)} arrived empty: torch asks the optimizer for the keys of "
            "flattened state, and while there are gradients it does not make the state that has them. Call "
            "optimizer.zero_grad() or get_optimizer_state_dict before loading."
        )


def _table(groups: Sequence[Group], names: Names) -> RoutingTable:
    return {
        name: {"on": _route(group), "shape": list(param.shape)}
        for group, members in zip(groups, names, strict=True)
        for name, param in zip(members, group["params"], strict=True)
    }


def _route(group: Mapping[str, Any]) -> str | None:
    if group.get("lmo") is not None:
        return "lmo"
    return {True: "muon", False: "adamw", None: None}[group.get("use_muon")]


def _tell(on: str | None, entry: Mapping[str, Any] = _NOTHING, present: str | None = None) -> dict[str, Any]:
    """The route and shape of a parameter; its state tells what ``on`` does not."""
    tensors = {key: entry[key] for key in _ROUTE_OF if isinstance(entry.get(key), Tensor)}
    if on is None and tensors:
        # of two kinds of state, that of the present route is a blank made for loading, and the other was saved
        on = min((_ROUTE_OF[key] for key in tensors if key != _KEY_OF[present]), default=present)
    return {"on": on, "shape": next((list(value.shape) for value in tensors.values()), None)}


def _has_tensors(entry: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in entry.values())
