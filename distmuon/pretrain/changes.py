"""The resolved config of a run folder, and what differs from it at a resume."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

import yaml

from distmuon.pretrain.config import Config, flatten
from distmuon.pretrain.errors import UserError
from distmuon.pretrain.files import replace_text

logger = logging.getLogger(__name__)

# these change what is written or shown, not what is computed
_HARMLESS = (
    "log.",
    "checkpoint.",
    "train.eval_",
    "train.sample_",
    "train.threads",
    "data.cache_dir",
    "parallel.timeout_seconds",
)
# a checkpoint holds tensors of these
_FIXED = ("model.", "optim.name")


def check_changes(saved: pathlib.Path, config: Config) -> None:
    """Compare a resolved config with the one that a run folder holds.

    Args:
        saved: The ``config.yaml`` of the run; nothing is compared without it.
        config: The resolved config of now.

    Raises:
        UserError: If the model or the kind of optimizer changed, which no checkpoint survives.
    """
    before = flatten(_read(saved))
    if not before:
        return
    now = flatten(dataclasses.asdict(config))
    changed = [
        key
        for key in sorted({*before, *now})
        if _plain(before.get(key)) != _plain(now.get(key)) and not key.startswith(_HARMLESS)
    ]
    fixed = [key for key in changed if key.startswith(_FIXED) and not _is_reset(key, config)]
    if fixed:
        raise UserError(
            f"the checkpoint belongs to a run with {_values(fixed, before)}, and this config has "
            f"{_values(fixed, now)}: restore it, or start a new run without --resume."
        )
    if changed:
        logger.warning(
            "the config changed, so this run will not repeat the first one: %s",
            ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in changed),
        )


def write_config(path: pathlib.Path, config: Config, step: int) -> None:
    """Write the resolved config; another one that is there stays beside it, named for its last step.

    Raises:
        OSError: If the disk refuses it.
    """
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    if path.exists():
        if path.read_bytes() == text.encode():
            return
        path.replace(path.with_name(f"config-until-step-{step}.yaml"))
    replace_text(path, text)


def run_name(saved: pathlib.Path) -> str | None:
    """The ``log.name`` of the run of a resolved config; None where that is not known."""
    try:
        name = flatten(_read(saved)).get("log.name")
    except UserError:
        return None
    return name if isinstance(name, str) else None


def _read(saved: pathlib.Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.exists() else {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{saved} cannot be read ({' '.join(str(error).split())}): restore it, or remove it to go on without a "
            "comparison of the settings."
        ) from error
    if tree and not isinstance(tree, dict):
        raise UserError(f"{saved} holds a {type(tree).__name__}, and it holds sections: restore or remove it.")
    return tree or {}


def _is_reset(key: str, config: Config) -> bool:
    """Whether the state of another optimizer is let go on purpose."""
    return key == "optim.name" and config.checkpoint.routing_changes == "reset"


def _values(keys: list[str], flat: dict[str, Any]) -> str:
    return ", ".join(f"{key} {flat[key]}" if key in flat else f"no {key}" for key in keys)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
