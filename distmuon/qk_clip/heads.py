"""Which rows of which weights belong to which attention head, and their share of the head's factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# How many rows in a row: (head, exponent of its factor, rows)
_Run = tuple[int, float, int]


@dataclass(frozen=True)
class Rows:
    """What each row of a weight is scaled by: the factor of a head to a power.

    Attributes:
        heads: int64 ``(rows,)``: number of the head; ``num_heads`` stands for the loudest of the layer.
        exponents: float32 ``(rows,)``; zero leaves a row as it is.
        offset: What the module adds to its weight before it multiplies by it: 1 for the norms of Gemma.
    """

    heads: Tensor
    exponents: Tensor
    offset: float = 0.0


class Heads(Protocol):
    """How one attention layer keeps its heads; the classes of this file, or one of your own."""

    @property
    def num_heads(self) -> int:
        """Query heads."""

    @property
    def num_kv_heads(self) -> int:
        """Key heads; query heads ``g * n .. (g + 1) * n - 1`` use key head ``g``, where ``n`` is their ratio."""

    @property
    def transposed(self) -> bool:
        """Whether weights are ``(in, out)``, as in GPT-2's ``Conv1D``, so that rows are their last axis."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the submodules whose weight and bias are scaled."""

    def rows(self, part: str, size: int, alpha: float, gqa: str) -> Rows:
        """What the rows of a part's weight and bias are scaled by.

        Args:
            part: One of ``parts``.
            size: How many rows there are.
            alpha: The queries' share of the factor.
            gqa: ``"group"`` or ``"query"``.

        Raises:
            ValueError: if so many rows are not made of these heads.
        """


@dataclass(frozen=True)
class MultiHead:
    """Queries and keys in projections of their own, head by head.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key heads.
        q: Name of the projection of queries, with ``num_heads * head_dim`` rows.
        k: Name of the projection of keys.
        transposed: The weights are ``(in, out)``.
    """

    num_heads: int
    num_kv_heads: int
    q: str = "q_proj"
    k: str = "k_proj"
    transposed: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The two projections."""
        return self.q, self.k

    def rows(self, part: str, size: int, alpha: float, gqa: str) -> Rows:
        """See :class:`Heads`."""
        to_q, to_k = shares(self, alpha, gqa)
        if part == self.q:
            return _of_runs([(head, to_q, _each(part, size, self.num_heads)) for head in range(self.num_heads)])
        rows = _each(part, size, self.num_kv_heads)
        return _of_runs([(_first_of(self, group), to_k, rows) for group in range(self.num_kv_heads)])


@dataclass(frozen=True)
class Fused:
    """Queries, keys and values in one projection.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key heads.
        layout: ``"sectioned"``: all queries, all keys, all values. ``"interleaved"``: key head by key head its
            queries, its key, its value (Megatron, GPT-NeoX, Falcon).
        qkv: Name of the projection.
        transposed: The weight is ``(in, out)``.
    """

    num_heads: int
    num_kv_heads: int
    layout: str
    qkv: str = "qkv_proj"
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.layout not in ("sectioned", "interleaved"):
            raise ValueError(f'layout={self.layout!r}: give "sectioned" or "interleaved".')

    @property
    def parts(self) -> tuple[str, ...]:
        """The projection."""
        return (self.qkv,)

    def rows(self, part: str, size: int, alpha: float, gqa: str) -> Rows:
        """See :class:`Heads`."""
        to_q, to_k = shares(self, alpha, gqa)
        rows = _each(part, size, self.num_heads + 2 * self.num_kv_heads)
        queries = [(head, to_q, rows) for head in range(self.num_heads)]
        keys = [(_first_of(self, group), to_k, rows) for group in range(self.num_kv_heads)]
        values = [(0, 0.0, rows)] * self.num_kv_heads
        if self.layout == "sectioned":
            return _of_runs([*queries, *keys, *values])
        each = self.num_heads // self.num_kv_heads
        turns = [
            run
            for group in range(self.num_kv_heads)
            for run in (*queries[group * each : (group + 1) * each], keys[group], values[group])
        ]
        return _of_runs(turns)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention of DeepSeek and Kimi: per head a part with and a part without rotary positions.

    Queries without positions take ``alpha`` of the factor and keys without positions the rest; queries with positions
    take all of it, since their key is shared by all heads.

    Attributes:
        num_heads: Heads.
        nope_dim: Dimensions of a query and key without positions.
        rope_dim: Dimensions of a query with positions, which follow.
        value_dim: Dimensions of a value, which follow a head's key.
        q: Name of the projection to queries.
        kv: Name of the projection from the latent to keys and values.
    """

    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q: str = "q_b_proj"
    kv: str = "kv_b_proj"

    @property
    def num_kv_heads(self) -> int:
        """As many as query heads."""
        return self.num_heads

    @property
    def transposed(self) -> bool:
        """Never."""
        return False

    @property
    def parts(self) -> tuple[str, ...]:
        """The two projections."""
        return self.q, self.kv

    def rows(self, part: str, size: int, alpha: float, gqa: str) -> Rows:
        """See :class:`Heads`."""
        dims, to = ((self.nope_dim, self.rope_dim), (alpha, 1.0))
        if part == self.kv:
            dims, to = ((self.nope_dim, self.value_dim), (1.0 - alpha, 0.0))
        if _each(part, size, self.num_heads) != sum(dims):
            raise ValueError(f"{part!r} has {size} rows, which are not {self.num_heads} heads of {dims} dimensions.")
        return _of_runs([(head, to[i], dims[i]) for head in range(self.num_heads) for i in range(2)])


@dataclass(frozen=True)
class NormGains:
    """Gains of norms over queries and keys, in place of the projections, whose scale such norms undo.

    Gains of one head's dimensions are shared by all heads, and take the factor of the loudest.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key heads.
        head_dim: Dimensions of a head.
        offset: What the norm adds to its weight before it multiplies by it: 1 for the norms of Gemma.
        q: Name of the norm of queries.
        k: Name of the norm of keys.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    offset: float = 0.0
    q: str = "q_norm"
    k: str = "k_norm"

    @property
    def transposed(self) -> bool:
        """Never."""
        return False

    @property
    def parts(self) -> tuple[str, ...]:
        """The two norms."""
        return self.q, self.k

    def rows(self, part: str, size: int, alpha: float, gqa: str) -> Rows:
        """See :class:`Heads`."""
        if size == self.head_dim:
            return _of_runs([(self.num_heads, alpha if part == self.q else 1.0 - alpha, size)], self.offset)
        count = self.num_heads if part == self.q else self.num_kv_heads
        if size != count * self.head_dim:
            raise ValueError(
                f"{part!r} has {size} gains, and {self.head_dim} or {count * self.head_dim} were expected."
            )
        found = MultiHead(self.num_heads, self.num_kv_heads, self.q, self.k).rows(part, size, alpha, gqa)
        return Rows(found.heads, found.exponents, self.offset)


def shares(heads: Heads, alpha: float, gqa: str) -> tuple[float, float]:
    """Exponents of the factor for queries and for keys."""
    if gqa == "query" and heads.num_kv_heads < heads.num_heads:
        return 1.0, 0.0  # a key is shared by query heads of other factors
    return alpha, 1.0 - alpha


def check_heads(where: str, heads: Heads) -> None:
    """Refuse numbers of heads that do not divide.

    Raises:
        ValueError: naming ``where``.
    """
    if heads.num_heads < 1 or heads.num_kv_heads < 1 or heads.num_heads % heads.num_kv_heads:
        raise ValueError(
            f"{where} has {heads.num_heads} query heads and {heads.num_kv_heads} key heads: every key head has to "
            "serve as many query heads."
        )


def _first_of(heads: Heads, group: int) -> int:
    return group * (heads.num_heads // heads.num_kv_heads)


def _each(part: str, size: int, heads: int) -> int:
    if size % heads:
        raise ValueError(f"{part!r} has {size} rows, which are not {heads} heads of one size.")
    return size // heads


def _of_runs(runs: Sequence[_Run], offset: float = 0.0) -> Rows:
    heads, exponents, counts = zip(*runs, strict=True)
    repeats = torch.tensor(counts)
    return Rows(
        torch.tensor(heads).repeat_interleave(repeats),
        torch.tensor(exponents, dtype=torch.float32).repeat_interleave(repeats),
        offset,
    )
