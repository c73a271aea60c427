"""What all formats are read into and written from: a parameter's settings and state, in the units of this project."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

StateDict: TypeAlias = dict[str, Any]
Shapes: TypeAlias = Mapping[str, Sequence[int]]

MUON_KEYS = (
    "lr",
    "weight_decay",
    "momentum",
    "nesterov",
    "ns_coefficients",
    "ns_steps",
    "eps",
    "adjust_lr_fn",
    "initial_lr",
)
ADAMW_KEYS = ("lr", "weight_decay", "betas", "eps", "initial_lr")
# State keys, for formats that have the same
MUON_STATE = {"momentum_buffer": "momentum_buffer"}
ADAMW_STATE = {key: key for key in ("step", "exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
        name: Its name, or its place where no names are known.
        group: Number of the group that it was in.
        use_muon: Whether Muon updates it, or AdamW.
        settings: Its group's settings, by the group keys of :class:`distmuon.Muon`.
        state: By the state keys of :class:`distmuon.Muon`; the momentum is an average. Empty where there is none yet.
        flatten: Whether its axes after the first are joined; None where that makes no difference.
    """

    name: str
    group: int
    use_muon: bool
    settings: dict[str, Any]
    state: dict[str, Any]
    flatten: bool | None = None


@dataclass(frozen=True)
class Group:
    """A group of a state dict, its indices resolved.

    Attributes:
        number: Its place.
        settings: All its keys but the parameters and their names.
        names: Of its parameters.
        states: Of its parameters, in the keys of the format; empty where there is none.
    """

    number: int
    settings: dict[str, Any]
    names: list[str]
    states: list[dict[str, Any]]


class Format(Protocol):
    """How one project lays out the state of its optimizer."""

    @property
    def name(self) -> str:
        """What ``source`` and ``target`` call it."""

    def matches(self, state_dicts: Sequence[StateDict]) -> bool:
        """Whether the group keys are those of this format and of no other."""

    def read(self, state_dicts: Sequence[StateDict], names: Sequence[str], shapes: Shapes | None) -> list[Entry]:
        """The parameters in the order of the groups.

        Args:
            state_dicts: One, or as many as the format takes.
            names: Of the parameters, in the order of the groups.
            shapes: Of the parameters by name, where they are known.

        Raises:
            ValueError: for a key, value or state that this project cannot express or that is not there.
        """

    def write(self, groups: Sequence[Sequence[Entry]]) -> Any:
        """The state dict of these groups, or a tuple of several.

        Raises:
            ValueError: for a setting or state that the format cannot express.
        """


def read_groups(state_dict: StateDict, names: Sequence[str]) -> list[Group]:
    """Resolve the indices of a state dict.

    Args:
        state_dict: With ``state`` and ``param_groups``, as any torch optimizer has.
        names: As many as it has parameters, in the order of the groups.

    Raises:
        ValueError: for state of a parameter that is in no group.
    """
    groups, place, known = [], 0, set()
    for number, group in enumerate(state_dict["param_groups"]):
        indices = group["params"]
        known.update(indices)
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        states = [dict(state_dict["state"].get(index, {})) for index in indices]
        groups.append(Group(number, settings, list(names[place : place + len(indices)]), states))
        place += len(indices)
    for index in state_dict["state"]:
        if index not in known:
            raise ValueError(f"the state dict has state of parameter {index!r}, which is in none of its groups.")
    return groups


def write_groups(groups: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]]) -> StateDict:
    """A state dict of groups, each its settings and the states of its parameters."""
    state, written, index = {}, [], 0
    for settings, states in groups:
        written.append({**settings, "params": list(range(index, index + len(states)))})
        for kept in states:
            if kept:
                state[index] = kept
            index += 1
    return {"state": state, "param_groups": written}


def check_keys(group: Group, project: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Refuse a group that has other keys than a project's.

    Raises:
        ValueError: naming the key, and the first parameter of the group.
    """
    keys, wanted = set(group.settings), {*required}
    for kind, odd in (("lacks", wanted - keys), ("has the unknown", keys - wanted - {*optional, "initial_lr"})):
        if odd:
            where = f" (of parameter {group.names[0]!r})" if group.names else ""
            raise ValueError(
                f"group {group.number}{where} {kind} key {sorted(odd)[0]!r} for a state dict of {project}: name the "
                "format that it has with source=."
            )


def has_keys(state_dicts: Sequence[StateDict], required: Iterable[str], optional: Iterable[str] = ()) -> bool:
    """Whether each group of each state dict has the required keys and none beside the optional ones."""
    wanted = {*required}
    allowed = wanted | {*optional, "params", "param_names", "initial_lr"}
    return all(wanted <= {*group} <= allowed for one in state_dicts for group in one["param_groups"])


def read_state(
    name: str, state: Mapping[str, Any], keys: Mapping[str, str], ignored: Iterable[str] = ()
) -> dict[str, Any]:
    """Rename the state of a parameter, all of it or none.

    Args:
        name: Of the parameter.
        state: In the keys of a format.
        keys: From those of this project to those of the format.
        ignored: Keys of the format that hold no state.

    Raises:
        ValueError: for a key that is unknown, or missing beside others, naming the parameter.
    """
    present = {key: value for key, value in state.items() if key not in ignored}
    if not present:
        return {}
    for key in present:
        if key not in keys.values():
            raise ValueError(
                f"parameter {name!r} has the state {key!r}, which is unknown here; there should be "
                f"{', '.join(keys.values())}: name the format with source=, or check the order of names."
            )
    for key in keys.values():
        if key not in present:
            raise ValueError(f"parameter {name!r} lacks the state {key!r}: the file was not written to its end.")
    return {ours: present[theirs] for ours, theirs in keys.items()}


def read_adamw_state(name: str, state: Mapping[str, Any], keys: Mapping[str, str] = ADAMW_STATE) -> dict[str, Any]:
    """`read_state` of a parameter on AdamW, its step counter as :class:`torch.optim.AdamW` keeps it."""
    found = read_state(name, state, keys)
    return {**found, "step": step_tensor(found["step"])} if found else found


def read_adamw(group: Group, settings: dict[str, Any], keys: Mapping[str, str] = ADAMW_STATE) -> list[Entry]:
    """The parameters of a group on AdamW, of these settings in the keys of this project."""
    return [
        Entry(name, group.number, False, settings, read_adamw_state(name, state, keys))
        for name, state in zip(group.names, group.states, strict=True)
    ]


def complete(entries: Sequence[Entry], advice: str) -> None:
    """Refuse entries of which some have state and others have none.

    Raises:
        ValueError: naming a parameter without, with ``advice`` as its end.
    """
    for entry in entries:
        if not entry.state and any(other.state for other in entries):
            raise ValueError(f"parameter {entry.name!r} has no state and others have: {advice}")


def scale(tensor: Tensor, factor: float) -> Tensor:
    """``tensor * factor``, rounded once; DTensors stay what they are."""
    if tensor.device.type == "mps":  # has no float64
        return tensor * factor
    return (tensor.to(torch.float64) * factor).to(tensor.dtype)


def as_average(name: str, total: Tensor, momentum: float) -> Tensor:
    """From a sum ``B <- momentum * B + g`` to the average of this project.

    Raises:
        ValueError: for a momentum with which there is no average.
    """
    return scale(total, 1 - _below_one(name, momentum))


def as_sum(name: str, average: Tensor, momentum: float) -> Tensor:
    """The inverse of `as_average`; 1 ulp from what that was given."""
    return scale(average, 1 / (1 - _below_one(name, momentum)))


def step_tensor(step: Any) -> Tensor:
    """A step counter as :class:`torch.optim.AdamW` keeps it: float32, 0-d, on the host."""
    return torch.tensor(step_number(step), dtype=torch.float32)


def step_number(step: Any) -> int:
    """A step counter, which may be a tensor, as a number."""
    return int(step.item()) if isinstance(step, Tensor) else int(step)


def number(value: Any) -> Any:
    """A setting that may be kept in a tensor, as a number."""
    return value.item() if isinstance(value, Tensor) else value


def kept(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Those of some keys that are there, with the base rate of schedulers."""
    return {key: number(settings[key]) for key in (*keys, "initial_lr") if key in settings}


def common(entries: Sequence[Entry], keys: Iterable[str]) -> dict[str, Any]:
    """The settings that parameters share.

    Args:
        entries: Parameters that are to stand in one group.
        keys: Which settings; those that none has are left out.

    Raises:
        ValueError: where two differ, naming both.
    """
    found: dict[str, Any] = {}
    for key in keys:
        first = entries[0]
        for other in entries[1:]:
            if _plain(other.settings.get(key)) != _plain(first.settings.get(key)):
                raise ValueError(
                    f"parameters {first.name!r} and {other.name!r} are to share a group, and have {key}="
                    f"{first.settings.get(key)!r} and {key}={other.settings.get(key)!r}: put them in groups of their "
                    "own, or make the settings equal first."
                )
        if key in first.settings:
            found[key] = first.settings[key]
    return found


def _plain(value: Any) -> Any:
    value = number(value)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _below_one(name: str, momentum: float) -> float:
    momentum = float(momentum)
    if not 0 <= momentum < 1:
        raise ValueError(f"parameter {name!r} has momentum={momentum}, and a sum has an average only below 1.")
    return momentum
