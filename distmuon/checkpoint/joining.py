"""One state dict of two optimizers, Muon for matrices and a user's own for the rest, and the way back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from distmuon.checkpoint.fitting import fit, resets
from distmuon.checkpoint.routing_table import enumerate_differences
from distmuon.comm.layout import lay_out
from distmuon.groups import GROUP_KEYS, Group
from distmuon.routing import clean_name

StateDict: TypeAlias = dict[str, Any]
Place: TypeAlias = "tuple[int, Hashable]"


def packed(groups: Sequence[Group]) -> list[Group]:
    """Groups as a state dict has them, parameters numbered through."""
    count, found = 0, []
    for group in groups:
        found.append({**group, "params": list(range(count, count + len(group["params"])))})
        count += len(group["params"])
    return found


def join_state_dicts(matrices: StateDict, rest: StateDict, names: Sequence[Sequence[str | None]]) -> StateDict:
    """Put the state dict of another optimizer behind that of :class:`distmuon.Muon`.

    Args:
        matrices: Of Muon.
        rest: Of the other; entries of its own are kept.
        names: Of the other's parameters, by group; None: not known.

    Returns:
        One state dict, whose later groups say ``use_muon=False`` and, where all are known, the names.
    """
    first = sum(len(group["params"]) for group in matrices["param_groups"])
    numbers = {id_ for group in rest["param_groups"] for id_ in group["params"]}
    groups = []
    for group, members in zip(rest["param_groups"], names, strict=True):
        told = {"param_names": list(members)} if all(members) else {}
        groups.append({**told, **group, "params": [first + id_ for id_ in group["params"]], "use_muon": False})
    return {
        **rest,
        "state": {
            **matrices["state"],
            **{first + id_ if id_ in numbers else id_: entry for id_, entry in rest["state"].items()},
        },
        "param_groups": [*matrices["param_groups"], *groups],
    }


def split_state_dict(
    state_dict: StateDict,
    muon_groups: Sequence[Group],
    groups: Sequence[Group],
    names: Sequence[Sequence[str | None]],
    changed: str,
) -> tuple[StateDict, StateDict]:
    """Undo :func:`join_state_dicts`; nothing is written.

    Args:
        state_dict: Joined, or of :class:`distmuon.Muon`, or what ``torch.distributed.checkpoint`` makes of one.
        muon_groups: The present groups of Muon.
        groups: The present groups of the other optimizer.
        names: Of its parameters, by group; None: not known.
        changed: As for :meth:`distmuon.Muon.load_state_dict`.

    Returns:
        What Muon and the other optimizer are to load.

    Raises:
        ValueError: if parameters or groups changed, listing them.
    """
    if not {"state", "param_groups"} <= {*state_dict}:
        fit(state_dict, muon_groups, changed=changed)  # it says what this is
    saved = state_dict["param_groups"]
    flags = [group.get("use_muon") for group in saved]
    present = [True] * len(muon_groups) + [False] * len(groups)
    if len(flags) == len(present) and _qualified(saved):
        flags = list(present)
    elif not any(flags):
        raise ValueError(
            "the state dict has no groups of Muon: it is of an optimizer before distmuon.wrap. Load it into that "
            "optimizer first, and wrap it then."
        )
    on_muon = [group for group, flag in zip(saved, flags, strict=True) if flag]
    others = [group for group, flag in zip(saved, flags, strict=True) if not flag]
    ids = {id_ for group in on_muon for id_ in group["params"]}
    state = state_dict["state"]
    matrices = {"state": {id_: state[id_] for id_ in ids if id_ in state}, "param_groups": on_muon}
    # before the other part is looked at, whose complaints would be of the same parameters
    fitted = fit(matrices, muon_groups, changed=changed)
    rest_state = {id_: entry for id_, entry in state.items() if id_ not in ids}
    rest = _fit_rest(rest_state, others, groups, names, reset=resets(changed))
    return {**matrices, **fitted}, {**state_dict, **rest}


def _qualified(saved: Sequence[Group]) -> bool:
    """Whether torch.distributed.checkpoint made the groups: the present parameters, some without settings."""
    return any(isinstance(id_, str) for group in saved for id_ in group["params"])


def _fit_rest(
    state: Mapping[Hashable, Any],
    saved: Sequence[Group],
    groups: Sequence[Group],
    names: Sequence[Sequence[str | None]],
    *,
    reset: bool,
) -> StateDict:
    """The present groups with saved settings, and state in the layouts of the parameters."""
    sources, places = _places(saved, groups, names, reset=reset)
    strangers = {id_ for group in saved for id_ in group["params"]}
    # state of no parameter, as some optimizers have it
    kept: dict[Hashable, Any] = {id_: entry for id_, entry in state.items() if id_ not in strangers}
    merged = []
    for index, (group, source, ids) in enumerate(zip(groups, sources, places, strict=True)):
        # a parameter without state needs a key that no other has
        params = [("new", index, place) if id_ is None else id_ for place, id_ in enumerate(ids)]
        merged.append({**group, **_settings(source, group), "params": params})
        for param, id_ in zip(group["params"], ids, strict=True):
            if id_ is not None and id_ in state:
                kept[id_] = {key: _lay_out(key, value, param) for key, value in state[id_].items()}
    return {"state": kept, "param_groups": merged}


def _places(
    saved: Sequence[Group], groups: Sequence[Group], names: Sequence[Sequence[str | None]], *, reset: bool
) -> tuple[list[Group], list[list[Hashable]]]:
    """For each present group the saved one with its settings, and for each parameter its key in the saved state."""
    told: dict[str, Place] = {}
    for index, group in enumerate(saved):
        for name, id_ in zip(group.get("param_names", ()), group["params"], strict=False):
            told[clean_name(name)] = index, id_
    whole = len(told) == sum(len(group["params"]) for group in saved) and all(map(all, names))
    if whole and told and not _qualified(saved):
        return _by_name(saved, groups, names, told, reset=reset)
    sizes, old = [len(group["params"]) for group in groups], [len(group["params"]) for group in saved]
    if sizes != old:
        raise ValueError(
            f"the groups beside Muon have {old} parameters in the state dict and {sizes} in the optimizer, and names "
            "are not known: build the optimizer with the groups of the run that saved it."
        )
    return list(saved), [list(group["params"]) for group in saved]


def _by_name(
    saved: Sequence[Group],
    groups: Sequence[Group],
    names: Sequence[Sequence[str | None]],
    told: Mapping[str, Place],
    *,
    reset: bool,
) -> tuple[list[Group], list[list[Hashable]]]:
    present = {str(name) for members in names for name in members}
    found = [f"{name!r} is new" for name in sorted(present - told.keys())]
    found += [f"{name!r} is missing" for name in sorted(told.keys() - present)]
    sources, places = [], []
    for index, (group, members) in enumerate(zip(groups, names, strict=True)):
        known = [told.get(str(name)) for name in members]
        numbers = {place[0] for place in known if place is not None}
        if len(numbers) > 1:
            found.append(f"group {index} beside Muon is of the saved groups {sorted(numbers)}")
        sources.append(saved[min(numbers)] if len(numbers) == 1 else group)
        places.append([None if place is None else place[1] for place in known])
    if found and not reset:
        raise ValueError(
            f"the state dict is not of the parameters that stayed beside Muon: {enumerate_differences(found)}. Build "
            "the model and the optimizer as in the run that saved it, or let these parameters start without state by "
            "load_state_dict(..., changed='reset')."
        )
    return sources, places


def _settings(saved: Group, present: Group) -> Group:
    """Saved settings that are of this kind of group, with the tuples that torch has turned into lists."""
    return {
        key: tuple(value) if isinstance(present.get(key), tuple) else value
        for key, value in saved.items()
        if key != "param_names" and (key in present or key not in GROUP_KEYS)
    }


def _lay_out(key: str, value: Any, param: Tensor) -> Any:
    return lay_out(key, value, param) if isinstance(value, Tensor) and value.shape == param.shape else value
