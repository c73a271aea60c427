"""What a parameter is read as: the argument ``matrices``, and the keys of its group."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from distmuon.plan.blocks import Block, blocks_of, row_blocks
from distmuon.plan.reading import READING_KEYS, Reading

if TYPE_CHECKING:
    from distmuon.routing import Route

Change: TypeAlias = "Callable[[Route], Route]"
Matrices: TypeAlias = "str | Mapping[str, str | Mapping[str, Any]] | None"

_WORDS = ("auto", "heads", "whole")
# Last part of the name of a parameter that holds several projections in the models that we have seen
_FUSED_NAME = re.compile(
    r"(^|_)w?(qkv|kv|qk)(_|$)|query_key_value|(^|_)c_attn$|^in_proj(_weight)?$|^w_?pack$|gate_?(and_)?up|up_?gate|^w1[23]$",
    re.IGNORECASE,
)


def blocks_in(group: Mapping[str, Any], name: str, param: Tensor) -> tuple[Block, ...]:
    """The blocks of a parameter on Muon, as the keys of its group say.

    Raises:
        ValueError: as :class:`~distmuon.plan.reading.Reading` and :func:`~distmuon.plan.blocks.blocks_of`.
    """
    return blocks_of(name, tuple(param.shape), Reading.of(group))


def blocks_between(group: Mapping[str, Any], name: str, param: Tensor) -> tuple[Block, ...]:
    """The blocks of a parameter on Muon between whole steps of ``block_period``.

    Raises:
        ValueError: as :func:`~distmuon.plan.blocks.row_blocks`.
    """
    return row_blocks(name, tuple(param.shape), Reading.of(group), group["blocks"])


def declare(
    routes: Mapping[str, Route], params: Mapping[str, Tensor], matrices: Matrices, *, names_only: bool = False
) -> dict[str, Route]:
    """Give routes the readings that the user asks for.

    Args:
        routes: By clean name.
        params: The parameters.
        matrices: See :class:`distmuon.Muon`; later globs win.
        names_only: Whether there are no modules in which presets could be looked up.

    Raises:
        ValueError: for a word, key or value that means nothing, a glob without a matrix, a reading that a shape does
            not fit, and a parameter on Muon that could be read in two ways and is not declared.
    """
    routes = {
        name: replace(route, looks_fused=route.use_muon and not route.known_fused and _named_fused(name))
        for name, route in routes.items()
    }
    wanted = {} if matrices is None else {"*": matrices} if isinstance(matrices, str) else matrices
    if not isinstance(wanted, Mapping):
        raise ValueError(f"matrices is a {type(wanted).__name__}: it is {_known_words()}, or a dict by name globs.")
    presets: dict[str, bool] = {}
    for glob, asked in wanted.items():
        matches = [name for name in fnmatch.filter(routes, glob) if routes[name].use_muon]
        if not matches:
            on_muon = [name for name, route in routes.items() if route.use_muon]
            raise ValueError(
                f"the glob {glob!r} in matrices matches no parameter on Muon; their names look like "
                f"{', '.join(on_muon[:3])}."
            )
        presets.update(dict.fromkeys(matches, asked in ("auto", "heads")))
        change = _by_word(asked, names_only) if isinstance(asked, str) else _by_keys(glob, asked)
        for name in matches:
            try:
                routes[name] = change(routes[name])
                blocks_of(name, tuple(params[name].shape), routes[name].reading)
            except _MeaninglessError as error:
                raise ValueError(f"matrices[{glob!r}] {error}") from None
    for route in routes.values():
        if route.use_muon and route.doubt:
            raise ValueError(route.doubt)
    unknown = [name for name, asked in presets.items() if asked and routes[name].looks_fused]
    if unknown:
        warnings.warn(looks_fused(unknown), stacklevel=5)
    return routes


def looks_fused(names: Sequence[str]) -> str:
    """The words for parameters that may hold several matrices, of which nothing says how."""
    owner = _owner(names[0])
    return (
        f"{len(names)} parameters such as {names[0]} look fused by their names and count as one matrix, as their "
        f"modules are not known: say what they hold by matrices={{'*{owner}*': {{'split_sizes': ...}}}}, or 'whole'."
    )


def _owner(name: str) -> str:
    """What the linear layer of a weight is called, or the parameter itself."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]


def _named_fused(name: str) -> bool:
    return bool(_FUSED_NAME.search(_owner(name)))


def unclear_axes(name: str, param: Tensor) -> str:
    """The message for a parameter of three or more axes, of which nothing says what they mean."""
    shape = tuple(param.shape)
    flat = f"one matrix of {shape[0]} x {param.numel() // max(1, shape[0])}"
    stack = (
        f"a stack of {shape[0]} matrices of {shape[1]} x {shape[2]} (flatten=False), or as " if len(shape) == 3 else ""
    )
    return (
        f"parameter {name!r} has shape {shape}, whose matrix axes are not known: it can be read as {stack}{flat}, as a "
        "convolution (out, in * kernel) is (flatten=True). Say which by the key flatten of its group, or by name: "
        "matrices={name: {'flatten': ...}}; or give it to AdamW by use_muon=False or adamw_names."
    )


class _MeaninglessError(Exception):
    """A reading that contradicts itself."""


def _by_word(word: str, names_only: bool) -> Change:
    if word not in _WORDS:
        raise ValueError(f"matrices={word!r} is unknown: it is {_known_words()}, or a dict by name globs.")
    if names_only and word != "whole":
        raise ValueError(
            f"matrices={word!r} looks at modules, and there are names alone: pass the module itself, or a dict by name "
            "globs."
        )

    def change(route: Route) -> Route:
        if word == "whole" or route.preset is None:
            fused = route.looks_fused and word != "whole"
            return replace(route, reading=Reading(flatten=route.reading.flatten), looks_fused=fused)
        return replace(route, reading=route.preset.by(word))

    return change


def _by_keys(glob: str, keys: object) -> Change:
    if not isinstance(keys, Mapping):
        raise ValueError(f"matrices[{glob!r}] is {keys!r}: it is {_known_words()}, or a dict of group keys.")
    for key in keys:
        if key not in READING_KEYS:
            near = difflib.get_close_matches(str(key), READING_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(READING_KEYS)}."
            raise ValueError(f"matrices[{glob!r}] has the unknown key {key!r}: {hint}")

    def change(route: Route) -> Route:
        try:
            reading = Reading.of({**route.reading.keys, **keys})
        except ValueError as error:
            raise _MeaninglessError(error) from None
        said = "flatten" in keys or "transposed" in keys
        fused = route.looks_fused and not {"split_sizes", "num_heads"} & keys.keys()
        return replace(route, reading=reading, doubt="" if said else route.doubt, looks_fused=fused)

    return change


def _known_words() -> str:
    return ", ".join(map(repr, _WORDS))
