"""The elementwise parts of a Muon step: momentum before, decay and scaled step after."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.numerics.decay import decay_
from distmuon.numerics.elementwise import Tensors, add_as_torch_, copy_, decay_and_add_, lerp, lerp_, sign

# What other projects call the same scales: dion spectral_norm and rms_norm, Emerging-Optimizers the rest
_SCALE_ALIASES = {
    "spectral_norm": "spectral",
    "unit_rms_norm": "spectral",
    "rms_norm": "match_rms_adamw",
    "shape_scaling": "original",
}
LR_SCALES = ("original", "match_rms_adamw", "spectral", "none")


def resolve_lr_scale(adjust_lr_fn: str | None) -> str:
    """The canonical name of a learning-rate scale.

    Raises:
        ValueError: for a name that is neither in :data:`LR_SCALES` nor an alias.
    """
    name = "original" if adjust_lr_fn is None else _SCALE_ALIASES.get(adjust_lr_fn, adjust_lr_fn)
    if name not in LR_SCALES:
        known = ", ".join((*LR_SCALES, *_SCALE_ALIASES))
        raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r} is unknown; known: {known}, or None.")
    return name


def lr_scale(adjust_lr_fn: str | None, rows: int, cols: int) -> float:
    """The factor on the learning rate of a ``rows x cols`` (out x in) matrix.

    ==================  ============================  ==================================================
    name                factor                        source
    ==================  ============================  ==================================================
    original, None      ``sqrt(max(1, rows/cols))``   Keller Jordan, https://kellerjordan.github.io/posts/muon
    match_rms_adamw     ``0.2 sqrt(max(rows, cols))`` Moonlight, arXiv 2502.16982: AdamW's update RMS
    spectral            ``sqrt(rows/cols)``           Bernstein & Newhouse, arXiv 2409.20325
    none                1
    ==================  ============================  ==================================================

    Raises:
        ValueError: for an unknown name.
    """
    name = resolve_lr_scale(adjust_lr_fn)
    if name == "original":
        return math.sqrt(max(1, rows / cols))
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    if name == "spectral":
        return math.sqrt(rows / cols)
    return 1.0


def blend_momentum(
    grads: Tensors,
    buffers: Tensors,
    out: Sequence[Tensor | None],
    *,
    momentum: float,
    nesterov: bool,
    foreach: bool,
    signs: bool = False,
) -> None:
    """Update the momentum averages and write the gradients blended with them.

    ``buffer <- momentum * buffer + (1 - momentum) * grad``, as torch.optim.Muon averages; the result is
    the buffer, or with Nesterov ``(1 - momentum) * grad + momentum * buffer``.

    Args:
        grads: Gradients; not written.
        buffers: Momentum of the same shapes; written.
        out: Where the blended gradients go, each of its gradient's shape, cast to its own dtype; None
            where only the average is wanted.
        momentum: Weight of the past, in [0, 1).
        nesterov: Blend the gradient in once more.
        foreach: See :mod:`distmuon.numerics.elementwise`.
        signs: Write the signs of these instead.
    """
    if not foreach:
        # one at a time, so that only one cast and one blended gradient are held at once
        for grad, buffer, target in zip(grads, buffers, out, strict=True):
            cast = grad.to(buffer.dtype)
            buffer.lerp_(cast, 1 - momentum)
            if target is not None:
                one = cast.lerp(buffer, momentum) if nesterov else buffer
                target.copy_(one.sign() if signs else one)
        return
    grads = [grad.to(buffer.dtype) for grad, buffer in zip(grads, buffers, strict=True)]
    lerp_(buffers, grads, 1 - momentum)
    wanted = [number for number, target in enumerate(out) if target is not None]
    targets = [target for target in out if target is not None]
    grads, buffers = [grads[number] for number in wanted], [buffers[number] for number in wanted]
    blended = lerp(grads, buffers, momentum) if nesterov else buffers
    copy_(targets, sign(blended) if signs else blended)


def apply_direction(
    params: Tensors,
    directions: Tensors,
    *,
    lr: float | Tensor,
    weight_decay: float,
    scale: float,
    foreach: bool,
    cautious_wd: bool = False,
    exact: bool = False,
    tall: bool = False,
) -> None:
    """Decay ``params`` by ``lr * weight_decay`` and step ``-lr * scale`` along ``directions``.

    Decay is decoupled and takes the unscaled learning rate, as in torch.optim.Muon.

    Args:
        params: Written in place.
        directions: Of the same shapes, in any floating-point dtype.
        lr: A number, or a 1-element tensor; one on an accelerator is never read back to the host.
        weight_decay: Decoupled decay.
        scale: See :func:`lr_scale`.
        foreach: See :mod:`distmuon.numerics.elementwise`.
        cautious_wd: Decay only the weights that the step makes smaller (:mod:`distmuon.numerics.decay`).
        exact: Round as torch.optim.Muon does, whatever part of the matrix this is.
        tall: Whether the whole matrices have more rows than columns, which decides that rounding.
    """
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        device_lr = lr.squeeze()
        for param, direction in zip(params, directions, strict=True):
            rate_here = device_lr.to(param.device)
            decay_(param, direction, 1 - rate_here * weight_decay, cautious=cautious_wd)
            param.sub_(direction.to(param.dtype) * (rate_here * scale))
        return
    rate = float(lr)
    if exact and params and params[0].device.type == "cpu" and params[0].dtype.itemsize == 2:
        for param, direction in zip(params, directions, strict=True):
            decay_(param, direction, 1 - rate * weight_decay, cautious=cautious_wd)
            add_as_torch_(param, direction, -rate * scale, tall=tall)
        return
    factor = 1 - rate * weight_decay
    decay_and_add_(params, factor, directions, -rate * scale, foreach=foreach, cautious=cautious_wd)


def all_zero(tensors: Sequence[Tensor]) -> bool:
    """Whether every element of every tensor is zero; waits for the device."""
    return all(bool((torch.count_nonzero(tensor) == 0).item()) for tensor in tensors)
