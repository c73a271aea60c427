"""The model: a causal language model of transformers with random weights."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from distmuon.pretrain.config import ModelConfig
from distmuon.pretrain.errors import UserError


def model_config(config: ModelConfig, vocab_size: int, sequence_length: int) -> PretrainedConfig:
    """The transformers configuration that the ``model`` section describes.

    Args:
        config: The ``model`` section.
        vocab_size: Size of the data's vocabulary, used when ``config`` names none.
        sequence_length: Tokens of a sequence; a context length that is not given is raised to it.

    Raises:
        UserError: For a type or key that transformers does not know, or too short a context.
    """
    try:
        defaults = AutoConfig.for_model(config.type)
    except ValueError as error:
        raise UserError(
            f"model.type is {config.type!r}, which this transformers does not know: give a type of one of its "
            "causal language models, such as llama, qwen3, olmo2 or gpt2."
        ) from error
    # models read head_dim though the configuration of some, such as qwen3_moe, does not list it
    known = {*defaults.to_dict(), *defaults.attribute_map, "head_dim"}
    for key in config.config:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            advice = f"did you mean {near[0]}?" if near else "see its documentation in transformers."
            raise UserError(f"model.config.{key} is no setting of a {config.type} model: {advice}")
    kwargs: dict[str, Any] = {"vocab_size": vocab_size, "use_cache": False, **config.config}
    context = getattr(defaults, "max_position_embeddings", None)
    if context is not None:
        key = defaults.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        given = kwargs.get(key, kwargs.get("max_position_embeddings"))
        if given is not None and given < sequence_length:
            raise UserError(
                f"data.sequence_length is {sequence_length}, longer than model.config.{key} {given}: "
                f"raise {key} to {sequence_length} or shorten the sequences."
            )
        if given is None:
            kwargs[key] = max(context, sequence_length)
    try:
        return AutoConfig.for_model(config.type, **kwargs)
    except Exception as error:  # transformers has several kinds for this
        raise UserError(f"transformers refuses model.config: {_reason(error)}") from error


def build_model(
    config: PretrainedConfig,
    *,
    seed: int,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """Make the model with weights drawn from ``seed``.

    Args:
        config: From `model_config`.
        seed: Seed of the global random number generators, which go on being used for dropout.
        activation_checkpointing: Recompute activations in the backward pass.

    Returns:
        A float32 model in training mode on the CPU, the same for every device and process, or on torch's default
        device, such as meta; ``model(input_ids=...)`` of int64 ``(batch, tokens)`` has ``.logits`` of
        ``(batch, tokens, vocabulary)``.

    Raises:
        UserError: If transformers has no causal language model of this type or refuses the sizes.
    """
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:  # as above, and what sizes that do not fit raise in torch
        raise UserError(f"transformers cannot make a {config.model_type} language model: {_reason(error)}") from error
    model.train()
    if activation_checkpointing:
        # later versions of transformers deprecate the second name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of trained values; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _reason(error: Exception) -> str:
    """The last line of a message, which names the cause where there are several."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
