"""The largest attention logit of each head."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of a block of logits at a time
_BLOCK = 1 << 22


@torch.no_grad()
def record_max_logits(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """The largest scaled visible logit of each query head, by blocks of queries.

    Args:
        q: ``(batch, heads, queries, dim)``, after rotary positions.
        k: ``(batch, kv_heads, keys, dim)``; query heads ``g * n .. (g + 1) * n - 1`` use key head ``g``.
        scale: What products are multiplied by, positive; None: ``1 / sqrt(dim)``.
        mask: Broadcasts to ``(batch, heads, queries, keys)``. Boolean: true where a key is visible. Floating: what is
            added to logits, where less than half of the dtype's lowest number makes a key invisible; what it adds
            elsewhere is not counted, as no scale of queries and keys changes it.
        is_causal: Query ``i`` sees keys ``0 .. i`` alone, as in ``scaled_dot_product_attention``.

    Returns:
        float32 ``(heads,)``; -inf for a head that sees nothing.

    Raises:
        ValueError: for numbers of heads that do not divide, and a scale that is not positive.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly.")
    scale = dim**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale={scale}: the largest logit is found for a positive scale only.")
    found = torch.full((heads,), -torch.inf, device=q.device)
    if not q.numel() or not k.numel():
        return found
    visible = None if mask is None else _visible(mask)
    block = max(1, _BLOCK // (batch * heads * keys))
    for start in range(0, queries, block):
        end = min(start + block, queries)
        seen = min(end, keys) if is_causal else keys
        # query heads of a key head as further queries of it, so that keys are not copied
        rows = q[:, :, start:end].reshape(batch, kv_heads, -1, dim)
        logits = (rows @ k[:, :, :seen].transpose(2, 3)).view(batch, heads, end - start, seen)
        if visible is not None:
            shown = visible[:, :, start:end, :seen] if visible.shape[2] > 1 else visible[..., :seen]
            logits.masked_fill_(~shown, -torch.inf)
        if is_causal:
            index = torch.arange(seen, device=q.device)
            logits.masked_fill_(index > torch.arange(start, end, device=q.device)[:, None], -torch.inf)
        found = torch.maximum(found, logits.amax((0, 2, 3)).float())
    return found * scale


def _visible(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask[(None,) * (4 - mask.ndim)]
