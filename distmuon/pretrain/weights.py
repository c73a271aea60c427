"""Weights of a sharded model: one rank draws them, and each keeps its part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PretrainedConfig

from distmuon.pretrain.parallel import Layout


def draws_on_first(layout: Layout, config: PretrainedConfig) -> bool:
    """Whether rank 0 alone makes the model with weights, and the others without, on the meta device.

    Every rank of a machine with a whole model in its memory would be too much for a large one. Tied weights come
    apart on the way from the meta device, and tensor parallelism needs the weights first.
    """
    return layout.fully_shards and layout.tp == 1 and not config.tie_word_embeddings


@torch.no_grad()
def share_out(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Fill a model that was sharded on the meta device; all ranks have to call it.

    Args:
        model: Its parameters are DTensors without memory.
        source: On rank 0 the same model, whole, with weights; None on the others.
        device: Where the model is to live, which has to hold the largest parameter whole for a moment.
    """
    model.to_empty(device=device)
    weights = {} if source is None else {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), "all parameters of a fully sharded model are"
        whole = weights[name].to(device) if weights else torch.empty(parameter.shape, device=device)
        shard = distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(shard.to_local())
    for name, buffer in model.named_buffers():
        if weights:
            buffer.copy_(weights[name])
        dist.broadcast(buffer, src=0)
