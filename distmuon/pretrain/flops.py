"""Model FLOPs and device peaks, for the utilisation (MFU) that logs report."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig

# dense bfloat16 tensor-core peaks in FLOP/s, by a part of the device's name; first match counts
_PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H100 NVL", 8.35e14),
    ("H100 PCIe", 7.56e14),
    ("H100", 9.89e14),
    ("H200", 9.89e14),
    ("GH200", 9.89e14),
    ("A100", 3.12e14),
    ("A10G", 7.0e13),
    ("L40S", 3.62e14),
    ("L4", 1.21e14),
    ("RTX 4090", 1.65e14),
    ("MI300X", 1.307e15),
    ("MI325X", 1.307e15),
    ("MI250X", 1.915e14),
)


def flops_per_token(model: nn.Module, config: PretrainedConfig, sequence_length: int) -> float:
    """FLOPs of one trained token, forward and backward: ``6 N + 12 layers hidden sequence_length``.

    ``N`` leaves the token embedding out unless it is tied to the head. Attention is counted without
    the causal mask, as is usual, so that utilisations can be compared.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is not None and not config.tie_word_embeddings:
        count -= embedding.weight.numel()
    layers, hidden = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    return 6.0 * count + 12.0 * layers * hidden * sequence_length


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak of the device in bfloat16, FLOP/s; None where it is not known."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name), None)
