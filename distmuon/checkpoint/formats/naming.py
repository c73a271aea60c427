"""Which parameter is which: names on both sides, shapes that have to fit, and the groups of the target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.optim import Optimizer

from distmuon.checkpoint.formats.entries import Entry, Shapes, StateDict
from distmuon.groups import bare_params
from distmuon.routing import clean_name

_ALGORITHMS = ("AdamW", "Muon")


def source_names(state_dicts: Sequence[StateDict], names: Iterable[str] | None) -> list[str] | None:
    """Clean names of all parameters of the source, in the order of its groups.

    Args:
        state_dicts: Those of different parameters.
        names: As the user gave them; None takes those that the groups hold.

    Returns:
        The names; None where there are none.

    Raises:
        ValueError: for another number of names than of parameters, or a name that stands there twice.
    """
    groups = [group for one in state_dicts for group in one["param_groups"]]
    if names is None:
        # torch.distributed.checkpoint calls parameters by name
        members = [group.get("param_names", group["params"]) for group in groups]
        names = [name for group in members for name in group]
        if not all(isinstance(name, str) for name in names):
            return None
    found, seen = [clean_name(name) for name in names], set()
    count = sum(len(group["params"]) for group in groups)
    if len(found) != count:
        raise ValueError(
            f"there are {len(found)} names and the state dict has {count} parameters: names= lists all parameters of "
            "the source's groups, in their order."
        )
    for name in found:
        if name in seen:
            raise ValueError(f"parameter {name!r} stands twice among the names of the source: name each once.")
        seen.add(name)
    return found


def placeholders(state_dicts: Sequence[StateDict]) -> list[str]:
    """What to call parameters without names in messages."""
    count = sum(len(group["params"]) for one in state_dicts for group in one["param_groups"])
    return [f"#{index} of the source" for index in range(count)]


def named_params(optimizer: Optimizer) -> dict[str, Tensor]:
    """The parameters of a :class:`distmuon.Muon` by clean name.

    Raises:
        TypeError: for another optimizer.
        ValueError: if it was built of bare parameters, which have no names.
    """
    found: dict[str, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        if "use_muon" not in group or "adjust_lr_fn" not in group:
            raise TypeError(f"optimizer is a {type(optimizer).__name__}: pass the distmuon.Muon that loads the result.")
        if "param_names" not in group:
            raise ValueError(
                f"group {index} of optimizer has no names: build it from the module or from named parameters, or leave "
                "optimizer= out where the groups are those of the source."
            )
        for name, param in zip(group["param_names"], bare_params(group), strict=True):
            found[clean_name(name)] = param
    return found


def regroup(entries: Sequence[Entry], wanted: Sequence[Iterable[str]]) -> list[list[Entry]]:
    """Put parameters into the groups of the target.

    Args:
        entries: All of the source.
        wanted: Names by group.

    Raises:
        ValueError: for a parameter that one side has and the other has not, or a group of both algorithms.
    """
    by_name = {entry.name: entry for entry in entries}
    groups: list[list[Entry]] = []
    for members in wanted:
        if isinstance(members, str):
            raise ValueError(f"target_names holds the name {members!r} where names of a group belong: [[...], [...]].")
        found = []
        for name in map(clean_name, members):
            if name not in by_name:
                raise ValueError(
                    f"parameter {name!r} of the target is not among the source's, or stands twice in the target: "
                    "check names=."
                )
            found.append(by_name.pop(name))
        if not found:
            raise ValueError(f"group {len(groups)} of the target has no names: leave it out.")
        groups.append(found)
    if by_name:
        raise ValueError(f"parameter {next(iter(by_name))!r} of the source is not among the target's: check names=.")
    return groups


def check_algorithms(groups: Sequence[Sequence[Entry]]) -> None:
    """Refuse a group of which Muon updates a part and AdamW another.

    Raises:
        ValueError: naming a parameter of each.
    """
    for members in groups:
        for entry in members[1:]:
            if entry.use_muon != members[0].use_muon:
                raise ValueError(
                    f"parameters {members[0].name!r} and {entry.name!r} are to share a group, and one is on "
                    f"{_ALGORITHMS[members[0].use_muon]} and the other on {_ALGORITHMS[entry.use_muon]}: name them in "
                    "groups of their own."
                )


def check_routes(groups: Sequence[Sequence[Entry]], optimizer: Optimizer) -> None:
    """Refuse parameters that the optimizer updates otherwise than the source did.

    Args:
        groups: As in the optimizer.
        optimizer: A :class:`distmuon.Muon`.

    Raises:
        ValueError: naming the parameter.
    """
    for members, group in zip(groups, optimizer.param_groups, strict=True):
        for entry in members:
            if entry.use_muon != group["use_muon"]:
                key = "muon_names" if entry.use_muon else "adamw_names"
                raise ValueError(
                    f"parameter {entry.name!r} is on {_ALGORITHMS[entry.use_muon]} in the source and on "
                    f"{_ALGORITHMS[group['use_muon']]} in optimizer, and their states differ: build the optimizer with "
                    f"{key}=[{entry.name!r}]."
                )
            axes = max((value.ndim for value in entry.state.values()), default=0)
            if entry.use_muon and axes > 2 and entry.flatten not in (None, group["flatten"]):
                raise ValueError(
                    f"parameter {entry.name!r} of {axes} axes has flatten={entry.flatten} in the source and "
                    f"{group['flatten']} in optimizer, so its matrices are others: put it in a group with "
                    f"flatten={entry.flatten}."
                )


def fit(entry: Entry, shapes: Shapes) -> Entry:
    """Check the shapes of state, and give momentum that was flattened its axes back.

    Args:
        entry: A parameter of the source.
        shapes: Global shapes by name.

    Raises:
        ValueError: for state of another shape, naming the parameter.
    """
    shape = shapes.get(entry.name)
    if shape is None:
        return entry
    state = dict(entry.state)
    for key, value in state.items():
        if key == "step" or tuple(value.shape) == tuple(shape):
            continue
        if key != "momentum_buffer" or tuple(value.shape) != (shape[0], math.prod(shape[1:])):
            raise ValueError(
                f"parameter {entry.name!r} has {key} of shape {tuple(value.shape)} in the source and is of shape "
                f"{tuple(shape)} in optimizer: check the order of names=."
            )
        state[key] = value.reshape(tuple(shape))
    return replace(entry, state=state)


def shapes_of(params: Mapping[str, Tensor]) -> Shapes:
    """Global shapes by name."""
    return {name: tuple(param.shape) for name, param in params.items()}
