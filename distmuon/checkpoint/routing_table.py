"""Who updates which parameter: a table to save beside a checkpoint, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch.optim import Optimizer

from distmuon.groups import group_names

RoutingTable: TypeAlias = dict[str, dict[str, Any]]

ALGORITHMS = {"muon": "Muon", "adamw": "AdamW", "lmo": "lmo"}
_SHOWN = 10


def routing_table(optimizer: Optimizer) -> RoutingTable:
    """What updates each parameter, by name; made of what JSON has.

    Args:
        optimizer: :class:`distmuon.Muon`, or one of torch's. All of its parameters are listed, frozen ones too.

    Returns:
        By name, without the prefixes of wrappers: ``{"on": "muon", "adamw" or "lmo", "shape": [...]}``, where the shape
        is the global one. It is the same on any number of ranks that hold the same parameters. Parameters without
        names are called by their places, ``"group 0, parameter 1"``.

    Raises:
        ValueError: if two parameters have one name.
    """
    table: RoutingTable = {}
    for index, group in enumerate(optimizer.param_groups):
        # torch.optim.Muon is all Muon and does not say so
        use_muon = group.get("use_muon", "ns_coefficients" in group)
        for name, param in zip(group_names(group, f"group {index}"), group["params"], strict=True):
            if name in table:
                raise ValueError(
                    f"two parameters of the optimizer are called {name!r}: name them as the whole model does, with "
                    "its named_parameters()."
                )
            on = "muon" if use_muon else "adamw" if group.get("lmo") is None else "lmo"
            table[name] = {"on": on, "shape": list(param.shape)}
    return table


def differences(saved: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Compare two routing tables.

    Args:
        saved: Of the run that wrote the checkpoint. ``None`` for a route or a shape: it is not known.
        present: Of the optimizer that is to load it.

    Returns:
        One text for each parameter that changed, empty if none did: first those in both tables, then renamed ones
        (one is gone and another of its route and shape is new), then missing ones, then new ones.
    """
    found = [_changed(name, saved[name], entry) for name, entry in present.items() if name in saved]
    gone = [name for name in saved if name not in present]
    added = [name for name in present if name not in saved]
    renamed = _renamed({name: saved[name] for name in gone}, {name: present[name] for name in added})
    found += [f"{old!r} is called {new!r} now" for old, new in renamed.items()]
    found += [f"{name!r} is missing ({_told(saved[name])})" for name in gone if name not in renamed]
    taken = set(renamed.values())
    found += [f"{name!r} is new ({_told(present[name])})" for name in added if name not in taken]
    return [text for text in found if text]


def changed_parameters(saved: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of parameters in both tables that have another route or shape."""
    return {name for name, entry in present.items() if name in saved and _changed(name, saved[name], entry)}


def enumerate_differences(found: Sequence[str]) -> str:
    """Join texts for an error message: up to ten, then how many more there are."""
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _changed(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What changed about a parameter that both tables have; empty if nothing did."""
    parts = []
    if _differ(old["on"], new["on"]):
        parts.append(f"was on {ALGORITHMS[old['on']]} and is on {ALGORITHMS[new['on']]} now")
    if _differ(old["shape"], new["shape"]):
        parts.append(f"had shape {tuple(old['shape'])} and has {tuple(new['shape'])} now")
    return f"{name!r} {', and '.join(parts)}" if parts else ""


def _differ(old: Any, new: Any) -> bool:
    if old is None or new is None:
        return False
    return old != new if isinstance(old, str) else tuple(old) != tuple(new)


def _renamed(gone: Mapping[str, Mapping[str, Any]], added: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Pairs of a name that is gone and a new one of the same route and shape, the most alike names first."""
    pairs = [
        (-_common_end(old, new), number, old, new)
        for number, (old, new) in enumerate(
            (old, new)
            for old in gone
            for new in added
            if not _differ(gone[old]["on"], added[new]["on"]) and not _differ(gone[old]["shape"], added[new]["shape"])
        )
    ]
    found: dict[str, str] = {}
    taken: set[str] = set()
    for _, _, old, new in sorted(pairs):
        if old not in found and new not in taken:
            found[old] = new
            taken.add(new)
    return {old: found[old] for old in gone if old in found}


def _common_end(a: str, b: str) -> int:
    """How many parts two names have in common, counted from the end."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count


def _told(entry: Mapping[str, Any]) -> str:
    parts = [f"on {ALGORITHMS[entry['on']]}"] if entry["on"] is not None else []
    parts += [f"shape {tuple(entry['shape'])}"] if entry["shape"] is not None else []
    return ", ".join(parts) or "nothing else is known of it"
