"""Settings that other projects have built in: what fits them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distmuon.checkpoint.formats.entries import MUON_KEYS, Entry
from distmuon.numerics.coefficients import TABLES, Stage, resolve_stages
from distmuon.numerics.rationals import RATIONALS, Rational
from distmuon.numerics.update import resolve_lr_scale

QUINTIC: Stage = TABLES["quintic"].stages[0]


def check_muon(entry: Entry, project: str, **built_in: Any) -> None:
    """Refuse settings of a matrix that a project does not have.

    Args:
        entry: A parameter on Muon.
        project: For messages.
        built_in: Settings that the project has in its code, by key.

    Raises:
        ValueError: naming the parameter and the setting.
    """
    for key, value in entry.settings.items():
        if key not in MUON_KEYS and value not in (None, False):
            raise ValueError(f"parameter {entry.name!r} has {key}={value!r}, which {project} does not know.")
    for key, wanted in built_in.items():
        found = entry.settings.get(key, wanted)
        same = resolve_lr_scale(found) == wanted if key == "adjust_lr_fn" else found == wanted
        if not same:
            raise ValueError(
                f"parameter {entry.name!r} has {key}={found!r}, and {project} has {key}={wanted!r} built in: its "
                "steps would be others. Change the group of the state dict first if that is what you want."
            )


def check_built_in_scale(entry: Entry, project: str, theirs: float, ours: float) -> None:
    """Refuse a matrix that a project scales otherwise.

    Args:
        entry: A parameter on Muon.
        project: For messages.
        theirs: The factor on its learning rate there.
        ours: The factor here.

    Raises:
        ValueError: naming the parameter and both.
    """
    if abs(theirs - ours) > 1e-9 * ours:
        raise ValueError(
            f"parameter {entry.name!r} has its learning rate scaled by {ours:g} here and by {theirs:g} in {project}: "
            "no setting makes the steps equal."
        )


def polynomial(entry: Entry) -> tuple[Stage, ...] | None:
    """The stages of a matrix's iteration; None for ``"auto"``, which is none in particular.

    Raises:
        ValueError: for a rational function, which no other project has.
    """
    coefficients = entry.settings.get("ns_coefficients", "auto")
    steps = entry.settings.get("ns_steps")
    if isinstance(coefficients, str) and coefficients == "auto":
        return None if steps is None else resolve_stages("quintic", steps)
    if isinstance(coefficients, Rational) or (isinstance(coefficients, str) and coefficients in RATIONALS):
        raise ValueError(
            f"parameter {entry.name!r} has ns_coefficients={coefficients!r}, and a rational function is known to no "
            "other project: set ns_coefficients='auto' in its group first, which lets the target take its own."
        )
    return resolve_stages(coefficients, steps)


def repeated(entry: Entry, project: str, wanted: Stage | None = None) -> tuple[Stage, int]:
    """The one stage of a project that repeats it, and how often.

    Args:
        entry: A parameter on Muon.
        project: For messages.
        wanted: The stage that the project has built in; None: any of three numbers.

    Raises:
        ValueError: for an iteration that the project does not run, naming the parameter.
    """
    stages = polynomial(entry)
    if stages is None:
        return wanted or QUINTIC, 5
    stage = stages[0]
    if len(set(stages)) > 1 or len(stage) != 3 or wanted not in (None, stage):
        _refuse(entry, project)
    return stage, len(stages)


def check_stages(entry: Entry, project: str, known: Sequence[Sequence[Stage]]) -> None:
    """Refuse an iteration that is none of ``known``; ``"auto"`` passes.

    Raises:
        ValueError: naming the parameter.
    """
    stages = polynomial(entry)
    if stages is not None and stages not in [tuple(map(tuple, one)) for one in known]:
        _refuse(entry, project)


def _refuse(entry: Entry, project: str) -> None:
    coefficients, steps = entry.settings.get("ns_coefficients"), entry.settings.get("ns_steps")
    raise ValueError(
        f"parameter {entry.name!r} has ns_coefficients={coefficients!r} with ns_steps={steps}, which {project} does "
        "not run: set ns_coefficients='auto' and ns_steps=None in its group first, which lets the target take its own."
    )
