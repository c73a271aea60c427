"""One bucket through the step: momentum, Newton-Schulz, decay and scaled update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distmuon.comm.layout import check_gradient, local_tensor
from distmuon.groups import Group
from distmuon.numerics.orthogonalize import orthogonalize
from distmuon.numerics.update import apply_direction, blend_momentum, lr_scale
from distmuon.options import Options
from distmuon.plan.matrices import MatrixSpec


@dataclass(frozen=True)
class Member:
    """A parameter that takes part in this step, with its momentum and the matrices it holds."""

    param: Tensor
    momentum: Tensor
    spec: MatrixSpec


def run_bucket(members: Sequence[Member], group: Group, options: Options) -> None:
    """Update parameters whose matrices have one shape, in place.

    Args:
        members: At least one; each parameter has a gradient.
        group: Their parameter group: the hyperparameters.
        options: The settings of the optimizer.

    Raises:
        TypeError: for a sparse gradient.
        NotImplementedError: for a parameter of which this rank holds a part only.
    """
    params, grads, buffers = [], [], []
    for member in members:
        grad = check_gradient(member.spec.parameter, member.param.grad)
        params.append(local_tensor(member.spec.parameter, member.param))
        grads.append(local_tensor(member.spec.parameter, grad))
        buffers.append(local_tensor(member.spec.parameter, member.momentum))
    # On a CPU foreach functions loop over the tensors themselves
    foreach = options.batched and params[0].device.type != "cpu"
    rows, cols = members[0].spec.rows, members[0].spec.cols
    counts = [member.spec.count for member in members]

    stack = params[0].new_empty((sum(counts), rows, cols), dtype=options.ns_dtype)
    blend_momentum(
        grads,
        buffers,
        _per_parameter(stack, counts, params),
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        foreach=foreach,
    )
    directions = orthogonalize(
        stack,
        coefficients=group["ns_coefficients"],
        steps=group["ns_steps"],
        eps=group["eps"],
        batched=options.batched,
        compile=options.compile,
    )
    apply_direction(
        params,
        _per_parameter(directions, counts, params),
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        scale=lr_scale(group["adjust_lr_fn"], rows, cols),
        foreach=foreach,
    )


def _per_parameter(stack: Tensor, counts: Sequence[int], params: Sequence[Tensor]) -> list[Tensor]:
    """Slices of ``stack``, ``(sum(counts), rows, cols)``, in the shape of each parameter."""
    return [part.reshape(param.shape) for part, param in zip(stack.split(list(counts)), params, strict=True)]
