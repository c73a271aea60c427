"""Clipping gradients by the norm of all of them, however they are sharded."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from distmuon.comm import norms
from distmuon.comm.group import Mesh, as_group


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    owners: Mapping[Tensor, int] | None = None,
    keep_nonfinite: bool = False,
    stages: Mesh | None = None,
) -> Tensor:
    r"""Scale gradients in place so that the norm of all of them together is at most ``max_norm``.

    :func:`torch.nn.utils.clip_grad_norm_` for gradients that are sharded over different meshes: FSDP2, HSDP, tensor
    parallel and expert parallel parameters beside each other and beside plain ones. Each element counts once, and one
    collective serves all. Without DTensors and ``owners`` it is torch's function, bit for bit, with no collective.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{\text{max\_norm}}{\lVert g \rVert_p + 10^{-6}}\right)

    If any parameter is a DTensor, or ``owners`` names a plain one, all ranks of the collective have to call this, with
    the same settings; a gradient may be None on any of them. These are the ranks of all meshes of the parameters;
    where meshes cross, neither containing the other, and with ``owners``, all ranks of the default group.

    The names of mesh axes say whether ranks hold the same: parameters on a slice of another parameter's mesh, as
    ``mesh["dp"]`` of ``mesh["dp", "tp"]``, or on a named mesh that crosses it, are replicated over the axes that they
    lack, and count once. Those on meshes of their own are different: experts on ranks 0 and 1, and experts on ranks 2
    and 3, both count if a parameter on a mesh of all four joins them, and have a norm for each pair if none does.

    A gradient that is ``Partial`` (a norm's under sequence parallelism) is reduced for its norm, which costs one more
    collective each on its own mesh, and is scaled as the ``Partial`` that it is; its ranks have to agree on whether
    it is None.

    Args:
        parameters: A tensor, tensors, or a module, whose parameters are taken.
        max_norm: The largest norm to leave.
        norm_type: The order p of the norm; inf for the largest absolute value. Positive, over several ranks.
        error_if_nonfinite: Raise if the norm is NaN or infinite, on all ranks alike, before any gradient is scaled.
            Waits for the device; nothing else here does.
        foreach: Whether to use torch's kernels for lists of tensors; None: where the device has them.
        owners: Plain parameters whose gradient is valid on one rank only, and that rank in the default group: what a
            DDP communication hook leaves that reduces a gradient to its owner. Counted on the owner, scaled on all
            ranks. Give the same on all ranks. Other plain gradients are taken for replicated.
        keep_nonfinite: Leave gradients as they are if the norm is NaN or infinite, instead of making all of them NaN
            as torch does: so it can still be told which ones were not finite. Does not wait for the device.
        stages: With pipeline parallelism, the mesh axis or process group that holds one rank of each stage, as
            ``mesh["pp"]``: the norm then is that of all stages, by one more small all-reduce, and all of them call
            this. A weight that two stages hold a copy of counts in both.

    Returns:
        The norm before clipping, a plain 0-d tensor, equal on all ranks. Over several ranks it is float32, or float64
        where a parameter is; for 16-bit gradients on one rank 16-bit, as in torch.

    Raises:
        RuntimeError: for a norm that is not finite, with ``error_if_nonfinite``; on a rank that is in none of the
            meshes of its parameters.
        ValueError: for an owner that is no rank, or an order that is not positive over several ranks.
    """
    if isinstance(parameters, Tensor):
        tensors = [parameters]
    elif isinstance(parameters, nn.Module):
        tensors = list(parameters.parameters())
    else:
        tensors = list(parameters)
        if not tensors and isinstance(parameters, types.GeneratorType):
            warnings.warn("parameters is an empty generator, perhaps a used one: nothing is clipped.", stacklevel=3)
    reduction = norms.plan_reduction(tensors, owners)
    if reduction is None and stages is None and not keep_nonfinite:
        return nn.utils.clip_grad_norm_(tensors, max_norm, norm_type, error_if_nonfinite, foreach)
    norm_type = float(norm_type)
    if reduction is None:
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        total = nn.utils.get_total_norm(gradients, norm_type, foreach=foreach)
    else:
        total = norms.total_norm(tensors, norm_type, reduction, owners, foreach)
    if stages is not None:
        total = norms.over_stages(total, norm_type, as_group(stages))
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of all gradients is {total.item()}, and error_if_nonfinite=True wants a "
            "finite one: find the step that makes it with torch.autograd.detect_anomaly, or skip this update."
        )
    bound = _finite(total) if keep_nonfinite else total
    nn.utils.clip_grads_with_norm_(_holders(norms.local_gradients(tensors)), max_norm, bound, foreach)
    return total


def _finite(norm: Tensor) -> Tensor:
    """The norm to clip by: zero, which scales nothing, in place of one that is not finite."""
    return torch.where(norm.isfinite(), norm, 0.0)


def _holders(gradients: list[Tensor]) -> list[Tensor]:
    """Tensors whose ``.grad`` are the given ones: torch scales the gradients of parameters only."""
    holders = [gradient.detach() for gradient in gradients]
    for holder, gradient in zip(holders, gradients, strict=True):
        holder.grad = gradient
    return holders
