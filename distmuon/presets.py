"""What modules that we know keep in a parameter: fused projections, heads, experts, transposed storage.

Modules are known by the names of their classes, as transformers 5 has them, and what they are made of is read from
their attributes, so that this file imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from distmuon.plan.blocks import blocks_of
from distmuon.plan.reading import WHOLE, Reading

Found = Iterator[tuple[str, "Preset"]]

# Attention whose projections are q_proj, k_proj, v_proj and o_proj (dense in Phi), all of heads of head_dim
_SEPARATE = frozenset(
    (
        "LlamaAttention",
        "MistralAttention",
        "MixtralAttention",
        "Qwen2Attention",
        "Qwen3Attention",
        "Qwen3MoeAttention",
        "GemmaAttention",
        "Gemma2Attention",
        "Gemma3Attention",
        "PhiAttention",
        "GptOssAttention",
    )
)


@dataclass(frozen=True)
class Preset:
    """What is known of one parameter.

    Attributes:
        auto: Projections that a forward pass takes apart are matrices of their own.
        heads: So is every attention head.
        labels: What the blocks of ``auto``, or else of ``heads``, are called, and the projections whose heads take
            turns; empty: it holds one projection.
    """

    auto: Reading = WHOLE
    heads: Reading | None = None
    labels: tuple[str, ...] = ()

    def by(self, word: str) -> Reading:
        """The reading that ``matrices=word`` asks for."""
        return self.heads if word == "heads" and self.heads is not None else self.auto


def presets_of(modules: Mapping[str, nn.Module]) -> dict[str, Preset]:
    """Look for modules that we know.

    Args:
        modules: All modules of a model by their clean paths, outer ones first.

    Returns:
        Presets by the names of parameters. A module that has the name of one we know but other shapes has none.
    """
    found: dict[str, Preset] = {}
    for path, module in modules.items():
        for suffix, preset in _known(module):
            name = f"{path}.{suffix}" if path else suffix
            owner, _, attribute = name.rpartition(".")
            weight = getattr(modules.get(owner), attribute, None)
            # an outer module knows more of a parameter than the one that holds it
            if name not in found and isinstance(weight, Tensor) and _fits(name, weight, preset):
                found[name] = preset
    return found


def _known(module: nn.Module) -> list[tuple[str, Preset]]:
    if isinstance(module, nn.MultiheadAttention):
        return list(_multihead_attention(module))
    # FSDP2 puts a class of its own in front
    kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.")}
    rules = [rule for known, rule in _RULES if kinds & known]
    if any(kind.endswith("Experts") for kind in kinds):
        rules.append(_experts)
    try:
        return [entry for rule in rules for entry in rule(module)]
    except (AttributeError, TypeError, ZeroDivisionError):  # of a version that keeps other attributes
        return []


def _fits(name: str, weight: Tensor, preset: Preset) -> bool:
    try:
        for reading in (preset.auto, preset.heads or preset.auto):
            blocks_of(name, weight.shape, reading)
    except ValueError:
        return False
    return True


def _conv1d(module: Any) -> Found:
    """The linear layer of GPT-2, whose weight is ``(in, out)``."""
    yield "weight", Preset(Reading(transposed=True))


def _gpt2(module: Any) -> Found:
    stored, heads, width = Reading(transposed=True), int(module.num_heads), int(module.embed_dim)
    cross = bool(module.is_cross_attention)
    fused = replace(stored, split_sizes=(width,) * (2 if cross else 3))
    yield "c_attn.weight", Preset(fused, replace(fused, num_heads=heads), ("k", "v") if cross else ("q", "k", "v"))
    yield "q_attn.weight", Preset(stored, replace(stored, num_heads=heads))
    yield "c_proj.weight", Preset(stored, replace(stored, num_heads=heads, split_axis="cols"))


def _separate(module: Any) -> Found:
    head = int(module.head_dim)
    for projection in ("q_proj", "k_proj", "v_proj"):
        rows = _linear(module, projection)
        if rows is not None:
            yield f"{projection}.weight", Preset(heads=Reading(num_heads=max(1, rows.shape[0] // head)))
    for projection in ("o_proj", "dense"):
        cols = _linear(module, projection)
        if cols is not None:
            heads = Reading(num_heads=max(1, cols.shape[1] // head), split_axis="cols")
            yield f"{projection}.weight", Preset(heads=heads)


def _phi3_attention(module: Any) -> Found:
    head, queries = int(module.head_dim), int(module.config.num_attention_heads)
    keys = int(module.config.num_key_value_heads)
    counts = (queries, keys, keys)
    fused = Reading(split_sizes=tuple(head * count for count in counts))
    yield "qkv_proj.weight", Preset(fused, replace(fused, num_heads=counts), ("q", "k", "v"))
    yield "o_proj.weight", Preset(heads=Reading(num_heads=queries, split_axis="cols"))


def _phi3_mlp(module: Any) -> Found:
    weight = _linear(module, "gate_up_proj")
    if weight is not None:
        yield "gate_up_proj.weight", Preset(Reading(split_sizes=(weight.shape[0] // 2,) * 2), labels=("gate", "up"))


def _heads_take_turns(module: Any) -> Found:
    """Of GPT-NeoX and Bloom: q, k and v of each head, so that all queries together are no block."""
    heads = int(module.config.num_attention_heads if hasattr(module, "config") else module.num_heads)
    yield "query_key_value.weight", Preset(heads=Reading(num_heads=3 * heads), labels=("q", "k", "v"))
    yield "dense.weight", Preset(heads=Reading(num_heads=heads, split_axis="cols"))


def _falcon(module: Any) -> Found:
    heads, head = int(module.num_heads), int(module.head_dim)
    keys, fused = int(module.num_kv_heads), WHOLE
    if module.multi_query and not module.new_decoder_architecture:
        fused = Reading(split_sizes=(heads * head, head, head))
        by_head = replace(fused, num_heads=(heads, 1, 1))
    else:  # some queries, then their k and v, take turns
        by_head = Reading(num_heads=heads + 2 * keys)
    yield "query_key_value.weight", Preset(fused, by_head, ("q", "k", "v"))
    yield "dense.weight", Preset(heads=Reading(num_heads=heads, split_axis="cols"))


def _deepseek_v3(module: Any) -> Found:
    heads = int(module.num_heads)
    rope, latent = int(module.qk_rope_head_dim), int(module.kv_lora_rank)
    nope, value = int(module.qk_nope_head_dim), int(module.v_head_dim)
    for projection in ("q_proj.weight", "q_b_proj.weight"):
        yield projection, Preset(heads=Reading(num_heads=heads))
    yield "kv_a_proj_with_mqa.weight", Preset(Reading(split_sizes=(latent, rope)), labels=("latent", "rope k"))
    # keys and values take turns head by head, so that all keys together are no block
    yield "kv_b_proj.weight", Preset(heads=Reading(split_sizes=(nope, value) * heads), labels=("k", "v"))
    yield "o_proj.weight", Preset(heads=Reading(num_heads=heads, split_axis="cols"))


def _experts(module: Any) -> Found:
    """Stacks of experts as transformers declares them to its kernels."""
    stored = Reading(transposed=bool(module.is_transposed))
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim != 3:
            continue
        if name != "gate_up_proj":
            yield name, Preset(stored)
            continue
        features = weight.shape[2 if stored.transposed else 1]
        fused = replace(stored, split_sizes=(features // 2,) * 2, interleaved=not bool(module.is_concatenated))
        yield name, Preset(fused, labels=("gate", "up"))


def _multihead_attention(module: Any) -> Found:
    """The attention of torch, which fuses its projections where queries, keys and values have one width."""
    heads, width = int(module.num_heads), int(module.embed_dim)
    fused = Reading(split_sizes=(width,) * 3)
    yield "in_proj_weight", Preset(fused, replace(fused, num_heads=heads), ("q", "k", "v"))
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        yield name, Preset(heads=Reading(num_heads=heads))
    yield "out_proj.weight", Preset(heads=Reading(num_heads=heads, split_axis="cols"))


def _linear(module: Any, name: str) -> Tensor | None:
    weight = getattr(getattr(module, name, None), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


_RULES: tuple[tuple[frozenset[str], Callable[[Any], Found]], ...] = (
    (frozenset(("Conv1D",)), _conv1d),
    (frozenset(("GPT2Attention",)), _gpt2),
    (_SEPARATE, _separate),
    (frozenset(("Phi3Attention",)), _phi3_attention),
    (frozenset(("Phi3MLP",)), _phi3_mlp),
    (frozenset(("GPTNeoXAttention", "BloomAttention")), _heads_take_turns),
    (frozenset(("FalconAttention",)), _falcon),
    (frozenset(("DeepseekV3Attention",)), _deepseek_v3),
)
