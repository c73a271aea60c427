"""Text that a model writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distmuon.pretrain.data import Tokenizer
from distmuon.pretrain.precision import autocast


@torch.no_grad()
def sample_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 50,
) -> str:
    """Continue a prompt.

    Args:
        model: A causal language model of transformers; where it is sharded, all ranks have to call this alike.
        tokenizer: Of the model's tokens.
        prompt: The text to continue; empty: the separator between documents.
        tokens: Tokens to add.
        device: The model's device.
        dtype: Of the forward pass.
        seed: Of the draw; the global random number generators are left as they were.
        temperature: Divides the logits.
        top_k: Draw from this many likeliest tokens.

    Returns:
        Prompt and continuation.
    """
    ids = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.separator]
    input_ids = torch.tensor([ids], dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    generate: Any = model.generate
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast(device, dtype):
        torch.manual_seed(seed)
        output = generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            use_cache=True,
            # a run of a fixed length: what the config calls its end token may be any token of this data
            eos_token_id=None,
            pad_token_id=0,
        )
    model.train(was_training)
    return tokenizer.decode(output[0].tolist())
