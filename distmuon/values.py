"""Values of a parameter group: which keys there are beside those of torch, and what is out of range."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distmuon.numerics.lmo import resolve_lmo
from distmuon.numerics.update import resolve_lr_scale
from distmuon.numerics.variants import resolve_variant
from distmuon.options import Options

FAMILY_DEFAULTS: dict[str, Any] = {
    "variant": "muon",
    "muon_beta2": 0.95,
    "cautious_wd": False,
    "block_period": 1,
    "blocks": None,
    "block_lr_ratio": 1.0,
}
"""What the members of the Muon family differ by (docs/family.md); the defaults are Muon itself."""

FAMILY_KEYS = tuple(FAMILY_DEFAULTS)


def check_values(group: Mapping[str, Any], label: str, options: Options) -> None:
    """Check the settings of a complete group.

    Args:
        group: With every key filled in.
        label: What to call it in messages.
        options: Of the optimizer.

    Raises:
        TypeError: for what is no number where one is wanted.
        ValueError: for a value out of range, and values that exclude each other.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{label} has a tensor lr of {lr.numel()} elements: it takes one.")
    for key in ("lr", "weight_decay", "eps", "block_lr_ratio"):
        _check_range(label, key, group[key], upper=math.inf)
    for key in ("momentum", "muon_beta2"):
        _check_range(label, key, group[key], upper=1.0)
    if not isinstance(group["betas"], Sequence) or len(group["betas"]) != 2:
        raise ValueError(f"{label} has betas={group['betas']}: it takes two numbers.")
    for beta in group["betas"]:
        _check_range(label, "betas", beta, upper=1.0)
    if not isinstance(group["cautious_wd"], bool):
        raise ValueError(f"{label} has cautious_wd={group['cautious_wd']!r}: it is True or False.")
    try:
        resolve_lr_scale(group["adjust_lr_fn"])
        resolve_variant(group["variant"])
        resolve_lmo(group["lmo"])
        options.request(group)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    if group["lmo"] is not None and group["use_muon"]:
        raise ValueError(f"{label} has use_muon=True and lmo={group['lmo']!r}, which is for what is not on Muon.")
    _check_blocks(group, label)


def _check_blocks(group: Mapping[str, Any], label: str) -> None:
    period, blocks = group["block_period"], group["blocks"]
    for key, value in (("block_period", period), ("blocks", blocks)):
        if (key, value) != ("blocks", None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{label} has {key}={value!r}: it is a whole number of 1 or more.")
    if period > 1 and blocks is None:
        raise ValueError(
            f"{label} has block_period={period} and does not say into how many blocks a matrix is cut between whole "
            "steps: pass blocks, such as the number of ranks that share its rows."
        )
    step = group["block_step"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{label} has block_step={step!r}: it is a whole number of 0 or more, the steps made so far.")


def _check_range(label: str, key: str, value: Any, *, upper: float) -> None:
    """Refuse what is outside [0, upper); tensors on an accelerator are trusted, reading them would wait."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    if not isinstance(value, Tensor | numbers.Real):
        yaml = ", which YAML reads from 3e-4; write 3.0e-4" if isinstance(value, str) else ""
        raise TypeError(f"{label} has {key}={value!r} (a {type(value).__name__}{yaml}): it takes a number.")
    if not 0.0 <= float(value) < upper:
        wanted = "0 or more" if upper == math.inf else f"at least 0 and less than {upper:g}"
        raise ValueError(f"{label} has {key}={value}: it must be {wanted}.")
