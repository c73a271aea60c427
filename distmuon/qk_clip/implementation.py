"""An attention implementation for transformers that records the largest logits and calls the one the model had.

transformers is imported when a model of it is at hand, and then is there already.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.qk_clip.record import record_max_logits

_PREFIX = "distmuon_qk_clip_"
_BASES = ("eager", "sdpa", "flex_attention")


class Recording(ABC):
    """Where the maxima of one layer go."""

    @abstractmethod
    def wanted(self) -> bool:
        """Whether this step is recorded."""

    @abstractmethod
    def take(self, max_logits: Tensor) -> None:
        """Take float32 ``(heads,)``."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        # a copy of a module is not recorded, and calls what the model had
        return _nothing, ()


# Attribute of a module that is recorded: a table of modules would be guarded as a whole by torch.compile
_SITE = "_distmuon_qk_clip"


def install(sites: Mapping[nn.Module, Recording]) -> Callable[[], None]:
    """Let attention layers of transformers record; others are left alone.

    Args:
        sites: By attention module.

    Returns:
        A function that gives the models their attention back.

    Raises:
        ValueError: if a module records already, or its attention is another implementation than those of torch.
    """
    ours = {module: site for module, site in sites.items() if hasattr(_config(module), "_attn_implementation")}
    before: dict[int, tuple[Any, str]] = {}
    for module in ours:
        config, kind = _config(module), type(module).__name__
        base = (config._attn_implementation or "eager").removeprefix(_PREFIX)
        if getattr(module, _SITE, None) is not None:
            raise ValueError(f"QK-Clip is attached to this model already ({kind}): call detach() of its handle first.")
        if base not in _BASES:
            raise ValueError(
                f"the attention of {kind} is {base!r}, which does not tell its largest logits: call "
                'model.set_attn_implementation("sdpa"), "flex_attention" or "eager" before QK-Clip is attached.'
            )
        if base == "eager" and getattr(module, "reorder_and_upcast_attn", False):
            raise ValueError(f'{kind} with reorder_and_upcast_attn bypasses attention implementations: take "sdpa".')
        before[id(config)] = (config, base)
    for config, base in before.values():
        _register(base)
        config._attn_implementation = {"": _PREFIX + base}  # for this configuration, and none inside of it
    for module, site in ours.items():
        setattr(module, _SITE, site)

    def undo() -> None:
        for module in ours:
            delattr(module, _SITE)
        for config, base in before.values():
            config._attn_implementation = {"": base}

    return undo


def _register(base: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        site: Recording | None = getattr(module, _SITE, None)
        if site is not None and module.training and site.wanted():
            if base == "flex_attention" and _kernel_tells(query, attention_mask, kwargs):
                return _flex_attention(site, module, query, key, value, attention_mask, **kwargs)
            scale = args[0] if args else kwargs.get("scaling")
            mask, is_causal = _visible(base, module, query, key, attention_mask, kwargs)
            site.take(record_max_logits(query, key, scale, mask, is_causal=is_causal))
        return _underlying(base, module)(module, query, key, value, attention_mask, *args, **kwargs)

    AttentionInterface.register(_PREFIX + base, attention)
    AttentionMaskInterface.register(_PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _underlying(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the model would call: its file may have an eager attention and an interface of its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # in the order of classes, as FSDP2 puts one of its own in front
    files: list[Any] = [sys.modules.get(kind.__module__) for kind in type(module).__mro__]
    eager = [file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")]
    interfaces = [file.ALL_ATTENTION_FUNCTIONS for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS")]
    found: Callable[..., tuple[Tensor, Tensor | None]]
    found = [*interfaces, ALL_ATTENTION_FUNCTIONS][0].get_interface(base, *eager[:1] or [None])
    return found


def _visible(
    base: str, module: Any, query: Tensor, key: Tensor, attention_mask: Any, kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, bool]:
    """What queries see, as a mask and whether later keys are hidden, as each implementation reads its arguments."""
    if attention_mask is None:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return None, bool(base == "sdpa" and query.shape[2] > 1 and is_causal)
    if isinstance(attention_mask, Tensor):
        return attention_mask[..., : key.shape[2]], False
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = attention_mask.shape[:2]
    dense = create_mask(attention_mask.mask_mod, batch, heads, query.shape[2], key.shape[2], str(query.device))
    return dense, False


def _kernel_tells(query: Tensor, attention_mask: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether FlexAttention itself can tell the maxima: on GPUs, of scores that nothing else is done to."""
    changed = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    flash = (kwargs.get("kernel_options") or {}).get("BACKEND") == "FLASH"
    return query.device.type in ("cuda", "xpu") and not (changed or flash or isinstance(attention_mask, Tensor))


def _flex_attention(
    site: Recording,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    scaling: float | None = None,
    kernel_options: dict[str, Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """FlexAttention as transformers calls it, asked for the maxima too."""
    from torch.nn.attention.flex_attention import AuxRequest
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    heads = query.shape[1]
    grouped = heads & (heads - 1) == 0
    if not grouped:  # as transformers does, for kernels that want powers of two
        key, value = (states.repeat_interleave(heads // states.shape[1], 1) for states in (key, value))
    aux: Any
    output, aux = compile_friendly_flex_attention(
        query,
        key,
        value,
        training=module.training,
        block_mask=block_mask,
        enable_gqa=grouped,
        scale=scaling,
        kernel_options=kernel_options,
        return_aux=AuxRequest(lse=True, max_scores=True),
    )
    with torch.no_grad():
        site.take(aux.max_scores.amax((0, 2)))
    return output.transpose(1, 2).contiguous(), aux.lse.to(value.dtype)


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _nothing() -> None:
    return None
