"""Which engine, polynomial, dtype and kind of product a matrix gets: by its shape and its device alone.

Never by how many matrices there are, or how many ranks share them: results would change with the world size. (Teams
take the same coefficients: :mod:`distmuon.numerics.teams`.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from distmuon.numerics.coefficients import TABLES, Stage, default_restarts, resolve_stages, with_safety
from distmuon.numerics.costs import CostTable
from distmuon.numerics.hardware import compute_dtype
from distmuon.numerics.kernels import available
from distmuon.numerics.products import Kernels, Products, Strips, Whole
from distmuon.numerics.rationals import RATIONALS, Rational
from distmuon.numerics.tables import table_for

Formula: TypeAlias = "tuple[Stage, ...] | Rational"
Coefficients: TypeAlias = "str | Stage | Sequence[Stage] | Rational"

EXTERNAL = "gram_newton_schulz"
ENGINES = ("auto", "standard", "composed", "gram", "rational", EXTERNAL)
# These run no batches of products of ours that torch.compile could take
NOT_COMPILED = ("standard", "rational", EXTERNAL)
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# What an engine runs when nothing else is asked for
_DEFAULTS = {"standard": "quintic", "composed": "nested14", "gram": "nested14", "rational": "rational2"}
_DEFAULTS[EXTERNAL] = "polar_express"

# Below, measured on CPUs (docs/orthogonalization.md). Rows up to which matrices are multiplied in batches, and rows up
# to which each has one thread: more would wait for each other. bfloat16 products up to 1024 rows have one anyway.
_BATCHED_ROWS = 64
_ONE_THREAD_ROWS = 384
_ONE_THREAD_ROWS_16_BIT = 1024
# bfloat16 units are so fast that strips pay for large matrices alone
_STRIPS_NUMEL = {False: 1, True: 2048 * 8192}
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
        rates = table.rates(self.engine)
        return rates.seconds(rows, cols, big=self.big, small=self.small, batched=self.batched)


@dataclass(frozen=True)
class Request:
    """What was asked for, of matrices of any shape.

    Attributes:
        dtype: What they are rounded to.
        engine: One of :data:`ENGINES`; ``"auto"`` takes the fastest of the cost table with its own coefficients, and
            ``"composed"`` or ``"rational"`` with given ones.
        coefficients: ``"auto"``, a name, stages, or a :class:`Rational`.
        steps: Number of stages; with ``coefficients="auto"``, of the quintic.
        safety: Stages are evaluated at ``X / safety``; None: as in the table.
        restarts: Of the Gram form; None: of the table, else
            :func:`distmuon.numerics.coefficients.default_restarts`.
        compile: Whether the iteration goes through :func:`torch.compile`, which batches suit, or in which mode.

    Raises:
        ValueError: for engines, coefficients and steps that do not go together; says what does.
    """

    dtype: torch.dtype
    engine: str = "auto"
    coefficients: Coefficients = "auto"
    steps: int | None = None
    safety: float | None = None
    restarts: tuple[int, ...] | None = None
    compile: bool | str = False

    def __post_init__(self) -> None:
        if not isinstance(self.coefficients, str | Rational):
            if not isinstance(self.coefficients, Sequence):
                raise ValueError(f"ns_coefficients={self.coefficients!r}: 'auto', a name, stages, or a Rational.")
            given = tuple(tuple(c) if isinstance(c, Sequence) else c for c in self.coefficients)
            object.__setattr__(self, "coefficients", given)
        _check(self)

    @property
    def rational(self) -> Rational | None:
        """The rational function that was asked for by name or by value."""
        if isinstance(self.coefficients, str):
            return RATIONALS.get(self.coefficients)
        return self.coefficients if isinstance(self.coefficients, Rational) else None


@functools.lru_cache(maxsize=4096)
def choose(rows: int, cols: int, device: torch.device, request: Request, table: CostTable | None = None) -> Recipe:
    """The recipe of ``rows x cols`` matrices.

    Args:
        rows: Of a matrix.
        cols: Of a matrix.
        device: Where it lies.
        request: What was asked for.
        table: Speed of the engines; None: the built-in one of the device.

    Raises:
        ValueError: for restarts that are not ascending from 0.
    """
    if request.engine != "auto":
        return _recipe(rows, cols, device, request, request.engine)
    if request.rational is not None:
        return _recipe(rows, cols, device, request, "rational")
    if request.coefficients != "auto" or request.steps is not None:
        return _recipe(rows, cols, device, request, "composed")
    table = table or table_for(device, request.dtype)
    known = {name for name, _ in table.engines} & {"gram", "rational"}
    if request.compile or device.type != "cpu":
        known -= {"rational"}  # nothing in it to compile, and a GPU would wait for the host
    recipes = [_recipe(rows, cols, device, request, name) for name in ("composed", *sorted(known))]
    # a Gram form that begins anew at each stage is the composed iteration
    recipes = [recipe for recipe in recipes if recipe.engine != "gram" or recipe.big < 2 * len(recipe.formula)]  # type: ignore[arg-type]
    return min(recipes, key=lambda recipe: recipe.seconds(rows, cols, table))


def forget() -> None:
    """Drop remembered recipes, which hold for one machine; for tests that pretend to be on another."""
    choose.cache_clear()


def _recipe(rows: int, cols: int, device: torch.device, request: Request, engine: str) -> Recipe:
    short = min(rows, cols)
    cpu, alone = device.type == "cpu", engine == "standard"
    held = _iterate_dtype(engine, request.dtype, device)
    formula, restarts = _formula(request, engine, held)
    small = short <= _BATCHED_ROWS and held.itemsize >= 4
    batched = not alone and (not cpu or bool(request.compile) or small or engine == EXTERNAL)
    products: Products = Whole()
    if cpu and not batched and not alone and rows * cols >= _STRIPS_NUMEL[held.itemsize < 4]:
        products = Strips()
    elif engine in ("composed", "gram") and not cpu and not request.compile and short >= _KERNEL_ROWS:
        products = Kernels() if available(device) else Whole()
    one_thread = cpu and not batched and not alone and _fits_one_thread(short, max(rows, cols), held)
    return Recipe(engine, formula, restarts, held, products, batched, one_thread)


def _fits_one_thread(short: int, long: int, held: torch.dtype) -> bool:
    """Whether a matrix would gain little from a second thread."""
    if held.itemsize < 4:
        return long <= _ONE_THREAD_ROWS_16_BIT
    return short <= _ONE_THREAD_ROWS


def _formula(request: Request, engine: str, held: torch.dtype) -> tuple[Formula, tuple[int, ...]]:
    """What is run, and where the Gram matrix is made anew."""
    coefficients, steps = request.coefficients, request.steps
    if coefficients == "auto":
        coefficients = _DEFAULTS[engine] if steps is None else "quintic"
        if engine == EXTERNAL and steps is None:
            steps = 5  # as that package has it; the table runs to convergence
    rational = RATIONALS.get(coefficients) if isinstance(coefficients, str) else request.rational
    if rational is not None:
        return rational, (0,)
    stages = resolve_stages(coefficients, steps)  # type: ignore[arg-type]
    restarts = _restarts(request, engine, coefficients, len(stages), held)
    return stages if request.safety is None else with_safety(stages, request.safety), restarts


def _check(request: Request) -> None:
    engine, coefficients, steps = request.engine, request.coefficients, request.steps
    if engine not in ENGINES:
        raise ValueError(f"ns_engine={engine!r} is unknown; known: {', '.join(ENGINES)}.")
    if isinstance(request.compile, str) and request.compile not in _MODES:
        raise ValueError(f"compile={request.compile!r} is no mode of torch.compile; known: {', '.join(_MODES)}.")
    if request.restarts is not None and engine not in ("gram", EXTERNAL):
        raise ValueError(f"restarts={request.restarts} acts with engine='gram' alone, and it is {engine!r}: drop one.")
    if request.safety is not None and (request.rational is not None or not 1.0 <= request.safety < 2.0**10):
        raise ValueError(f"safety={request.safety}: a factor of at least 1, for polynomials; leave it None.")
    if request.rational is not None or (coefficients == "auto" and engine == "rational"):
        if engine not in ("auto", "rational"):
            raise ValueError(
                f"ns_coefficients={coefficients!r} is a rational function and ns_engine={engine!r} runs polynomials: "
                "leave ns_engine on 'auto', and do not pass foreach=False."
            )
        if steps is not None:
            raise ValueError(f"ns_steps={steps} has nothing to act on: a rational function is one step, leave it None.")
        return
    if engine == "rational":
        raise ValueError(
            f"ns_engine='rational' does not run polynomials: take one of {', '.join(RATIONALS)}, a Rational, or "
            "another engine."
        )
    stages = resolve_stages("quintic" if coefficients == "auto" else coefficients, steps)  # type: ignore[arg-type]
    if engine == EXTERNAL and any(len(stage) != 3 for stage in stages):
        raise ValueError(
            f"ns_coefficients={coefficients!r} has stages that are not of three numbers, and ns_engine={engine!r} runs "
            "no others: take 'polar_express', or another engine."
        )


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
    request: Request, engine: str, coefficients: Coefficients, stages: int, held: torch.dtype
) -> tuple[int, ...]:
    if engine not in ("gram", EXTERNAL):
        return tuple(range(stages))
    asked = request.restarts
    if asked is not None:
        ascending = asked == tuple(sorted(set(asked)))
        if not asked or asked[0] != 0 or asked[-1] >= stages or not ascending:
            raise ValueError(f"restarts={asked}: give ascending numbers of stages from 0 to {stages - 1}, 0 first.")
        return asked
    if engine == EXTERNAL:
        return (0, 2) if stages > 2 else (0,)
    table = TABLES.get(coefficients) if isinstance(coefficients, str) else None
    if table is not None and table.restarts is not None and held is not torch.bfloat16:
        return table.restarts
    return default_restarts(stages, held)
