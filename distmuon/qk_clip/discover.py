"""The attention layers of a model, and how each keeps its heads."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distmuon.qk_clip.heads import Fused, Heads, Latent, MultiHead, NormGains

# Fused projections of transformers whose order of rows is known, by class: name, layout, whether it is (in, out)
_FUSED = {
    "Phi3Attention": ("qkv_proj", "sectioned", False),
    "GPT2Attention": ("c_attn", "sectioned", True),
    "GPTNeoXAttention": ("query_key_value", "interleaved", False),
}
_FUSED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("qk_norm", "qk_norm"))
# Norms that multiply by their weight, and by 1 + their weight
_PLAIN_NORMS = ("Qwen3", "Qwen3Moe", "Olmo2", "Olmo3", "Olmoe", "FlexOlmo", "Dots1", "Glm4Moe", "Apertus")
_OFFSET_NORMS = ("Gemma3", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe")


def find_attention(model: nn.Module, *, layout: str | None, qk_norm: str) -> dict[str, Heads]:
    """Look for attention layers as transformers writes them.

    Args:
        model: Any.
        layout: Of fused projections whose class is not known here, ``"sectioned"`` or ``"interleaved"``.
        qk_norm: ``"refuse"`` or ``"gain"``, for layers that normalize queries and keys.

    Returns:
        By path of the module.

    Raises:
        ValueError: for layers that normalize queries and keys, unless gains are to be scaled, and for fused
            projections of unknown order.
    """
    found = {}
    for path, module in model.named_modules():
        if getattr(module, "is_cross_attention", False):
            continue
        heads = _known(path, module, layout, qk_norm)
        if heads is not None:
            found[path] = heads
    return found


def given_attention(model: nn.Module, attention: Mapping[str, Heads]) -> dict[str, Heads]:
    """The layers that globs of module paths name, later globs over earlier ones.

    Raises:
        ValueError: for a glob that names nothing, or a layer that lacks what its heads are in.
    """
    found = {}
    paths = [path for path, _ in model.named_modules()]
    for pattern, heads in attention.items():
        matches = fnmatch.filter(paths, pattern)
        if not matches:
            raise ValueError(f"attention has {pattern!r}, which names no module of the model.")
        for path in matches:
            for part in heads.parts:
                if not isinstance(getattr(_sub(model.get_submodule(path), part), "weight", None), Tensor):
                    raise ValueError(f"attention says that {path!r} has {part!r}, and there is no weight of that name.")
            found[path] = heads
    return found


def _known(path: str, module: Any, layout: str | None, qk_norm: str) -> Heads | None:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    config = getattr(module, "config", None)
    queries = _number(config, "num_attention_heads")
    if queries is None:
        return None
    keys = _number(config, "num_key_value_heads") or queries
    norms = next((pair for pair in _NORMS if isinstance(_sub(module, pair[0]), nn.Module)), None)
    if norms is not None and not isinstance(_sub(module, norms[0]), nn.Identity):
        return _normed(path, module, norms, queries, keys, qk_norm)
    latent = _weight(module, "kv_b_proj")
    if latent is not None:
        q = "q_b_proj" if _weight(module, "q_b_proj") is not None else "q_proj"
        nope, rope, value = (
            int(getattr(module, name)) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        return Latent(queries, nope, rope, value, q, "kv_b_proj")
    if _weight(module, "q_proj") is not None and _weight(module, "k_proj") is not None:
        return MultiHead(queries, keys)
    for kind, (name, order, transposed) in _FUSED.items():
        if kind in kinds:
            return Fused(queries, keys, order, name, transposed)
    fused = next((name for name in _FUSED_NAMES if _weight(module, name) is not None), None)
    if fused is None:
        return None
    if layout is None:
        raise ValueError(
            f"{path!r} ({type(module).__name__}) fuses queries, keys and values in {fused!r}: say by layout= whether "
            'its rows are "sectioned" (all queries, all keys, all values) or "interleaved" (key head by key head).'
        )
    return Fused(queries, keys, layout, fused)


def _normed(path: str, module: Any, norms: tuple[str, str], queries: int, keys: int, qk_norm: str) -> NormGains:
    where = f"{path!r} ({type(module).__name__})"
    if qk_norm != "gain":
        raise ValueError(
            f"{where} normalizes its queries and keys after their projections, so that scaling W_q and W_k is a "
            'mathematical no-op: leave QK-Clip out, or let qk_norm="gain" scale the gain of the norms.'
        )
    norm = _sub(module, norms[0])
    if _weight(module, norms[0]) is None or norms[0] == norms[1]:
        raise ValueError(f"{where} normalizes queries and keys without a gain, so that there is nothing to scale.")
    kind = next(name for name in (k.__name__ for k in type(norm).__mro__) if not name.startswith("FSDP"))
    stem = kind.removesuffix("RMSNorm")
    head_dim = _number(module, "head_dim")
    if stem not in (*_PLAIN_NORMS, *_OFFSET_NORMS) or head_dim is None:
        raise ValueError(
            f"{where} has norms of the class {kind}, and whether they multiply by their weight or by 1 + weight is not "
            "known: say so by attention={glob: distmuon.qk_clip.heads.NormGains(..., offset=...)}."
        )
    return NormGains(queries, keys, head_dim, float(stem in _OFFSET_NORMS), *norms)


def _sub(module: nn.Module, name: str) -> Any:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _weight(module: nn.Module, name: str) -> Tensor | None:
    weight = getattr(_sub(module, name), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _number(holder: Any, name: str) -> int | None:
    number = getattr(holder, name, None)
    return number if isinstance(number, int) else None
