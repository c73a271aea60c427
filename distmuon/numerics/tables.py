"""Built-in cost tables by kind of device: what ``engine="auto"`` goes by until ``distmuon calibrate`` was run.

One is measured, the others are estimates, and each says so in its ``source``. They decide which engine a shape gets,
where a factor of 1.2 in all rates of a device changes nothing; for predictions of a step's time, calibrate.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from distmuon.numerics.costs import CostTable, Rates
from distmuon.numerics.hardware import device_class
from distmuon.speeds import Link, Speeds

# Of dense products in the half precisions, and of memory (bytes/s), from NVIDIA's data sheets of the SXM versions
_PEAKS = {
    "cuda-sm80": ("A100", 312e12, 2.0e12),
    "cuda-sm90": ("H100", 989e12, 3.35e12),
    "cuda-sm100": ("B200", 2250e12, 8.0e12),
}
# Assumed: of the peak, what large products reach; of the time of a whole product, what a symmetric one takes (H800,
# flash-muon's README: 0.62 to 0.64 from 4096 rows on); launches of 5 us, shared by a stack of 8
_OF_PEAK = 0.65
_SYMMETRIC = 0.62
_LAUNCH_S = 5e-6 / 8


def table_for(device: torch.device, dtype: torch.dtype) -> CostTable:
    """The built-in table of a device whose products are of ``dtype``: bfloat16 units do nothing for float32."""
    if device.type == "cpu" and dtype.itemsize >= 4:
        return builtin_table("cpu-float32")
    return builtin_table(device_class(device))


def builtin_table(device: str) -> CostTable:
    """The table of a class of devices; that of the nearest kind where it has none.

    Args:
        device: See :func:`distmuon.numerics.hardware.device_class`.
    """
    return _TABLES[_nearest(device)]


def _gpu(device: str) -> CostTable:
    name, flops, bandwidth = _PEAKS[device]
    whole = 2 / (_OF_PEAK * flops)
    # half of the big products are Gram matrices, and all small ones are symmetric
    big, small = whole * (1 + _SYMMETRIC) / 2, whole * _SYMMETRIC

    def rates(segments: int, smalls: int) -> Rates:
        # normalization moves about 40 bytes of an entry, a segment reads X twice, adds it and writes it, and a small
        # product reads two squares, adds one and writes one, 2 bytes each
        entries, square = (40 + 8 * segments) / bandwidth, 8 * smalls / bandwidth
        return Rates((2 * segments + smalls) * _LAUNCH_S, big, small, entries, square)

    source = f"estimate from the peaks of {name}: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:g} TB/s"
    return CostTable(device, source, (("composed", rates(4, 6)), ("gram", rates(2, 12))))


# By distmuon calibrate: on shapes held out, the median error is 6, 4 and 4 %, the worst 16, 14 and 12 %
_FLOAT32 = CostTable(
    "cpu-float32",
    "measured on 2 cores of an AMD EPYC with AVX2 (float32 188 GFLOP/s), 2 threads, torch 2.13",
    (
        ("rational", Rates(6.23e-4, 1.02e-11, 1.20e-11, entries=2.07e-9, square=1.28e-8, batched=5.18e-5)),
        ("composed", Rates(8.07e-4, 1.01e-11, 7.02e-12, entries=3.01e-9, square=7.37e-9, batched=3.22e-5)),
        ("gram", Rates(9.52e-4, 1.03e-11, 7.97e-12, entries=1.11e-9, square=1.12e-8, batched=3.30e-5)),
    ),
)


def _rational(speed: float) -> Rates:
    """Of a CPU that has ``speed`` times the float32 speed of the measured one."""
    rates = asdict(_FLOAT32.rates("rational"))
    return Rates(**{term: seconds / speed for term, seconds in rates.items()})


# Two cores with AMX, each with one thread and a matrix of its own: fits to 45 shapes of 64 to 2048 rows (composed:
# worst error 10 %) of a prototype with these stages, in ms of 2 s^2 l and 2 s^3 (1e9), s l and s^2 (1e6) on one thread:
# composed .40 + 5.82, 5.95, 3.94; gram .48 + 2.66, 11.84, 2.60, 2.35. Here by product, and halved for two cores.
_AMX = CostTable(
    "cpu-amx",
    "estimate from a prototype on 2 cores with AMX (bfloat16 2.5 TFLOP/s, float32 375 GFLOP/s)",
    (
        ("composed", Rates(2.0e-4, big=5.82e-12 / 8, small=5.95e-12 / 6, entries=1.97e-9)),
        ("gram", Rates(2.4e-4, big=2.66e-12 / 4, small=11.84e-12 / 12, entries=1.30e-9, square=1.18e-9)),
        ("rational", _rational(375 / 188)),
    ),
)
# Products alone are faster with AMX than with AVX512
_BF16 = CostTable(
    "cpu-bf16",
    "estimate for 2 cores with AVX512-BF16 (bfloat16 440 GFLOP/s, float32 210 GFLOP/s)",
    (
        ("composed", Rates(2.0e-4, big=2 / 440e9, small=2 / 440e9, entries=1.97e-9)),
        ("gram", Rates(2.4e-4, big=2 / 440e9, small=2 / 440e9, entries=1.30e-9, square=1.18e-9)),
        ("rational", _rational(210 / 188)),
    ),
)
_TABLES = {table.device: table for table in (_FLOAT32, _AMX, _BF16, *map(_gpu, _PEAKS))}


def builtin_speeds(device: str) -> Speeds:
    """Estimates of links and memory for a class of devices; those of the nearest kind where it has none.

    Of GPUs: NVLink as nodes of eight have it, and one adapter a GPU between nodes.

    Args:
        device: See :func:`distmuon.numerics.hardware.device_class`.
    """
    nearest = _nearest(device)
    return _CPU_SPEEDS if nearest.startswith("cpu") else _GPU_SPEEDS[nearest]


def _nearest(device: str) -> str:
    """The class with a built-in table that is most like ``device``."""
    if device in _TABLES:
        return device
    if device.startswith("cpu"):
        return "cpu-float32"
    if not device.startswith("cuda-sm"):
        return "cuda-sm90"
    # 9x and 10x are of data centers; older ones, and workstation parts of any generation, are no faster than an A100
    return {"9": "cuda-sm90", "10": "cuda-sm100"}.get(device.removeprefix("cuda-sm")[:-1], "cuda-sm80")


# By distmuon calibrate --ranks 2 --threads 1 where _FLOAT32 was measured, links by gloo between 2 ranks, rounded (runs
# differ by a third); between machines a guess, of Ethernet of 1 Gbit/s, and of a bucket one too: what a matrix takes
# on its own beside its products, and a start of each exchange
_CPU_SPEEDS = Speeds(
    local=Link(2.4e-4, exchange=8e-10, reduce=6e-10, gather=1.1e-9, reduce_extra=6e-4, gather_extra=3e-4),
    remote=Link.of(gigabytes=0.125, latency=5e-4),
    blend=1.4e-9,
    copy=3.3e-10,
    apply=1e-9,
    bucket=1e-3,
)
# GB/s of a GPU each way. Inside a node NVLink of generations 3, 4, 5 (NVIDIA: 600, 900, 1800 GB/s, of both ways), of
# which collectives are taken to reach 8/9; between nodes an adapter a GPU of 200, 400, 400 Gbit/s (data sheets of DGX
# A100, H100 and H200, B200). H200 is sm90 as well.
_LINKS = {"cuda-sm80": (267.0, 25.0), "cuda-sm90": (400.0, 50.0), "cuda-sm100": (800.0, 50.0)}
# Assumed: microseconds of a collective of NCCL, and the share of memory bandwidth that elementwise kernels reach
_LOCAL_S, _REMOTE_S, _OF_BANDWIDTH = 2e-5, 4e-5, 0.8


def _gpu_speeds(device: str) -> Speeds:
    local, remote = _LINKS[device]
    byte = 1 / (_OF_BANDWIDTH * _PEAKS[device][2])
    return Speeds(
        Link.of(gigabytes=local, latency=_LOCAL_S),
        Link.of(gigabytes=remote, latency=_REMOTE_S),
        # float32 of shards, bfloat16 of what travels: momentum read twice with the gradient, both results written, and
        # the blended one read again and written as bfloat16; a copy; parameters twice read and written, and the update
        blend=30 * byte,
        copy=4 * byte,
        apply=18 * byte,
        # assumed: 20 starts of kernels of 5 us
        bucket=1e-4,
    )


_GPU_SPEEDS = {device: _gpu_speeds(device) for device in _LINKS}
