"""Which parameters of a user's optimizer go to Muon, and where they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from distmuon.groups import Group, Params, as_groups
from distmuon.routing import Route

# Settings of a group that its matrices take along
_TAKEN = ("lr", "weight_decay")


@dataclass
class Origin:
    """A group of the user's optimizer as it was before its matrices moved.

    Attributes:
        slots: For each parameter, in order: the number of its group in Muon, None if it stayed, and its place there.
        names: Clean names in the model; None: the parameter is not the model's.
        own_names: The ``param_names`` that the user gave.
        left_out: The group itself if it has nothing left and is out of the user's optimizer for the while.
    """

    slots: list[tuple[int | None, int]]
    names: list[str | None]
    own_names: list[str] | None
    left_out: Group | None = None

    @property
    def stayed(self) -> list[str | None]:
        """Names of what stayed, in order."""
        return [name for name, (moved, _) in zip(self.names, self.slots, strict=True) if moved is None]


@dataclass(frozen=True)
class Roads:
    """Where the parameters of a model go.

    Attributes:
        routes: By clean name.
        names: Clean names, by ``id`` of the parameter.
        kinds: For each parameter that moves, by ``id``, the number of its kind.
        settings: By such a number, what Muon is to know of a group of that kind.
    """

    routes: dict[str, Route] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, int] = field(default_factory=dict)
    settings: list[Group] = field(default_factory=list)

    @classmethod
    def of(cls, params: Params, **routing: Any) -> Roads:
        """Those of :class:`distmuon.Muon` over the same.

        Args:
            params: A module or named parameters.
            **routing: What :func:`distmuon.groups.as_groups` takes.
        """
        groups, routes = as_groups(params, **{"muon_names": (), "adamw_names": (), **routing})
        roads = cls(routes)
        for group in groups:
            roads.names.update((id(param), name) for name, param in group["params"])
            if group["use_muon"]:
                roads.kinds.update((id(param), len(roads.settings)) for _, param in group["params"])
                roads.settings.append({key: value for key, value in group.items() if key != "params"})
        return roads


def divide(group: Group, roads: Roads, first: int, kept: Iterable[str]) -> tuple[Origin, list[Group]]:
    """Say what of a group moves; nothing is written.

    Args:
        group: Of the user's optimizer.
        roads: Of the model.
        first: The number that the first new group of Muon gets.
        kept: Which of ``lr`` and ``weight_decay`` Muon's groups do not take from this one.

    Returns:
        Where the parameters were, and a group for Muon of each kind that is among them.

    Raises:
        ValueError: for a group that maximizes, of which something would move to what minimizes.
    """
    kinds = [roads.kinds.get(id(param)) for param in group["params"]]
    names = [roads.names.get(id(param)) for param in group["params"]]
    members: dict[int | None, list[tuple[str | None, Tensor]]] = {kind: [] for kind in (None, *_sorted(kinds))}
    numbers = {kind: first + place for place, kind in enumerate(_sorted(kinds))}
    slots: list[tuple[int | None, int]] = []
    for param, name, kind in zip(group["params"], names, kinds, strict=True):
        slots.append((None if kind is None else numbers[kind], len(members[kind])))
        members[kind].append((name, param))
    if numbers and group.get("maximize"):
        raise ValueError(
            "a group of the optimizer has maximize=True, and Muon minimizes: negate the loss and leave maximize out, "
            "or keep its matrices out of Muon by adamw_names."
        )
    own_names = group.get("param_names")
    origin = Origin(slots, names, None if own_names is None else list(own_names))
    taken = {key: group.get(key, 0.0) for key in _TAKEN if key not in kept}
    if "initial_lr" in group and "lr" in taken:
        taken["initial_lr"] = group["initial_lr"]
    if group.get("name"):
        taken["name"] = group["name"]
    return origin, [
        {
            **roads.settings[kind],
            # a tensor is a setting of its own, which a scheduler fills in place
            **{key: value.clone() if isinstance(value, Tensor) else value for key, value in taken.items()},
            # not pairs, which Muon would look at once more and warn of again
            "params": [param for _, param in members[kind]],
            "param_names": [name for name, _ in members[kind]],
        }
        for kind in numbers
    ]


def take_out(optimizer: Optimizer, origins: Sequence[Origin]) -> list[str]:
    """Take what moved out of the user's optimizer, with its state; groups without parameters are left out.

    Args:
        optimizer: Its last groups are those of ``origins``; written.
        origins: Where parameters were; groups that are left out are noted there.

    Returns:
        Names of the parameters whose state was dropped.
    """
    dropped = []
    first = len(optimizer.param_groups) - len(origins)
    for origin, group in zip(origins, optimizer.param_groups[first:], strict=True):
        stays = [moved is None for moved, _ in origin.slots]
        for param, name, stayed in zip(group["params"], origin.names, stays, strict=True):
            if not stayed and optimizer.state.pop(param, None):
                dropped.append(str(name))
        # the lists are new: others may hold the old ones
        group["params"] = _where(group["params"], stays)
        if origin.own_names is not None:
            group["param_names"] = _where(origin.own_names, stays)
        origin.left_out = group if origin.slots and not any(stays) else None
    left_out = {id(origin.left_out) for origin in origins}
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if id(group) not in left_out]
    return dropped


def put_back(optimizer: Optimizer, origins: Sequence[Origin], moved: Sequence[Group], taken: bool) -> None:
    """Undo :func:`take_out`: every parameter in its group and place, those that moved without state.

    Args:
        optimizer: The user's; written.
        origins: Of all its groups.
        moved: The groups of Muon. Those that came from no group become new groups.
        taken: Whether they have the learning rates of the groups that they came from, so that a group that was left
            out takes theirs, which a schedule may have changed.
    """
    present = iter(list(optimizer.param_groups))
    groups: list[Group] = []
    used = set()
    for origin in origins:
        group = next(present) if origin.left_out is None else origin.left_out
        params = [(group if number is None else moved[number])["params"][place] for number, place in origin.slots]
        numbers = [number for number, _ in origin.slots if number is not None]
        used.update(numbers)
        if origin.left_out is not None and taken:
            group.update({key: moved[numbers[0]][key] for key in ("lr", "initial_lr") if key in moved[numbers[0]]})
        group["params"] = params
        if origin.own_names is not None:
            group["param_names"] = list(origin.own_names)
        groups.append(group)
    optimizer.param_groups[:] = groups
    for number, group in enumerate(moved):
        if number not in used:
            named = any("param_names" in known for known in groups)
            params = list(zip(group["param_names"], group["params"], strict=True)) if named else list(group["params"])
            settings: dict[str, Any] = {key: group[key] for key in _TAKEN if key in optimizer.defaults}
            optimizer.add_param_group({**settings, "params": params})


def _sorted(kinds: Iterable[int | None]) -> list[int]:
    return sorted({kind for kind in kinds if kind is not None})


def _where(items: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    return [item for item, keep in zip(items, chosen, strict=True) if keep]
