"""The optimizer step on one shape at a time, beside torch.optim.Muon, interleaved.

Columns are milliseconds (median, and fastest to slowest of the kept samples) and the ratio to the first column.
Accuracy is the distance to the float64 polar factor, ``||U^T Y V - I||_F / sqrt(k)``, on Gaussian matrices.

    python benchmarks/orthogonalize.py                  # shapes that fit the time limit
    python benchmarks/orthogonalize.py --shapes 12x768x768 768x3072 --device cuda
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from timing import Timing, interleaved
from torch import Tensor, nn

import distmuon
from distmuon.numerics.hardware import has_native_bf16
from distmuon.numerics.polar import polar_factor

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
)
# Multiply-adds a second below which a device is taken to be when torch.optim.Muon's time is foretold
_EMULATED_BF16 = 1.5e9


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="COUNTxROWSxCOLS or ROWSxCOLS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a shape may take")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here as well")
    args = parser.parse_args()
    device = torch.device(args.device)
    native = has_native_bf16(device.type)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, native bfloat16: {native}")
    rows = [_measure(shape, device, args.samples, args.limit) for shape in args.shapes]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1))


def _measure(text: str, device: torch.device, samples: int, limit: float) -> dict[str, Any]:
    *counts, rows, cols = (int(part) for part in text.split("x"))
    count = counts[0] if counts else 1
    short, long = sorted((rows, cols))
    products = count * 5 * (2 * short**2 * long + short**3)
    emulated = not has_native_bf16(device.type)
    too_long = emulated and products / _EMULATED_BF16 > limit / 3
    functions = {
        label: _step(build, count, rows, cols, device)
        for label, build in _OPTIMIZERS.items()
        if not (too_long and label in ("torch", "exact"))
    }
    timings = interleaved(functions, samples=samples, limit_s=limit, device=device)
    base = timings["torch"].median if "torch" in timings else None
    print(f"\n{text}")
    if too_long:
        foretold = products / _EMULATED_BF16
        print(f"  torch     left out: bfloat16 is emulated here, a step would take about {foretold:,.0f} s")
    errors = _errors(rows, cols, device)
    for label, timing in timings.items():
        ratio = f"{timing.median / base:6.3f} of torch" if base else ""
        error = f"error {errors[label]:.3f}" if label in errors else ""
        print(f"  {label:<9} {_describe(timing)} {ratio}  {error}")
    return {
        "shape": text,
        "timings": {label: vars(timing) for label, timing in timings.items()},
        "ratios": {label: timing.median / base for label, timing in timings.items()} if base else {},
        "errors": errors,
    }


def _describe(timing: Timing) -> str:
    spread = f"({timing.fastest:.1f} to {timing.slowest:.1f}, {timing.samples} samples)"
    return f"{timing.median:10.2f} ms {spread:<36}"


def _step(
    build: Callable[[list[Tensor]], torch.optim.Optimizer], count: int, rows: int, cols: int, device: torch.device
) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for _ in range(count):
        param = nn.Parameter(torch.randn(rows, cols, device=device, generator=generator))
        param.grad = torch.randn(rows, cols, device=device, generator=generator)
        params.append(param)
    return build(list(params)).step


def _float32_loop(params: list[Tensor]) -> torch.optim.Optimizer:
    return distmuon.Muon([{"params": params, "use_muon": True}], ns_dtype=torch.float32, foreach=False)


_OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "torch": lambda params: torch.optim.Muon(params),
    "exact": lambda params: distmuon.Muon([{"params": params, "use_muon": True}], foreach=False),
    "default": lambda params: distmuon.Muon([{"params": params, "use_muon": True}]),
    "nested14": lambda params: distmuon.Muon(
        [{"params": params, "use_muon": True}], ns_coefficients="nested14", ns_steps=4
    ),
    "f32 loop": _float32_loop,
}


def _errors(rows: int, cols: int, device: torch.device) -> dict[str, float]:
    """Distance to the polar factor where a float64 SVD takes no more than seconds."""
    if min(rows, cols) > 1024:
        return {}
    x = torch.randn(rows, cols, device=device, generator=torch.Generator(device).manual_seed(0))
    polar = polar_factor(x)
    errors = {}
    for label, coefficients in (("default", "quintic"), ("nested14", "nested14")):
        y = distmuon.orthogonalize(x, coefficients=coefficients, dtype=torch.bfloat16).double()
        errors[label] = ((y - polar).norm() / min(rows, cols) ** 0.5).item()
    return errors


if __name__ == "__main__":
    main()
