"""The only reader of parameters: from what a model holds to plain local tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_parameter(name: str, param: Tensor) -> None:
    """Refuse parameters that no algorithm of this package can update.

    Args:
        name: For the message.
        param: A parameter, plain or DTensor.

    Raises:
        TypeError: for complex, sparse, quantized, integer and 8-bit parameters.
    """
    advice = "leave it out of the optimizer, or keep a floating-point master copy to optimize"
    if param.is_complex():
        raise TypeError(f"parameter {name!r} is complex ({param.dtype}): use torch.view_as_real, or {advice}.")
    if param.layout is not torch.strided:
        raise TypeError(f"parameter {name!r} has the layout {param.layout}, not a dense one: {advice}.")
    if param.is_quantized or not param.dtype.is_floating_point or param.dtype.itemsize < 2:
        raise TypeError(f"parameter {name!r} is quantized ({param.dtype}): {advice}.")


def check_gradient(name: str, grad: Tensor | None) -> Tensor:
    """The gradient, unless it is one that cannot be used.

    Raises:
        TypeError: for sparse gradients.
    """
    assert grad is not None, "parameters without a gradient are left out before"
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name!r} has the layout {grad.layout}: build the layer with sparse=False, or put "
            "the parameter in an optimizer made for sparse gradients."
        )
    return grad


def local_tensor(name: str, tensor: Tensor) -> Tensor:
    """The whole of ``tensor`` as a plain local tensor that shares its memory.

    Raises:
        NotImplementedError: for a DTensor of which this rank holds a part only.
    """
    if type(tensor) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return tensor.detach()
    from torch.distributed.tensor import DTensor  # slow to import, and most programs hold none

    if not isinstance(tensor, DTensor):
        return tensor.detach()
    sharded = any(
        not placement.is_replicate() and tensor.device_mesh.size(axis) > 1
        for axis, placement in enumerate(tensor.placements)
    )
    if sharded:
        raise NotImplementedError(
            f"parameter {name!r} is sharded as {tensor.placements} over {tensor.device_mesh.size()} ranks; this "
            "version updates whole matrices only: keep the model replicated (DDP) or on one rank."
        )
    whole: Tensor = tensor.to_local()
    return whole.detach()
