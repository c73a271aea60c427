"""From the largest logit of each head to its factor."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from distmuon.qk_clip.heads import Heads


def check_options(tau: float, alpha: float, gqa: str) -> None:
    """Refuse settings out of range.

    Raises:
        TypeError: for what is no number where one is wanted.
        ValueError: naming the setting.
    """
    given: dict[str, object] = {"tau": tau, "alpha": alpha}
    for key, value in given.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{key}={value!r} (a {type(value).__name__}): it takes a number.")
    if not 0 < tau < float("inf"):
        raise ValueError(f"tau={tau}: give a positive number, such as 100.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: the queries' share of a factor lies between 0 and 1.")
    if gqa not in ("group", "query"):
        raise ValueError(f'gqa={gqa!r}: give "group" or "query".')


def head_factors(maxima: Tensor, tau: float) -> Tensor:
    """``gamma = tau / max(S, tau)``, which is 1 for a head that is quiet (Kimi K2, arXiv 2507.20534, algorithm 1).

    Args:
        maxima: float32 ``(heads,)``, the largest scaled visible logit ``S`` of each head; -inf where nothing was
            visible. One that is infinite or NaN tells nothing of the weights, and has the factor 1.
        tau: Bound of the logits.

    Returns:
        float32 ``(heads,)`` in (0, 1].
    """
    return tau / maxima.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).clamp(min=tau)


def factor_table(gammas: Tensor, heads: Heads, gqa: str) -> Tensor:
    """The factors that :class:`distmuon.qk_clip.heads.Rows` points into.

    Args:
        gammas: ``(num_heads,)``.
        heads: Of the layer.
        gqa: ``"group"``: heads that share a key all have the factor of the loudest of them.

    Returns:
        ``(num_heads + 1,)``; the last is that of the layer's loudest head.
    """
    if gqa == "group" and heads.num_kv_heads < heads.num_heads:
        ratio = heads.num_heads // heads.num_kv_heads
        gammas = gammas.view(-1, ratio).amin(1).repeat_interleave(ratio)
    return torch.cat([gammas, gammas.amin().view(1)])
