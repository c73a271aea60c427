"""Which engine, polynomial, dtype and kind of product a matrix gets: by its shape and its device alone.

Never by how many matrices there are, or how many ranks share them: results would change with the world size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from distmuon.numerics.coefficients import TABLES, Stage, default_restarts, resolve_stages, with_safety
from distmuon.numerics.costs import CostTable
from distmuon.numerics.hardware import compute_dtype, device_class
from distmuon.numerics.kernels import available
from distmuon.numerics.products import Kernels, Products, Strips, Whole
from distmuon.numerics.rationals import RATIONALS, Rational
from distmuon.numerics.tables import builtin_table

Formula: TypeAlias = "tuple[Stage, ...] | Rational"
Coefficients: TypeAlias = "str | Stage | Sequence[Stage] | Rational"

EXTERNAL = "gram_newton_schulz"
ENGINES = ("auto", "standard", "composed", "gram", "rational", EXTERNAL)
# These run no batches of products of ours that torch.compile could take
NOT_COMPILED = ("standard", "rational", EXTERNAL)
# What an engine runs when nothing else is asked for
_DEFAULTS = {"standard": "quintic", "composed": "nested14", "gram": "gram28", "rational": "rational2"}
_DEFAULTS[EXTERNAL] = "polar_express"

# Below, measured on CPUs (docs/orthogonalization.md). Rows up to which matrices are multiplied in batches, and rows up
# to which each has one thread: more would wait for each other. bfloat16 products up to 1024 rows have one anyway.
_BATCHED_ROWS = 64
_ONE_THREAD_ROWS = {False: 384, True: 768}
# bfloat16 units are so fast that strips pay for large matrices alone
_STRIPS_NUMEL = {False: 1, True: 2048 * 8192}
# Gram matrices of fewer rows are too noisy in bfloat16 to go on with
_LINKED_ROWS = 256
# Mirrored kernels beat whole products from here on (H800, flash-muon's README)
_KERNEL_ROWS = 2048


@dataclass(frozen=True)
class Recipe:
    """How matrices of one shape are orthogonalized.

    Attributes:
        engine: One of :data:`ENGINES` other than ``"auto"``.
        formula: Polynomial stages, or a rational function.
        restarts: Stages that make the Gram matrix anew (:mod:`distmuon.numerics.engines.gram`).
        dtype: Of the iterates.
        products: How symmetric products are made.
        batched: Whether matrices are multiplied in batches.
        one_thread: Whether each matrix has one thread of a CPU, and several run at a time.
    """

    engine: str
    formula: Formula
    restarts: tuple[int, ...]
    dtype: torch.dtype
    products: Products
    batched: bool
    one_thread: bool

    @property
    def big(self) -> int:
        """Products of ``s x s`` by ``s x l``, with short side ``s`` and long side ``l``."""
        return 2 * max(1, len(self.restarts))

    @property
    def small(self) -> int:
        """Products of ``s x s`` by ``s x s``; of a rational function its inverses."""
        if isinstance(self.formula, Rational):
            return len(self.formula.poles)
        linked = len(self.formula) - len(self.restarts)
        return 3 * linked + sum({2: 0, 3: 1, 5: 2}[len(stage)] for stage in self.formula)

    def seconds(self, rows: int, cols: int, table: CostTable) -> float:
        """Predicted time of one matrix."""
        return table.rates(self.engine).seconds(rows, cols, big=self.big, small=self.small)


def choose(
    rows: int,
    cols: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    engine: str = "auto",
    coefficients: Coefficients = "auto",
    steps: int | None = None,
    safety: float | None = None,
    restarts: Sequence[int] | None = None,
    compile: bool = False,
    table: CostTable | None = None,
) -> Recipe:
    """The recipe of ``rows x cols`` matrices.

    Args:
        rows: Of a matrix.
        cols: Of a matrix.
        device: Where it lies.
        dtype: What it is rounded to.
        engine: One of :data:`ENGINES`; ``"auto"`` takes the fastest of the table with its own coefficients, and
            ``"composed"`` or ``"rational"`` with given ones.
        coefficients: ``"auto"``, a name, stages, or a :class:`Rational`.
        steps: Number of stages; with ``coefficients="auto"``, of the quintic.
        safety: Stages are evaluated at ``X / safety``; None: as in the table.
        restarts: Of the Gram form; None: of the table, else
            :func:`distmuon.numerics.coefficients.default_restarts`.
        compile: Whether the iteration goes through :func:`torch.compile`, which batches suit.
        table: Speed of the engines; None: the built-in one of the device.

    Raises:
        ValueError: for what :func:`check_formula` refuses, and restarts that are not ascending from 0.
    """
    check_formula(engine, coefficients, steps)
    if not isinstance(coefficients, str | Rational):
        coefficients = tuple(tuple(c) if isinstance(c, Sequence) else c for c in coefficients)  # type: ignore[assignment]
    restarts = None if restarts is None else tuple(restarts)
    table = table or builtin_table(device_class(device))
    return _choose(rows, cols, device, dtype, engine, coefficients, steps, safety, restarts, compile, table)


def forget() -> None:
    """Drop remembered recipes, which hold for one machine; for tests that pretend to be on another."""
    _choose.cache_clear()


@functools.lru_cache(maxsize=4096)
def _choose(
    rows: int,
    cols: int,
    device: torch.device,
    dtype: torch.dtype,
    engine: str,
    coefficients: Coefficients,
    steps: int | None,
    safety: float | None,
    restarts: tuple[int, ...] | None,
    compile: bool,
    table: CostTable,
) -> Recipe:
    def recipe(name: str) -> Recipe:
        return _recipe(rows, cols, device, dtype, name, coefficients, steps, safety, restarts, compile)

    if engine != "auto":
        return recipe(engine)
    if coefficients != "auto" or steps is not None:
        return recipe("rational" if _is_rational(coefficients) else "composed")
    known = [name for name, _ in table.engines if name in ("composed", "gram", "rational")]
    known = [name for name in known if not (compile and name in NOT_COMPILED)]
    recipes = [recipe(name) for name in known] or [recipe("composed")]
    return min(recipes, key=lambda found: found.seconds(rows, cols, table))


def _recipe(
    rows: int,
    cols: int,
    device: torch.device,
    dtype: torch.dtype,
    engine: str,
    coefficients: Coefficients,
    steps: int | None,
    safety: float | None,
    restarts: tuple[int, ...] | None,
    compile: bool,
) -> Recipe:
    short = min(rows, cols)
    cpu = device.type == "cpu"
    if coefficients == "auto":
        coefficients = _DEFAULTS[engine] if steps is None else "quintic"
        if engine == EXTERNAL and steps is None:
            steps = 5
    held = _iterate_dtype(engine, dtype, device)
    formula: Formula
    if _is_rational(coefficients):
        formula = RATIONALS[coefficients] if isinstance(coefficients, str) else coefficients  # type: ignore[assignment]
        begins: tuple[int, ...] = (0,)
    else:
        formula = resolve_stages(coefficients, steps)  # type: ignore[arg-type]
        begins = _restarts(engine, coefficients, len(formula), short, held, restarts)
        if safety is not None:
            formula = with_safety(formula, safety)
    small = short <= _BATCHED_ROWS and held.itemsize >= 4
    batched = engine != "standard" and (not cpu or compile or small or engine == EXTERNAL)
    products: Products = Whole()
    if not batched and cpu and engine != "standard" and rows * cols >= _STRIPS_NUMEL[held.itemsize < 4]:
        products = Strips()
    elif not cpu and not compile and engine in ("composed", "gram") and short >= _KERNEL_ROWS and available(device):
        products = Kernels()
    one_thread = cpu and not batched and engine != "standard" and short <= _ONE_THREAD_ROWS[held.itemsize < 4]
    return Recipe(engine, formula, begins, held, products, batched, one_thread)


def check_formula(engine: str, coefficients: Coefficients, steps: int | None) -> None:
    """Refuse engines, coefficients and steps that do not go together.

    Raises:
        ValueError: saying what was given and what goes together.
    """
    if engine not in ENGINES:
        raise ValueError(f"ns_engine={engine!r} is unknown; known: {', '.join(ENGINES)}.")
    if _is_rational(coefficients) or (coefficients == "auto" and engine == "rational"):
        if engine not in ("auto", "rational"):
            raise ValueError(
                f"ns_coefficients={coefficients!r} is a rational function and ns_engine={engine!r} runs polynomials: "
                "leave the engine on 'auto'."
            )
        if steps is not None:
            raise ValueError(f"ns_steps={steps} has nothing to act on: a rational function is one step, leave it None.")
        return
    if engine == "rational":
        raise ValueError(
            f"ns_engine='rational' does not run polynomials: take one of {', '.join(RATIONALS)}, a Rational, or "
            "another engine."
        )
    if coefficients == "auto":
        coefficients = "quintic"
    stages = resolve_stages(coefficients, steps)  # type: ignore[arg-type]
    if engine == EXTERNAL and any(len(stage) != 3 for stage in stages):
        raise ValueError(
            f"ns_coefficients={coefficients!r} has stages that are not of three numbers, and ns_engine={engine!r} runs "
            "no others: take 'polar_express', or another engine."
        )


def _is_rational(coefficients: Coefficients) -> bool:
    return isinstance(coefficients, Rational) or (isinstance(coefficients, str) and coefficients in RATIONALS)


def _iterate_dtype(engine: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What iterates are held in where ``dtype`` was asked for."""
    if engine == "standard":
        return dtype
    if engine == "rational":
        return torch.promote_types(dtype, torch.float32)
    if engine == EXTERNAL:
        return torch.float16
    if engine == "gram" and dtype is torch.bfloat16 and device.type == "cuda":
        # iterates lie in fp16's range, at its speed and an eighth of the rounding (Dao-AILab/gram-newton-schulz)
        return torch.float16
    return compute_dtype(dtype, device)


def _restarts(
    engine: str,
    coefficients: Coefficients,
    stages: int,
    short: int,
    held: torch.dtype,
    restarts: tuple[int, ...] | None,
) -> tuple[int, ...]:
    if engine not in ("gram", EXTERNAL):
        return tuple(range(stages))
    if restarts is not None:
        ascending = restarts == tuple(sorted(set(restarts)))
        if not restarts or restarts[0] != 0 or restarts[-1] >= stages or not ascending:
            raise ValueError(f"restarts={restarts}: give ascending numbers of stages from 0 to {stages - 1}, 0 first.")
        return restarts
    if held is torch.bfloat16 and short < _LINKED_ROWS:
        return tuple(range(stages))
    table = TABLES[coefficients] if isinstance(coefficients, str) else None
    if table is not None and table.restarts is not None:
        return table.restarts
    return default_restarts(stages, held)
