"""Is every engine as near to the polar factor as torch.optim.Muon's function? A table with pass or fail.

    python benchmarks/accuracy.py                                      # families of random matrices
    python benchmarks/accuracy.py --momenta runs/momenta.safetensors   # and momenta that benchmarks/momenta.py saved

On directions with a singular value of at least 1e-3 of the Frobenius norm, with ``Y`` the result for ``X = U S V^T``:

    error ||U^T Y V - I||_F / sqrt(k)   at most 0.005 above that of torch's function on the same matrix
    off   its off-diagonal part         at most 0.06
    low   smallest diag(U^T Y V)        at least that of torch's function less 0.02
    high  largest                       at most 1.22

A row holds the worst of its matrices for each measure. Beside that, for every engine: the result for a matrix changes
by no more than a rounding of bfloat16 (2^-8 of its norm) at scales by powers of two from 2^-100 to 2^100 (8e-31 to
1e30); and random ill-conditioned matrices at scales of 1e-30 to 1e30, on which every result must be finite with no
singular value over 1.22. ``standard`` has torch's own range by design, so scales are not asked of it, and its draws lie
between 1e-18 and 1e18.

Rows named ``in bfloat16`` and ``in float16`` hold iterates as devices with units for such products do; where those are
emulated, matrices whose result would take more than ``--limit`` seconds are left out of them, and there torch's
function is stood in for by its operations in float32 (counted in the last column).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matrix_families import FAMILIES, Closeness, Directions, gauss, ill_conditioned, load_momenta, log_spaced
from orthogonalize_contenders import (
    ENGINES,
    Part,
    engine_function,
    float32_function,
    held_function,
    parse_work,
    torch_function,
)
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distmuon.numerics.hardware import has_native_bf16

ERROR_OVER_TORCH, OFF, LOW_UNDER_TORCH, HIGH = 0.005, 0.06, 0.02, 1.22
OVER_SCALES, LARGEST_OF_DRAWS = 2.0**-8, HIGH
SHAPES = ("64x64", "64x256", "256x64", "128x128", "128x512", "256x256", "512x512", "512x1536")
# FLOPs a second of emulated 16-bit products: about what AVX2 machines were seen to do
_EMULATED = 1e9


@dataclass(frozen=True)
class Contender:
    """A way to orthogonalize ``(..., m, n)``; ``emulated`` where its products have no units here."""

    name: str
    run: Callable[[Tensor], Tensor]
    emulated: bool
    any_scale: bool = True


@dataclass(frozen=True)
class Row:
    """The worst of one engine on one family.

    Attributes:
        engine: Name of the contender.
        family: Name of the family or file.
        matrices: How many there were.
        error: Largest ``error``.
        over_torch: Largest ``error`` less that of torch's function on the same matrix.
        off: Largest.
        low: Smallest.
        under_torch: Largest of torch's ``low`` less ours.
        high: Largest.
        finite: Whether all results were.
        stood_in: For how many matrices torch's function was stood in for by its operations in float32.
    """

    engine: str
    family: str
    matrices: int
    error: float
    over_torch: float
    off: float
    low: float
    under_torch: float
    high: float
    finite: bool
    stood_in: int

    @property
    def passed(self) -> bool:
        """Whether all bars hold; NaN fails."""
        return (
            self.finite
            and self.over_torch <= ERROR_OVER_TORCH
            and self.off <= OFF
            and self.low > 0.0
            and self.under_torch <= LOW_UNDER_TORCH
            and self.high <= HIGH
        )


@dataclass(frozen=True)
class Robustness:
    """Scales and draws of one engine.

    Attributes:
        engine: Name of the contender.
        scales: How far results at other scales are from that at scale 1, relative; None where nothing is promised.
        draws: Random ill-conditioned matrices.
        finite: Whether all their results were.
        largest: Largest singular value of the finite ones.
    """

    engine: str
    scales: float | None
    draws: int
    finite: bool
    largest: float

    @property
    def passed(self) -> bool:
        """Whether nothing failed; NaN fails."""
        return (self.scales is None or self.scales <= OVER_SCALES) and self.finite and self.largest <= LARGEST_OF_DRAWS


def contenders(device: torch.device) -> list[Contender]:
    """Every engine as it runs on the device, and on a CPU those that hold iterates in 16 bits elsewhere."""
    native = has_native_bf16(device.type)
    found = [
        Contender(
            engine,
            functools.partial(engine_function, engine),
            emulated=engine == "standard" and not native,
            any_scale=engine != "standard",
        )
        for engine in ENGINES
    ]
    if device.type == "cpu":
        held = [("composed", torch.bfloat16), ("gram", torch.bfloat16), ("gram", torch.float16)]
        for engine, dtype in held:
            if not (native and dtype is torch.bfloat16):
                name = f"{engine} in {str(dtype).removeprefix('torch.')}"
                found.append(Contender(name, functools.partial(held_function, engine, dtype), emulated=True))
    return found


def measure(families: Mapping[str, Sequence[Tensor]], contenders: Sequence[Contender], *, limit_s: float) -> list[Row]:
    """One row a contender and family; contenders without a matrix within the limit have none."""
    rows = []
    for family, matrices in families.items():
        measured: dict[str, list[tuple[Closeness, bool]]] = {contender.name: [] for contender in contenders}
        references: dict[str, list[tuple[Closeness, bool]]] = {contender.name: [] for contender in contenders}
        for x in matrices:
            directions = Directions(x)
            slow = not has_native_bf16(x.device.type) and _emulated_s(x) > limit_s
            reference = directions.closeness(float32_function(x) if slow else torch_function(x.clone()))
            for contender in contenders:
                if contender.emulated and _emulated_s(x) > limit_s:
                    continue
                y = contender.run(x)
                measured[contender.name].append((directions.closeness(y), bool(torch.isfinite(y).all())))
                references[contender.name].append((reference, slow))
        rows += [_row(name, family, found, references[name]) for name, found in measured.items() if found]
    return rows


def _row(
    name: str,
    family: str,
    found: Sequence[tuple[Closeness, bool]],
    references: Sequence[tuple[Closeness, bool]],
) -> Row:
    pairs = [(ours, theirs) for (ours, _), (theirs, _) in zip(found, references, strict=True)]
    return Row(
        engine=name,
        family=family,
        matrices=len(pairs),
        error=_largest(ours.error for ours, _ in pairs),
        over_torch=_largest(ours.error - theirs.error for ours, theirs in pairs),
        off=_largest(ours.off for ours, _ in pairs),
        low=-_largest(-ours.low for ours, _ in pairs),
        under_torch=_largest(theirs.low - ours.low for ours, theirs in pairs),
        high=_largest(ours.high for ours, _ in pairs),
        finite=all(finite for _, finite in found),
        stood_in=sum(slow for _, slow in references),
    )


def _largest(values: object) -> float:
    """The maximum, NaN if one is NaN."""
    listed = list(values)  # type: ignore[call-overload]
    return math.nan if any(math.isnan(value) for value in listed) else max(listed)


def _emulated_s(x: Tensor) -> float:
    return Part(1, *x.shape[-2:]).standard_flops / _EMULATED


def robustness(contender: Contender, *, draws: int, device: torch.device) -> Robustness:
    """Run a contender over scales and over random ill-conditioned matrices."""
    generator = torch.Generator().manual_seed(2)
    finite, largest, count = True, 0.0, 0
    for stack in ill_conditioned(draws, generator, decades=30.0 if contender.any_scale else 18.0):
        y = contender.run(stack.to(device))
        count += len(y)
        if torch.isfinite(y).all():
            largest = max(largest, torch.linalg.matrix_norm(y.double(), 2).max().item())
        else:
            finite = False
    scales = _over_scales(contender, device) if contender.any_scale else None
    return Robustness(contender.name, scales, count, finite, largest)


def _over_scales(contender: Contender, device: torch.device) -> float:
    worst = 0.0
    for family in (gauss, log_spaced):
        x = family(48, 96, torch.Generator().manual_seed(3)).to(device)
        # below, float32 would round the smallest entries of a scaled matrix as subnormal numbers
        x = torch.where(x.abs() < 2.0**-20 * x.abs().amax(), torch.zeros_like(x), x)
        plain = contender.run(x).double()
        for exponent in range(-100, 101, 20):
            moved = contender.run(x * 2.0**exponent).double()
            worst = _largest([worst, ((moved - plain).norm() / plain.norm()).item()])
    return worst


def accuracy_table(rows: Sequence[Row]) -> Table:
    """The rows, failed measures marked."""
    table = Table(title="Worst of each family", box=box.SIMPLE, padding=(0, 1), title_justify="left")
    table.add_column("engine", no_wrap=True)
    table.add_column("matrices", no_wrap=True)
    for column in ("number", "error", "over\ntorch", "off", "low", "under\ntorch", "high", "", "float32\nreferences"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(
            row.engine,
            row.family,
            str(row.matrices),
            f"{row.error:.3f}",
            _marked(f"{row.over_torch:+.3f}", row.over_torch <= ERROR_OVER_TORCH),
            _marked(f"{row.off:.3f}", row.off <= OFF),
            _marked(f"{row.low:.3f}", row.low > 0),
            _marked(f"{row.under_torch:+.3f}", row.under_torch <= LOW_UNDER_TORCH),
            _marked(f"{row.high:.3f}", row.high <= HIGH),
            "pass" if row.passed else "FAIL",
            str(row.stood_in or ""),
            end_section=index + 1 < len(rows) and rows[index + 1].family != row.family,
        )
    return table


def robustness_table(found: Sequence[Robustness]) -> Table:
    """One row an engine."""
    table = Table(title="Scales and draws", box=box.SIMPLE, padding=(0, 1), title_justify="left")
    table.add_column("engine", no_wrap=True)
    for column in ("change over\nscales", "draws", "finite", "largest\nsingular value", ""):
        table.add_column(column, justify="right")
    for row in found:
        scales = "not asked" if row.scales is None else f"{row.scales:.1e}"
        finite = "all" if row.finite else "NO"
        verdict = "pass" if row.passed else "FAIL"
        table.add_row(row.engine, scales, f"{row.draws:,}", finite, f"{row.largest:.3f}", verdict)
    return table


def _marked(text: str, passed: bool) -> str:
    return text if passed else f"{text} !"


def main() -> int:
    """Parse the command line, measure and print; the exit status is 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--momenta", nargs="+", type=pathlib.Path, default=[], help="files of benchmarks/momenta.py")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="ROWSxCOLS of the random families")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--draws", type=int, default=10_000, help="ill-conditioned matrices for each engine")
    parser.add_argument("--engines", nargs="+", help="names of rows, all by default")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds that an emulated result may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here as well")
    args = parser.parse_args()
    device = torch.device(args.device)
    console = Console(highlight=False, width=120)
    native = has_native_bf16(device.type)
    console.print(f"torch {torch.__version__}, {device}, native bfloat16: {native}")
    shapes = [(part.rows, part.cols) for text in args.shapes for part in parse_work(text)]
    families: dict[str, list[Tensor]] = {
        family.__name__: [
            family(rows, cols, torch.Generator().manual_seed(seed)).to(device)
            for rows, cols in shapes
            for seed in args.seeds
        ]
        for family in FAMILIES
    }
    for path in args.momenta:
        families[path.stem] = [matrix.to(device) for matrix in load_momenta(path).values()]
    chosen = contenders(device)
    if args.engines:
        unknown = sorted(set(args.engines) - {contender.name for contender in chosen})
        if unknown:
            parser.error(f"--engines {unknown}: known are {[contender.name for contender in chosen]}")
        chosen = [contender for contender in chosen if contender.name in args.engines]
    rows = measure(families, chosen, limit_s=args.limit)
    console.print(accuracy_table(rows))
    found = [robustness(contender, draws=args.draws, device=device) for contender in chosen]
    console.print(robustness_table(found))
    passed = all(row.passed for row in rows) and all(row.passed for row in found)
    console.print("All bars hold." if passed else "Not all bars hold.")
    if args.json:
        document = {
            "versions": {"torch": torch.__version__},
            "device": str(device),
            "native_bf16": native,
            "rows": [{**dataclasses.asdict(row), "passed": row.passed} for row in rows],
            "robustness": [{**dataclasses.asdict(row), "passed": row.passed} for row in found],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
