"""The ``check`` command: import the user's functions, form the process group, check, print, exit."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from distmuon.checking.check import check
from distmuon.checking.report import CheckReport
from distmuon.checking.sides import together
from distmuon.muon import Muon
from distmuon.usage import Parser, UsageError

_OWN = ("self", "params", "mesh")

DESCRIPTION = """\
Prove on your model and mesh that the sharded Muon update is the single-device one. Run it under torchrun as the
training is, or alone:

  torchrun --nproc_per_node 2 -m distmuon check train.py:build_model --shard train.py:shard
  distmuon check my.package:build_model --option lr=0.02 --option adamw_lr=3e-4
  torchrun --nproc_per_node 4 -m distmuon check --config configs/debug.yaml --parallel.dp_shard 4

Functions are given as package.module:function or path/to/file.py:function. Exit code: 0 passed, 1 failed, 2 usage."""


def run_command(arguments: Sequence[str]) -> int:
    """Run ``check`` with a command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit code, the same on all ranks: 0 if the check passed, 1 if it failed, 2 for bad usage.

    Raises:
        Exception: what the user's functions raise, for its traceback.
    """
    first = os.environ.get("RANK", "0") == "0"
    parsed: tuple[argparse.Namespace, list[str]] | None = None
    usage: UsageError | None = None
    try:
        parsed = _parse(arguments)
    except UsageError as error:
        usage = error
    with _process_group(alone=parsed is not None and parsed[0].shard is not None):
        code = 2
        try:
            if parsed is None:
                assert usage is not None
                raise usage
            report = _check(*parsed)
            code = 0 if report.passed else 1
            if first:
                print(report, flush=True)
        except UsageError as error:
            if first:
                print(f"error: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            # torchrun ends the other ranks as soon as one fails, and rank 0 is to be heard
            dist.barrier()
    return code


def parse_option(text: str) -> tuple[str, Any]:
    """A keyword of :class:`distmuon.Muon` and its value from ``key=value``.

    Values are Python literals, ``true``, ``false`` and ``none``, names of torch dtypes, or else strings.

    Raises:
        UsageError: for a keyword that there is not.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"--option {text} has no value: write it as key=value, such as lr=0.02.")
    known = [name for name in inspect.signature(Muon.__init__).parameters if name not in _OWN]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
        raise UsageError(f"--option {key} is no argument of distmuon.Muon that can be given here: {advice}")
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return key, words[value.lower()]
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype):
        return key, dtype
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def load_function(path: str) -> Any:
    """Import ``package.module:function`` or ``path/to/file.py:function``.

    Raises:
        UsageError: if there is no such module, file or function.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise UsageError(f"{path!r} names no function: write package.module:function or path/to/file.py:function.")
    module = _load_file(pathlib.Path(place)) if place.endswith(".py") else _load_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        raise UsageError(f"{place} has no function {name!r}{f': did you mean {near[0]}?' if near else '.'}")
    return function


def _parser(*, config: bool) -> Parser:
    parser = Parser(
        prog="distmuon check",
        usage="distmuon check (MODULE:FUNCTION [--shard MODULE:FUNCTION] | --config FILE [--section.key VALUE]) ...",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if config:
        # values of the config's settings, which are not known here, must not be taken for a model
        parser.set_defaults(model=None)
    else:
        parser.add_argument("model", nargs="?", metavar="MODULE:FUNCTION", help="builds the model, without arguments")
    parser.add_argument("--shard", metavar="MODULE:FUNCTION", help="shards the model that it is given, and returns it")
    parser.add_argument("--batch", metavar="MODULE:FUNCTION", help="(model, step, micro_batch) -> loss; else drawn")
    parser.add_argument("--config", metavar="FILE", help="check the model and layout of a pretraining config instead")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (3)")
    parser.add_argument("--micro-batches", type=int, default=2, help="backward passes of a step (2)")
    parser.add_argument("--tolerance", type=float, help="allowed error of the batched path; see docs/check.md")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="argument of distmuon.Muon")
    return parser


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, with the options of Muon as a dict, and what it does not know: settings of the config."""
    config = any(argument.split("=")[0] == "--config" for argument in arguments)
    known, rest = _parser(config=config).parse_known_args(list(arguments))
    known.option = dict(map(parse_option, known.option))
    if known.model is None and known.config is None:
        raise UsageError("neither MODULE:FUNCTION nor --config is given: give one (see distmuon check --help).")
    for name in ("shard", "batch"):
        if known.config is not None and getattr(known, name) is not None:
            raise UsageError(f"--{name} and --config exclude each other: the config says how its model is sharded.")
    if known.config is None and rest:
        raise UsageError(f"unrecognized argument {rest[0]} (see distmuon check --help).")
    for name in ("steps", "micro_batches"):
        if getattr(known, name) < 1:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is {getattr(known, name)}, and it counts: give 1 or more.")
    return known, rest


def _check(known: argparse.Namespace, rest: Sequence[str]) -> CheckReport:
    if known.config is not None:
        return _check_config(known, rest)
    model_fn, shard_fn, batch_fn = together(
        lambda: tuple(path and load_function(path) for path in (known.model, known.shard, known.batch)),
        kinds=(UsageError,),
    )
    return check(
        model_fn,
        shard_fn,
        batch_fn=batch_fn,
        steps=known.steps,
        micro_batches=known.micro_batches,
        tolerance=known.tolerance,
        **known.option,
    )


def _check_config(known: argparse.Namespace, rest: Sequence[str]) -> CheckReport:
    from distmuon.checking.pretraining import check_config, read_config
    from distmuon.pretrain.errors import UserError

    try:
        config = together(lambda: read_config(["--config", known.config, *rest], "distmuon check"), kinds=(UserError,))
        return check_config(
            config,
            steps=known.steps,
            micro_batches=known.micro_batches,
            tolerance=known.tolerance,
            options=known.option,
        )
    except UserError as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def _process_group(*, alone: bool) -> Iterator[None]:
    """The process group of torchrun's environment; without it one of this process, if sharding needs one."""
    if dist.is_initialized():
        yield
        return
    started = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    if not started and not alone:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if started:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, and missing in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _load_module(name: str) -> ModuleType:
    # a console script does not search the working directory, and python -m does
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"there is no module {error.name!r} in {os.getcwd()} or installed: check the name.") from error


def _load_file(path: pathlib.Path) -> ModuleType:
    name = f"_checked_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path.resolve()):
        return loaded
    if not path.is_file():
        raise UsageError(f"there is no file {path}: give the path from the working directory.")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
