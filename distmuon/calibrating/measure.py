"""How long each engine takes: every case once a round, and of all rounds the fastest.

Others on the machine only ever add time, and what they add comes in bursts of seconds; so the rounds go over all
shapes and engines in turn, and a burst costs each case one sample instead of one case all of its samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmuon.calibrating.devices import wait
from distmuon.calibrating.shapes import Shape
from distmuon.numerics.orthogonalize import orthogonalize_
from distmuon.numerics.recipe import Recipe, Request, choose

# Matrices of a stack where a recipe takes several at a time: in batches, or each on a thread of its own
_STACK = 8
# An accelerator is filled by fewer of the large ones
_STACK_NUMEL = 1 << 26
# What is faster than this is run again within its round
_SHORTEST_S = 0.03


@dataclass(frozen=True)
class Timing:
    """Time of one engine on one shape.

    Attributes:
        engine: Its name.
        rows: Of a matrix.
        cols: Of a matrix.
        big: Products of its recipe, ``s x s`` by ``s x l``.
        small: Products of its recipe, ``s x s`` by ``s x s``.
        batched: Whether its recipe multiplies matrices in batches.
        seconds: The fastest round's, for one matrix.
        spread: How much longer the median round took, as a fraction of ``seconds``.
    """

    engine: str
    rows: int
    cols: int
    big: int
    small: int
    batched: bool
    seconds: float
    spread: float

    @property
    def shape(self) -> Shape:
        """Rows and columns."""
        return self.rows, self.cols


@dataclass
class _Case:
    engine: str
    shape: Shape
    recipe: Recipe
    source: Tensor
    samples: list[float]

    def work(self) -> int:
        short, long = sorted(self.shape)
        return short**2 * (self.recipe.big * long + self.recipe.small * short)


def measure(
    shapes: Sequence[Shape],
    engines: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 7,
    limit_s: float = 60.0,
    longest_s: float = 3.0,
    say: Callable[[str], object] = print,
    agree: Callable[[float], float] = float,
) -> list[Timing]:
    """Time engines on shapes, with the threads that torch uses now.

    A matrix is timed as the optimizer runs it: it lies in ``dtype``, and the engine's own coefficients and dtype of
    iterates are those of :func:`distmuon.numerics.recipe.choose`. Matrices that it takes several of at a time (in
    float32 on a CPU those with short sides up to 384, on an accelerator all) are timed in stacks of 8 (fewer where
    these have over 2^26 entries), whose time is divided by their number.

    Args:
        shapes: Rows and columns.
        engines: Names; see :data:`distmuon.numerics.recipe.ENGINES`.
        device: Where.
        dtype: What matrices are rounded to.
        rounds: Samples of each case, after a first that does not count.
        limit_s: No round is begun that would, by the time of the slowest so far, end later than this many seconds after
            the start; one always is.
        longest_s: A case that would take more seconds than this, going by smaller ones, is left out.
        say: Called with a line for each case that is left out.
        agree: The largest number of all ranks that measure at the same time, once all are here; each case then has
            all of them busy.

    Returns:
        One timing for each case that was not left out, engine by engine in the order of ``shapes``.
    """
    started = time.perf_counter()
    cases = [case for engine in engines for case in _warm(engine, shapes, device, dtype, longest_s, say, agree)]
    order = {shape: number for number, shape in enumerate(shapes)}
    # engine after engine on each shape, so that a burst of others' work does not hit one engine alone
    cases.sort(key=lambda case: order[case.shape])
    slowest = 0.0
    for attempt in range(rounds):
        begun = time.perf_counter()
        if attempt and agree(begun - started + slowest) > limit_s:
            break
        for case in cases:
            agree(0.0)
            case.samples.append(_sample(case, device, dtype))
        slowest = max(slowest, time.perf_counter() - begun)
    cases.sort(key=lambda case: (engines.index(case.engine), order[case.shape]))
    return [_timing(case) for case in cases]


def _warm(
    engine: str,
    shapes: Sequence[Shape],
    device: torch.device,
    dtype: torch.dtype,
    longest_s: float,
    say: Callable[[str], object],
    agree: Callable[[float], float],
) -> list[_Case]:
    """Cases of an engine, smallest first, each run once; those that would take too long are told and left out."""
    candidates = [_case(engine, shape, device, dtype) for shape in shapes]
    cases: list[_Case] = []
    rate = 0.0
    for case in sorted(candidates, key=_Case.work):
        rows, cols = case.shape
        predicted = rate * case.work() * len(case.source)
        if predicted > longest_s:
            say(f"left out: {engine} on {rows} x {cols} would take about {predicted:.0f} s.")
            continue
        seen = agree(_once(case, device, dtype)) / (case.work() * len(case.source))
        # the best rate so far: that of a larger matrix is no worse, unless somebody disturbed it
        rate = min(seen, rate or seen)
        cases.append(case)
    return cases


def _case(engine: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> _Case:
    recipe = choose(*shape, device, Request(dtype, engine))
    stack = _STACK if recipe.batched or recipe.one_thread else 1
    stack = min(stack, max(1, _STACK_NUMEL // (shape[0] * shape[1])))
    draw = torch.Generator().manual_seed(0)
    source = torch.randn(stack, *shape, generator=draw).to(device, dtype)
    return _Case(engine, shape, recipe, source, [])


def _sample(case: _Case, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a run; the fastest of several if it is short."""
    fastest = spent = _once(case, device, dtype)
    while spent < _SHORTEST_S:
        seconds = _once(case, device, dtype)
        fastest, spent = min(fastest, seconds), spent + seconds
    return fastest / len(case.source)


def _once(case: _Case, device: torch.device, dtype: torch.dtype) -> float:
    matrices = case.source.clone()
    wait(device)
    start = time.perf_counter()
    orthogonalize_(matrices, case.recipe, eps=0.0, dtype=dtype)
    wait(device)
    return time.perf_counter() - start


def _timing(case: _Case) -> Timing:
    fastest = min(case.samples)
    spread = statistics.median(case.samples) / fastest - 1.0
    recipe = case.recipe
    return Timing(case.engine, *case.shape, recipe.big, recipe.small, recipe.batched, fastest, spread)
