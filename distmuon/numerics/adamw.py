"""AdamW for the parameters that are not hidden matrices: torch's own functional form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from distmuon.numerics.decay import decay_

AdamWState = dict[str, Tensor]


def init_state(param: Tensor, *, fused: bool | None) -> AdamWState:
    """The state that torch.optim.AdamW keeps for ``param``, at step 0.

    Returns:
        ``step``, a 0-d float32 tensor (on the host unless ``fused``), and ``exp_avg`` and
        ``exp_avg_sq``, zeros like ``param``.
    """
    step_device = param.device if fused else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=step_device),
        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
    }


def adamw_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[AdamWState],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    foreach: bool | None,
    fused: bool | None,
    cautious_wd: bool = False,
) -> None:
    """One AdamW step in place (Loshchilov & Hutter, arXiv 1711.05101).

    Args:
        params: Parameters of any shapes, written in place.
        grads: Their gradients.
        states: From :func:`init_state`; written in place.
        lr: A number or a 1-element tensor.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, times ``lr``.
        foreach: As in torch.optim.AdamW.
        fused: As in torch.optim.AdamW.
        cautious_wd: Decay only the weights that the step makes smaller (:mod:`distmuon.numerics.decay`).
    """
    if cautious_wd:
        rate = lr.squeeze() if isinstance(lr, Tensor) else lr
        for param, grad, state in zip(params, grads, states, strict=True):
            # the step has the sign of the first moment, of which one copy at a time is held
            average = state["exp_avg"].lerp(grad, 1 - betas[0])
            decay_(param, average, 1 - rate * weight_decay, cautious=True)
        weight_decay = 0.0
    adamw(
        list(params),
        list(grads),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        # torch has no foreach kernels for a tensor rate, and chooses well by itself
        foreach=None if isinstance(lr, Tensor) else foreach,
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
