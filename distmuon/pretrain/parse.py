"""Command line and YAML to `Config`, by jsonargparse; mistakes become one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from distmuon.pretrain.config import Config
from distmuon.pretrain.errors import UserError

DESCRIPTION = "Pretrain a language model. Every key of the YAML file can be given as --section.key VALUE."
_FLAGS = ("config", "resume", "debug", "help", "print_config", *Config.__dataclass_fields__)
USAGE = "--config FILE [--section.key VALUE ...] [--resume auto|FOLDER]"


@dataclass
class Command:
    """A parsed command line.

    Attributes:
        config: All settings.
        resume: None, ``"auto"`` or a path.
        debug: Whether errors show a traceback.
    """

    config: Config
    resume: str | None
    debug: bool


def parse_command(arguments: Sequence[str], prog: str = "distmuon pretrain") -> Command:
    """Read the command line and the YAML file it names.

    Args:
        arguments: Without the program's name.
        prog: Name of the program in the help text.

    Raises:
        UserError: For a key that does not exist or a value of the wrong type.
        SystemExit: After ``--help``.
    """
    parser = build_parser(prog)
    _check_flags(arguments)
    path = _config_path(arguments)
    if path is not None:
        _check_file(path)
    try:
        parsed = parser.parse_args(list(arguments))
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_sentence(error)) from error
    sections = typing.get_type_hints(Config).items()
    config = Config(**{name: kind(**vars(getattr(parsed, name))) for name, kind in sections})
    if config.log.name is None:
        config.log.name = path.stem if path is not None else "run"
    return Command(config, parsed.resume, parsed.debug)


def load_config(path: str | pathlib.Path, *overrides: str) -> Config:
    """The config of a YAML file.

    Args:
        path: The file.
        overrides: As on the command line, such as ``"--optim.lr=0.001"``.
    """
    return parse_command(["--config", str(path), *overrides]).config


def build_parser(prog: str) -> ArgumentParser:
    """The parser of all settings, its help text from the docstrings of the dataclasses."""
    # a mapping with the key class_path would import what it names
    set_parsing_settings(import_path_denylist=["*"])
    parser = ArgumentParser(prog=prog, usage=f"{prog} {USAGE}", description=DESCRIPTION, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; later flags override it.")
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="auto: go on from the newest checkpoint of this name; or a run folder or step-N folder.",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    for name, kind in typing.get_type_hints(Config).items():
        parser.add_class_arguments(kind, name)
    return parser


def _config_path(arguments: Sequence[str]) -> pathlib.Path | None:
    path = None
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            path = pathlib.Path(arguments[index + 1])
        elif argument.startswith("--config="):
            path = pathlib.Path(argument.removeprefix("--config="))
    return path


def _check_file(path: pathlib.Path) -> None:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        there = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        advice = f"there is {', '.join(there[:5])}" if there else "give the path of a YAML file"
        raise UserError(f"--config {path} cannot be read ({error.strerror}): {advice}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not YAML ({reason}): correct it there.") from error
    if not isinstance(tree, dict):
        raise UserError(f"--config {path} holds a {type(tree).__name__}, and it takes sections such as model and data.")
    sections = typing.get_type_hints(Config)
    for section, values in tree.items():
        _check_key(str(section), sections, f"in {path}")
        if not isinstance(values, dict):
            raise UserError(f"{section} in {path} is {values!r}, and it is a section: put its keys below it, indented.")
        for key in values:
            _check_key(f"{section}.{key}", _keys(), f"in {path}")


def _check_flags(arguments: Sequence[str]) -> None:
    for argument in arguments:
        name = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and not name.startswith("model.config."):
            _check_key(name.removesuffix("+"), [*_keys(), *_FLAGS], "on the command line", dashes="--")


def _check_key(key: str, known: Any, where: str, dashes: str = "") -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    same_end = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    guess = same_end or near
    section = key.split(".")[0]
    siblings = [name for name in known if name.startswith(f"{section}.")] or list(known)
    advice = f"did you mean {dashes}{guess[0]}?" if guess else f"there is {', '.join(siblings)}."
    raise UserError(f"{dashes}{key} {where} is no setting: {advice}")


def _keys() -> list[str]:
    sections = typing.get_type_hints(Config)
    return [f"{name}.{field.name}" for name, kind in sections.items() for field in dataclasses.fields(kind)]


def _one_sentence(error: Exception) -> str:
    """The parser's message; where it is about the type of a value, which one and what was wanted."""
    text = " ".join(str(error).split())
    key, value = re.search(r'Parser key "([\w.]+)"', text), re.search(r"Got value: (.*?)(?: - |$)", text)
    if key is None or key[1] not in _keys():
        return f"{text} (see --help)"
    found = f"is {value[1]}" if value else "does not fit"
    return f"{key[1]} {found}, and it takes {_words(_type_of(key[1]))}: correct it (see --help)."


def _type_of(key: str) -> Any:
    section, name = key.split(".")
    return typing.get_type_hints(typing.get_type_hints(Config)[section])[name]


def _words(kind: Any) -> str:
    """A type as a user writes its values in YAML."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if typing.get_origin(kind) is list:
        return f"a list, each {_words(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(kind, str(kind))
