"""From the state of another Muon to that of this one, and back: by name, through one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch.optim import Optimizer

from distmuon.checkpoint.formats import FORMATS, Entry, Format, Shapes, StateDict
from distmuon.checkpoint.formats.naming import (
    check_algorithms,
    check_routes,
    fit,
    named_params,
    placeholders,
    regroup,
    shapes_of,
    source_names,
)

# Formats of which there may be several state dicts: of two optimizers, or of all ranks
_SEVERAL = ("torch", "kellerjordan")


def convert(
    state: StateDict | Sequence[StateDict],
    *,
    source: str | None = None,
    target: str = "distmuon",
    optimizer: Optimizer | None = None,
    names: Iterable[str] | None = None,
    target_names: Sequence[Iterable[str]] | None = None,
    settings: Literal["source", "optimizer"] = "source",
) -> Any:
    """Convert the state dict of one Muon into that of another.

    Taking over a run of another project::

        state = torch.load("optimizer.pt", weights_only=True)
        optimizer.load_state_dict(convert(state, source="moonlight", optimizer=optimizer, names=names))

    and going back to it: ``convert(optimizer.state_dict(), target="moonlight")``.

    Formats are ``"distmuon"``, ``"torch"`` (torch.optim.Muon, alone or with the torch.optim.AdamW of the other
    parameters), ``"kellerjordan"`` (MuonWithAuxAdam) and ``"kellerjordan_single"`` (SingleDeviceMuonWithAuxAdam),
    ``"dion"`` (Muon of microsoft/dion), ``"moonlight"``, ``"fsdp_optimizers"`` and ``"muon_fsdp2"``; docs/convert.md
    says what each keeps and where that was read.

    A state dict counts parameters by index, and each project has an order of its own, so names tell which is which.
    Without names and ``optimizer`` the parameters keep their order, which is right for groups of the same parameters.

    Args:
        state: What ``state_dict()`` of the source's optimizer returned. A sequence of them for torch (Muon's, then
            AdamW's) and kellerjordan (those of all ranks, each of which keeps its own matrices alone).
        source: The format of ``state``; None: recognized by the keys of its groups.
        target: The format to make.
        optimizer: With target ``"distmuon"``, the :class:`distmuon.Muon` that will load the result, built from a
            module or from named parameters: gives its groups, their order, and shapes to check.
        names: Of the source's parameters, in the order of its groups. None takes the names that the groups hold.
        target_names: Of the target's parameters, one iterable a group, in its order. None: those of ``optimizer``,
            or the groups and the order of the source. With target ``"torch"`` those of Muon come first. Matrices of
            MuonWithAuxAdam need not be sorted as that class does, nor does the one group of Moonlight have to begin
            with them.
        settings: ``"source"`` takes learning rates, momentum, iteration and scale of the source, so that training goes
            on as there; ``"optimizer"`` keeps those of ``optimizer``, and moves the state alone.

    Returns:
        A state dict; for ``"torch"`` two, Muon's and AdamW's. Tensors that need no change are those of ``state``.

    Raises:
        ValueError: for an unknown format, one that cannot be told, names that are wrong in number or not found, a shape
            that does not fit, state that is missing or unknown, and settings that the target cannot express; the
            parameter is named. For parameters that change between Muon and AdamW too.
        TypeError: if ``optimizer`` is not a :class:`distmuon.Muon`.
    """
    state_dicts = _state_dicts(state)
    writer = _format(target, "target")
    _check_arguments(target, optimizer, target_names, settings)
    reader = _recognize(state_dicts) if source is None else _format(source, "source")
    if len(state_dicts) > 1 and reader.name not in _SEVERAL:
        raise ValueError(f"{reader.name} has one state dict, and there are {len(state_dicts)}.")
    # those of several ranks are of the same parameters
    distinct = state_dicts[:1] if reader.name == "kellerjordan" else state_dicts
    shapes = None if optimizer is None else shapes_of(named_params(optimizer))
    known = source_names(distinct, names)
    if source is None and reader.name == "kellerjordan" and known is not None and shapes is not None:
        _check_sorted(distinct[0], known, shapes)
    entries = reader.read(state_dicts, known or placeholders(distinct), shapes)
    if target != "distmuon":
        _check_rest(entries, target)
    groups = _target_groups(entries, optimizer, target_names, named=known is not None, shapes=shapes)
    if target != "moonlight" and target != "fsdp_optimizers":
        check_algorithms(groups)
    if optimizer is not None and settings == "optimizer":
        groups = [
            [replace(entry, settings=_settings_of(group)) for entry in members]
            for members, group in zip(groups, optimizer.param_groups, strict=True)
        ]
    result = writer.write(groups)
    if target == "distmuon" and known is None:
        for group in result["param_groups"]:
            del group["param_names"]
    return result


def _state_dicts(state: StateDict | Sequence[StateDict]) -> list[StateDict]:
    found: list[Any] = [state] if isinstance(state, dict) else list(state)
    for one in found:
        if not isinstance(one, dict) or not {"state", "param_groups"} <= {*one}:
            kind = f"the keys {', '.join(map(str, one))}" if isinstance(one, dict) else f"a {type(one).__name__}"
            raise ValueError(
                f"this is no state dict of an optimizer, which has 'state' and 'param_groups': found {kind}. In the "
                "file of a whole run it is one of the entries."
            )
    if not found:
        raise ValueError("the sequence of state dicts is empty: pass at least one.")
    return found


def _format(name: str, role: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"{role}={name!r} is unknown; known: {', '.join(FORMATS)}.")
    return FORMATS[name]


def _check_arguments(
    target: str, optimizer: Optimizer | None, target_names: Sequence[Iterable[str]] | None, settings: str
) -> None:
    if settings not in ("source", "optimizer"):
        raise ValueError(f"settings={settings!r}: it is 'source' or 'optimizer'.")
    if settings == "optimizer" and optimizer is None:
        raise ValueError("settings='optimizer' keeps the settings of an optimizer: pass optimizer=.")
    if optimizer is not None and (target != "distmuon" or target_names is not None):
        raise ValueError("optimizer= is the distmuon.Muon to load the result: leave out target= and target_names=.")


def _recognize(state_dicts: Sequence[StateDict]) -> Format:
    matching = [found for found in FORMATS.values() if found.matches(state_dicts)]
    if len(matching) == 1:
        return matching[0]
    keys = sorted({str(key) for one in state_dicts for group in one["param_groups"] for key in group})
    which = f"may be of {', '.join(found.name for found in matching)}" if matching else "is in no format known here"
    raise ValueError(
        f"the state dict {which}, with the group keys {', '.join(keys)}: pass source=, one of {', '.join(FORMATS)}."
    )


def _check_rest(entries: Sequence[Entry], target: str) -> None:
    """Refuse steps of what is no matrix that only this project makes."""
    for entry in entries:
        for key in ("lmo", "cautious_wd"):
            if not entry.use_muon and entry.settings.get(key):
                raise ValueError(
                    f"parameter {entry.name!r} has {key}={entry.settings[key]!r}, and {target} updates what is no "
                    "matrix by AdamW alone: its state would go on as another optimizer's."
                )


def _check_sorted(state_dict: StateDict, names: Sequence[str], shapes: Shapes) -> None:
    """Refuse to guess between the two classes of KellerJordan/Muon where names would be read differently."""
    place = 0
    for group in state_dict["param_groups"]:
        here = [tuple(shapes[name]) for name in names[place : place + len(group["params"])] if name in shapes]
        place += len(group["params"])
        if group.get("use_muon", True) and here != sorted(here, reverse=True):
            raise ValueError(
                "the state dict may be of MuonWithAuxAdam, which sorts its matrices, or of "
                "SingleDeviceMuonWithAuxAdam, which does not, and names= is not sorted: pass source='kellerjordan' or "
                "'kellerjordan_single'."
            )


def _target_groups(
    entries: Sequence[Entry],
    optimizer: Optimizer | None,
    target_names: Sequence[Iterable[str]] | None,
    *,
    named: bool,
    shapes: Shapes | None,
) -> list[list[Entry]]:
    if optimizer is None and target_names is None:
        return _as_in_source(entries)
    if not named:
        raise ValueError(
            "the groups of the source hold no names, by which the target's parameters are found: pass names=, those of "
            "the source's parameters in the order of its groups."
        )
    if shapes is not None:
        entries = [fit(entry, shapes) for entry in entries]
    if optimizer is None:
        assert target_names is not None
        return regroup(entries, target_names)
    groups = regroup(entries, [group["param_names"] for group in optimizer.param_groups])
    check_routes(groups, optimizer)
    return groups


def _as_in_source(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The groups of the source, one for each algorithm and reading of axes."""
    groups: dict[tuple[int, bool, bool], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.group, not entry.use_muon, bool(entry.flatten)), []).append(entry)
    return list(groups.values())


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names", "use_muon", "flatten")}
