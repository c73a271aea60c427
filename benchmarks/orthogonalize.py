"""Times the orthogonalization by each engine, beside torch.optim.Muon's own function; accuracy beside speed.

    python benchmarks/orthogonalize.py --json runs/orthogonalize.json --picture runs/orthogonalize.png
    python benchmarks/orthogonalize.py --shapes 12x768x768 8x768x768+2x3072x768 --momenta runs/momenta.safetensors
    python benchmarks/orthogonalize.py --step                       # the whole step of the optimizers

Rows: ``torch`` is torch.optim.Muon's function, in a loop over the matrices; ``float32`` the same operations in float32,
the honest baseline where bfloat16 products are emulated; then each engine on the stacked matrices, as the optimizer
calls it, and ``auto``, its default. Input is float32 or bfloat16, results are bfloat16 (those of ``float32``, float32).

Milliseconds: median, fastest and slowest of the samples that count. Contenders take turns, A B C A B C, so that a drift
of the machine hits all alike; a sample repeats short work to last 0.2 s. A sample is rejected and taken again if other
processes used more than 6 % of the cores while it ran, which the kernel's counters of busy time tell; ``*`` marks a row
that had no undisturbed sample. Ratios below 1 are faster than the baseline.

Where bfloat16 is emulated and the samples of torch's function would take longer than ``--limit``, it is left out and
its time foretold from its FLOPs, by the rate of a 256 x 256 matrix in the same run. ``~`` marks all that rests on such
a time; it never enters another ratio or mean.

GFLOP/s counts the products of an engine's formula, each whole and with two FLOPs a multiply-add (an inverse by Cholesky
is half of a product): symmetric products made by halves need less, so a rate may go past the peak. The share is that of
a large matrix product (bfloat16 where the device has units for it, else float32) in the same rounds.

Accuracy is on directions with a singular value of at least 1e-3 of the Frobenius norm: ``error ||U^T Y V - I||_F /
sqrt(k)``, its off-diagonal part, and the smallest and largest ``diag(U^T Y V)``. ``gauss``: a Gaussian matrix of the
shape; ``momenta``: those of the file that have the shape (a table of the file's own shapes comes at the end).
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matrix_families import Closeness, Directions, load_momenta
from orthogonalize_contenders import (
    ENGINES,
    FLOAT32,
    TORCH,
    Part,
    auto_engine,
    engine_recipe,
    matrix_product,
    orthogonalizations,
    parse_work,
    result_of,
    steps,
    torch_function,
)
from orthogonalize_report import Result, as_json, draw, geometric_means, make_table, summary, worst
from rich import box
from rich.console import Console
from rich.table import Table
from timing import SHORTEST_JUDGED_S, Judged, interleaved
from torch import Tensor

from distmuon.numerics.hardware import compute_dtype, has_native_bf16

SHAPES = (
    "64x4096",
    "64x256x512",
    "12x768x768",
    "768x3072",
    "3072x768",
    "1024x4096",
    "2048x2048",
    "2048x8192",
    "4096x4096",
    "8192x512",
    "gpt2_pair",
)
_SAMPLE_S = 2 * SHORTEST_JUDGED_S
_REFERENCE = Part(1, 256, 256)
_PRODUCT = "product"
# Matrices of a file that one shape is judged on
_MOST_MOMENTA = 8


class Bench:
    """Measures one piece of work after another under the same settings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.input_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.input]
        self.labels = (TORCH, FLOAT32, *args.engines)
        self.samples, self.limit_s, self.step = args.samples, args.limit, args.step
        self.accuracy_rows = args.accuracy_rows
        self.momenta = {} if args.momenta is None else load_momenta(args.momenta)
        self.emulated = not has_native_bf16(self.device.type)
        # FLOPs a second of emulated products in this run
        self.emulated_rate = self._emulated_rate() if self.emulated else math.inf

    def measure(self, work: str) -> Result:
        """Time a piece of work and judge its accuracy."""
        parts = parse_work(work)
        foretold_s = sum(part.standard_flops for part in parts) / self.emulated_rate
        # one call more to see how long it takes, and one to warm up
        too_long = foretold_s * (self.samples + 2) > self.limit_s
        labels = [label for label in self.labels if not (too_long and label in (TORCH, "standard"))]
        make = steps(parts, labels, device=self.device) if self.step else None
        timings = self._time(
            make or orthogonalizations(parts, labels, device=self.device, input_dtype=self.input_dtype)
        )
        product = timings.pop(_PRODUCT)
        return Result(
            work,
            timings,
            foretold_ms=foretold_s * 1e3 if too_long else None,
            flops={label: self._flops(parts, label) for label in labels},
            peak=matrix_product(self._product_dtype(), self.device)[1] / (product.median * 1e-3),
            chosen={f"{part.rows}x{part.cols}": auto_engine(part, self.device) for part in parts}
            if "auto" in labels
            else {},
            accuracy={} if self.step else self._accuracy(parts, labels),
        )

    def momenta_table(self) -> tuple[Table, dict[str, Any]]:
        """Accuracy on the shapes that the file has."""
        table = Table(title="momenta of the file, worst of each shape", box=box.SIMPLE, title_justify="left")
        for column in ("shape", "engine", "error", "off", "low", "high"):
            table.add_column(column, justify="left" if column in ("shape", "engine") else "right")
        found: dict[str, Any] = {}
        for rows, cols in sorted({(matrix.size(0), matrix.size(1)) for matrix in self.momenta.values()}):
            part = Part(1, rows, cols)
            slow = part.standard_flops / self.emulated_rate > 1.0
            labels = [label for label in self.labels if not (slow and label in (TORCH, "standard"))]
            by_label = self._closeness(self._momenta_of(part), labels)
            found[f"{rows}x{cols}"] = {label: vars(value) for label, value in by_label.items()}
            for label, value in by_label.items():
                numbers = (f"{number:.3f}" for number in (value.error, value.off, value.low, value.high))
                table.add_row(f"{rows} x {cols}", label, *numbers)
        return table, found

    def _time(self, functions: dict[str, Callable[[], object]]) -> dict[str, Judged]:
        product, _ = matrix_product(self._product_dtype(), self.device)
        functions = {**functions, _PRODUCT: product}
        repeats = {label: self._repeats(function) for label, function in functions.items()}
        repeated = {label: _repeated(function, repeats[label]) for label, function in functions.items()}
        timings = interleaved(repeated, samples=self.samples, limit_s=self.limit_s, device=self.device)
        return {label: _divided(timing, repeats[label]) for label, timing in timings.items()}

    def _repeats(self, function: Callable[[], object]) -> int:
        seconds = math.inf
        for _ in range(3):
            started = time.perf_counter()
            function()
            if self.device.type != "cpu":
                torch.get_device_module(self.device).synchronize()
            seconds = min(seconds, time.perf_counter() - started)
            if seconds >= _SAMPLE_S:
                break
        return max(1, math.ceil(_SAMPLE_S / seconds))

    def _product_dtype(self) -> torch.dtype:
        return compute_dtype(torch.bfloat16, self.device)

    def _emulated_rate(self) -> float:
        x = torch.randn(_REFERENCE.rows, _REFERENCE.cols, device=self.device)
        timing = interleaved({TORCH: lambda: torch_function(x)}, samples=3, limit_s=self.limit_s, device=self.device)
        return _REFERENCE.standard_flops / (timing[TORCH].median * 1e-3)

    def _flops(self, parts: Sequence[Part], label: str) -> float:
        if label in (TORCH, FLOAT32):
            return float(sum(part.standard_flops for part in parts))
        return sum(part.flops(engine_recipe(label, part, self.device)) for part in parts)

    def _accuracy(self, parts: Sequence[Part], labels: Sequence[str]) -> dict[str, dict[str, Closeness]]:
        small = [part for part in parts if min(part.rows, part.cols) <= self.accuracy_rows]
        generator = torch.Generator(self.device).manual_seed(0)
        kinds = {
            "gauss": [torch.randn(p.rows, p.cols, device=self.device, generator=generator) for p in small],
            "momenta": [matrix for part in small for matrix in self._momenta_of(part)],
        }
        return {kind: self._closeness(matrices, labels) for kind, matrices in kinds.items() if matrices}

    def _momenta_of(self, part: Part) -> list[Tensor]:
        found = [matrix for matrix in self.momenta.values() if matrix.shape == (part.rows, part.cols)]
        # spread over the file, which is in the order of its names
        return [matrix.to(self.device) for matrix in found[:: -(-len(found) // _MOST_MOMENTA) or 1]]

    def _closeness(self, matrices: Sequence[Tensor], labels: Sequence[str]) -> dict[str, Closeness]:
        found: dict[str, list[Closeness]] = {label: [] for label in labels}
        for x in matrices:
            directions = Directions(x)
            for label in labels:
                found[label].append(directions.closeness(result_of(label, x)))
        return {label: worst(values) for label, values in found.items()}


def _repeated(function: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            function()

    return run


def _divided(timing: Judged, times: int) -> Judged:
    return Judged(
        timing.median / times,
        timing.fastest / times,
        timing.slowest / times,
        timing.samples,
        timing.rejected,
        timing.quiet,
    )


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="[COUNTx]ROWSxCOLS, several with +, or gpt2_pair")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--input", default="float32", choices=("float32", "bfloat16"), help="dtype of the matrices")
    parser.add_argument("--samples", type=int, default=7, help="that count, of each contender")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds; see above, and no new rounds after")
    parser.add_argument("--accuracy-rows", type=int, default=1024, help="longest short side with an SVD")
    parser.add_argument("--momenta", type=pathlib.Path, help="file of benchmarks/momenta.py")
    parser.add_argument("--step", action="store_true", help="time the whole step of the optimizers")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here as well")
    parser.add_argument("--picture", type=pathlib.Path, help="draw the ratios here")
    args = parser.parse_args()
    console = Console(highlight=False, width=150)
    bench = Bench(args)
    what = "optimizer steps" if args.step else f"orthogonalization, {args.input} to bfloat16"
    threads = torch.get_num_threads()
    header = f"{what}; torch {torch.__version__}, {bench.device}, {threads} threads"
    console.print(f"{header}, native bfloat16: {not bench.emulated}")
    console.print(
        f"Median of {args.samples} samples taken in turn. A sample during which other processes used more than 6 % of "
        "the cores is rejected and taken again; *: no sample was undisturbed."
    )
    if bench.emulated:
        console.print(
            f"bfloat16 is emulated here, {bench.emulated_rate / 1e9:.2f} GFLOP/s: ~ marks what rests on foretold times "
            "of torch's function."
        )
    results = []
    for work in args.shapes:
        results.append(bench.measure(work))
        console.print(make_table(results[-1]))
    for line in summary(results):
        console.print(line, soft_wrap=True)
    of_file: dict[str, Any] = {}
    if bench.momenta and not args.step:
        table, of_file = bench.momenta_table()
        console.print(table)
    if args.json:
        document = {
            "what": what,
            "versions": {"torch": torch.__version__},
            "device": str(bench.device),
            "threads": threads,
            "native_bf16": not bench.emulated,
            "emulated_gflops": bench.emulated_rate / 1e9 if bench.emulated else None,
            "results": as_json(results),
            "geometric_means": {
                base: {label: {"mean": mean, "shapes": count} for label, (mean, count) in means.items()}
                for base, means in geometric_means(results).items()
            },
            "momenta": of_file,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.picture:
        draw(results, args.picture, header)


if __name__ == "__main__":
    main()
