"""What orthogonalize.py and accuracy.py compare: torch.optim.Muon's function, the same in float32, and the engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The one private import: torch has no public name for what torch.optim.Muon orthogonalizes with
from torch.optim._muon import _zeropower_via_newtonschulz

import distmuon
from distmuon.numerics.coefficients import resolve_stages
from distmuon.numerics.engines.standard import orthogonalize_alone
from distmuon.numerics.orthogonalize import orthogonalize_
from distmuon.numerics.products import Whole
from distmuon.numerics.rationals import Rational
from distmuon.numerics.recipe import Recipe, Request, choose

ENGINES = ("standard", "composed", "gram", "rational", "auto")
# Names of the two baselines in tables and JSON
TORCH, FLOAT32 = "torch", "float32"
# Defaults of torch.optim.Muon
_QUINTIC, _STEPS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
# Gram matrices of fewer rows are not linked in bfloat16: distmuon.numerics.recipe, held by tests/test_benchmarks.py

_ALIASES = {"gpt2_pair": "8x768x768+2x3072x768+2x768x3072"}


@dataclass(frozen=True)
class Part:
    """``count`` matrices of one shape."""

    count: int
    rows: int
    cols: int

    @property
    def standard_flops(self) -> int:
        """FLOPs of five quintic steps, products counted whole, two a multiply-add."""
        short, long = sorted((self.rows, self.cols))
        return self.count * 2 * _STEPS * (2 * short**2 * long + short**3)

    def flops(self, recipe: Recipe) -> float:
        """FLOPs that a recipe's formula needs, products counted whole, an inverse by Cholesky as half a product."""
        short, long = sorted((self.rows, self.cols))
        cube = 0.5 if isinstance(recipe.formula, Rational) else 1.0
        return self.count * 2 * (recipe.big * short**2 * long + recipe.small * cube * short**3)


def parse_work(text: str) -> tuple[Part, ...]:
    """Read ``ROWSxCOLS``, ``COUNTxROWSxCOLS``, several with ``+`` between them, or a name.

    Raises:
        ValueError: for other text.
    """
    parts = []
    for part in _ALIASES.get(text, text).split("+"):
        try:
            *counts, rows, cols = (int(number) for number in part.split("x"))
            (count,) = counts or (1,)
        except ValueError:
            raise ValueError(
                f"shape {text!r}: give ROWSxCOLS or COUNTxROWSxCOLS, several with + between them, or "
                f"{', '.join(_ALIASES)}."
            ) from None
        if min(count, rows, cols) < 1:
            raise ValueError(f"shape {text!r}: give numbers of at least 1.")
        parts.append(Part(count, rows, cols))
    return tuple(parts)


def torch_function(matrix: Tensor) -> Tensor:
    """torch.optim.Muon's own function on ``(m, n)``; bfloat16 ``matrix`` is normalized in place."""
    return _zeropower_via_newtonschulz(matrix, _QUINTIC, _STEPS, _EPS)


def float32_function(matrix: Tensor) -> Tensor:
    """The operations of torch.optim.Muon in their order, in float32, on a copy of ``(m, n)``."""
    return orthogonalize_alone(matrix.to(torch.float32, copy=True), resolve_stages("quintic", _STEPS), _EPS)


def engine_function(engine: str, x: Tensor) -> Tensor:
    """The public function on ``(..., m, n)``, rounded to bfloat16 as the optimizer does by default."""
    return distmuon.orthogonalize(x, engine=engine, dtype=torch.bfloat16, eps=_EPS if engine == "standard" else 0.0)


def result_of(label: str, x: Tensor) -> Tensor:
    """What a row of the tables computes for one matrix ``(m, n)``."""
    if label == TORCH:
        return torch_function(x.clone())
    return float32_function(x) if label == FLOAT32 else engine_function(label, x)


def engine_recipe(engine: str, part: Part, device: torch.device) -> Recipe:
    """What :func:`engine_function` runs."""
    return choose(part.rows, part.cols, device, Request(torch.bfloat16, engine))


def auto_engine(part: Part, device: torch.device) -> str:
    """Which engine ``auto`` takes."""
    return engine_recipe("auto", part, device).engine


def held_recipe(engine: str, rows: int, cols: int, held: torch.dtype) -> Recipe:
    """What a device with units for 16-bit products runs for a small matrix, to run it on one without.

    Args:
        engine: ``"composed"`` or ``"gram"``.
        rows: Of a matrix; the short side is below 2048.
        cols: Of a matrix.
        held: Dtype of the iterates: bfloat16, or float16 as of ``"gram"`` on a GPU.
    """
    recipe = choose(rows, cols, torch.device("cpu"), Request(torch.bfloat16, engine))
    restarts = recipe.restarts
    if held is torch.bfloat16:
        restarts = tuple(range(len(recipe.formula)))  # type: ignore[arg-type]
    return dataclasses.replace(
        recipe, dtype=held, restarts=restarts, products=Whole(), batched=False, one_thread=max(rows, cols) <= 1024
    )


def held_function(engine: str, held: torch.dtype, x: Tensor) -> Tensor:
    """:func:`engine_function` with iterates in 16 bits, emulated where there are no units for them."""
    out = x.to(torch.bfloat16, copy=True).contiguous()
    recipe = held_recipe(engine, x.size(-2), x.size(-1), held)
    return orthogonalize_(out, recipe, eps=0.0, dtype=torch.bfloat16)


def orthogonalizations(
    parts: Sequence[Part], labels: Sequence[str], *, device: torch.device, input_dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Functions to time, each on Gaussian matrices of its own, stacked by shape as the optimizer's buckets are."""
    return {label: _orthogonalization(parts, label, device, input_dtype) for label in labels}


def _orthogonalization(
    parts: Sequence[Part], label: str, device: torch.device, input_dtype: torch.dtype
) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(0)
    stacks = [
        torch.randn(part.count, part.rows, part.cols, device=device, generator=generator).to(input_dtype)
        for part in parts
    ]
    if label in (TORCH, FLOAT32):
        alone = torch_function if label == TORCH else float32_function

        def loop() -> None:
            for stack in stacks:
                for matrix in stack:
                    alone(matrix)

        return loop

    def batches() -> None:
        for stack in stacks:
            engine_function(label, stack)

    return batches


def steps(parts: Sequence[Part], labels: Sequence[str], *, device: torch.device) -> dict[str, Callable[[], object]]:
    """The same for the whole step of an optimizer over float32 parameters."""
    return {label: _step(parts, label, device) for label in labels}


def _step(parts: Sequence[Part], label: str, device: torch.device) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for part in parts:
        for _ in range(part.count):
            param = nn.Parameter(torch.randn(part.rows, part.cols, device=device, generator=generator))
            param.grad = torch.randn(part.rows, part.cols, device=device, generator=generator)
            params.append(param)
    if label == TORCH:
        return torch.optim.Muon(params).step
    groups = [{"params": params, "use_muon": True}]
    if label == FLOAT32:
        return distmuon.Muon(groups, ns_engine="standard", ns_dtype=torch.float32, foreach=False).step
    return distmuon.Muon(groups, ns_engine=label).step


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """A square product that runs at a device's full speed, and its FLOPs."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out), 2 * side**3
