"""A model over many processes: FSDP2, HSDP, DDP, and tensor parallelism before FSDP2."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PretrainedConfig

from distmuon.pretrain.errors import UserError
from distmuon.pretrain.parallel import Layout
from distmuon.pretrain.tensor_parallel import apply_tensor_parallel
from distmuon.pretrain.weights import share_out


@dataclass(frozen=True)
class Placed:
    """A model in its layout.

    Attributes:
        model: The model itself, its parameters named as on one process.
        wrapped: What a training step calls: the DDP wrapper of the model, or the model.
    """

    model: nn.Module
    wrapped: nn.Module

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """The context of one forward and backward pass of a step.

        Before the last one DDP does not communicate, and HSDP does not between replicas. Within a replica gradients
        are reduced every time: to keep them whole would take the memory that sharding saves.
        """
        if isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext() if last else self.wrapped.no_sync()
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_all_reduce(last)
        return contextlib.nullcontext()


def build_mesh(layout: Layout, device: torch.device, timeout_seconds: float | None = None) -> DeviceMesh | None:
    """The device mesh of a layout, with the names of ``Layout.mesh_dims``; None for one process.

    All ranks have to call it.

    Args:
        layout: The arrangement of processes.
        device: Where the model lives.
        timeout_seconds: How long collectives of its groups may wait for a rank; None: torch's defaults.
    """
    dims = layout.mesh_dims
    if not dims:
        return None
    mesh = init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
    if timeout_seconds is not None:
        # groups of a part of the ranks do not take over the time-out of the group of all
        for group in mesh.get_all_groups():
            group.set_timeout(timedelta(seconds=timeout_seconds))
    return mesh


def place(
    model: nn.Module,
    config: PretrainedConfig,
    layout: Layout,
    mesh: DeviceMesh | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool = False,
    source: nn.Module | None = None,
) -> Placed:
    """Bring a model, the same on all ranks, into its layout.

    Args:
        model: On any device; the parameters become DTensors where they are sharded, and keep their names. One that
            `weights.draws_on_first` allows may be on the meta device, on all ranks.
        config: Its configuration.
        layout: The arrangement of processes.
        mesh: From `build_mesh`.
        device: Where it is to live.
        dtype: Of the forward pass.
        compile: Compile the forward pass: of the whole model, or block by block where hooks of sharding come between.
        source: On rank 0 the model with weights, if ``model`` is on the meta device.

    Raises:
        UserError: If the model has no blocks that can be sharded, or no plan for tensor parallelism.
    """
    without_weights = any(parameter.is_meta for parameter in model.parameters())
    if mesh is None or layout.replicates:
        model.to(device)
        if compile:
            model.compile()
        if mesh is None:
            return Placed(model, model)
        return Placed(model, _replicate(model, device))
    if layout.tp > 1:
        apply_tensor_parallel(model.to(device), config, mesh["tp"])
    if compile:
        for block in decoder_blocks(model, config):
            block.compile()
    if layout.fully_shards:
        _fully_shard(model, config, mesh, dtype)
    if without_weights:
        share_out(model, source, device)
    model.to(device)
    return Placed(model, model)


def decoder_blocks(model: nn.Module, config: PretrainedConfig) -> nn.ModuleList:
    """The list of a model's repeated blocks: ``num_hidden_layers`` modules, with more parameters than any other.

    Raises:
        UserError: If there is none.
    """
    layers = getattr(config, "num_hidden_layers", None)
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if not found:
        raise UserError(
            f"model.type is {config.model_type}, in which no list of {layers} blocks was found to shard or to compile: "
            "set parallel.dp_shard and parallel.tp to 1 and use parallel.dp_replicate."
        )
    return max(found, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def settle_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of which tensor parallel ranks hold parts, such as those of norms of attention heads."""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


def _replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    # buffers are constants of the config; newer versions of torch have another word for leaving them alone
    known = inspect.signature(DistributedDataParallel).parameters
    word = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {word: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device], **settings)


def _fully_shard(model: nn.Module, config: PretrainedConfig, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    names = mesh.mesh_dim_names or ()
    data = mesh["dp_replicate", "dp_shard"] if "dp_replicate" in names else mesh["dp_shard"]
    # Blocks are gathered in the dtype to which autocast would cast their matrices. What is computed in float32 stays
    # so: inputs are not cast, and embedding, last norm and head belong to the root, which is gathered as it is.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in decoder_blocks(model, config):
        fully_shard(block, mesh=data, mp_policy=policy)
    fully_shard(model, mesh=data, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
