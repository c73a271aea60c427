"""Scale the rows of weights, whole or sharded, in place."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distmuon.comm.layout import local_tensor, read_layout
from distmuon.qk_clip.factors import check_options, factor_table, head_factors
from distmuon.qk_clip.heads import Heads, Rows, check_heads


@torch.no_grad()
def qk_clip_(
    weights: nn.Module | Mapping[str, Tensor | Sequence[Tensor]],
    max_logits: Tensor,
    heads: Heads,
    *,
    tau: float = 100.0,
    alpha: float = 0.5,
    gqa: str = "group",
) -> Tensor:
    """Scale the queries and keys of one attention layer so that its largest logits would have been at most ``tau``.

    Call it after the optimizer step, on the float32 weights if there are copies in other dtypes. Does not wait for
    the device.

    Args:
        weights: The attention module, whose submodules ``heads.parts`` have a weight and perhaps a bias; or those
            tensors by part, a weight or ``(weight, bias)``. DTensors are scaled shard by shard.
        max_logits: float32 ``(num_heads,)``, as :func:`record_max_logits` returns them; over several ranks the maximum
            of all ranks.
        heads: How the layer keeps its heads: ``distmuon.qk_clip.heads.MultiHead``, ``Fused``, ``Latent`` or
            ``NormGains``.
        tau: Bound of the logits.
        alpha: The queries' share of a factor; the keys have the rest.
        gqa: Where query heads share a key: ``"group"`` scales all of them and the key as the loudest of them needs;
            ``"query"`` each query head by its own factor, and the key not.

    Returns:
        float32 ``(num_heads,)``, the factor of each head, 1 for those that were not clipped.

    Raises:
        ValueError: for settings out of range, and weights that are not made of such heads.
    """
    check_options(tau, alpha, gqa)
    check_heads("this attention layer", heads)
    if max_logits.shape != (heads.num_heads,):
        raise ValueError(f"max_logits has the shape {tuple(max_logits.shape)}, and there are {heads.num_heads} heads.")
    gammas = head_factors(max_logits, tau)
    scaler = Scaler(heads, alpha, gqa)
    scaler.scale(dict(parts_in(weights, heads)), factor_table(gammas, heads, gqa))
    return gammas


def parts_in(
    weights: nn.Module | Mapping[str, Tensor | Sequence[Tensor]], heads: Heads
) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """The tensors of a layer by part and number: 0 for the weight, 1 for the bias."""
    for part in heads.parts:
        if isinstance(weights, nn.Module):
            module = weights.get_submodule(part)
            found = [getattr(module, "weight", None), getattr(module, "bias", None)]
        else:
            given = weights[part]
            found = [given] if isinstance(given, Tensor) else list(given)
        for number, tensor in enumerate(found):
            if tensor is not None:
                yield (part, number), tensor


@dataclass
class Scaler:
    """Scales one layer, step after step.

    Attributes:
        heads: Of the layer.
        alpha: The queries' share.
        gqa: ``"group"`` or ``"query"``.
    """

    heads: Heads
    alpha: float
    gqa: str
    _known: dict[tuple[str, int], _Mine] = field(default_factory=dict)

    def scale(self, tensors: Mapping[tuple[str, int], Tensor], table: Tensor) -> None:
        """Multiply rows in place.

        Args:
            tensors: As :func:`parts_in` yields them.
            table: From :func:`distmuon.qk_clip.factors.factor_table`.
        """
        for key, tensor in tensors.items():
            mine = self._known.get(key)
            if mine is None or mine.tensor() is not tensor or mine.rows.heads.device != tensor.device:
                mine = self._known[key] = self._read(key[0], tensor)
            factors = table.to(tensor.device)[mine.rows.heads] ** mine.rows.exponents
            local = local_tensor(tensor)
            factors = factors if self.heads.transposed or local.ndim == 1 else factors[:, None]
            local.mul_(factors)
            if mine.rows.offset:
                # (offset + w) f - offset, in the form that keeps every bit where f is 1
                local.add_((factors - 1.0) * mine.rows.offset)
            torch.autograd.graph.increment_version(tensor)

    def _read(self, part: str, tensor: Tensor) -> _Mine:
        """The rows of which this rank has elements."""
        axis = tensor.ndim - 1 if self.heads.transposed else 0
        rows = self.heads.rows(part, tensor.shape[axis], self.alpha, self.gqa)
        box = read_layout(part, tensor, None).box
        mine = slice(box.offsets[axis], box.offsets[axis] + box.sizes[axis])
        heads, exponents = rows.heads[mine].to(tensor.device), rows.exponents[mine].to(tensor.device)
        return _Mine(weakref.ref(tensor), Rows(heads, exponents, rows.offset))


@dataclass(frozen=True)
class _Mine:
    tensor: weakref.ref[Tensor]
    rows: Rows
