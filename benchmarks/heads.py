"""What attention heads as matrices of their own cost: time of a step on one process, bytes of one under FSDP2.

    python benchmarks/heads.py
    python benchmarks/heads.py --model qwen3_0.6b --blocks 2 --head 128 --ranks 2 4

A step with ``matrices="heads"`` and one with whole matrices are timed in turn, with the default engine, over the
hidden matrices of blocks as in Llama: CPU time of the process on one thread, which other work on the machine changes
less than the time on the wall. Bytes are what all ranks together send in a step (``optim/bytes_sent``), with
gloo on this machine, of q, k and v (heads in rows, which FSDP2 shards), of o (heads in columns) and of all matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from step_time_contenders import MODELS, Shape
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

import distmuon
from distmuon.numerics.hardware import has_native_bf16

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARTS = {"q, k, v": NAMES[:3], "o": NAMES[3:4], "all": NAMES}
LLAMAS = sorted(name for name, (_, shapes) in MODELS.items() if len(shapes) == len(NAMES))


def matrices_of(shapes: Sequence[Shape], blocks: int, names: Sequence[str] = NAMES) -> nn.Sequential:
    """Blocks of linear layers that have gradients."""
    torch.manual_seed(0)
    layers = [nn.ModuleDict() for _ in range(blocks)]
    for layer in layers:
        for name, (rows, cols) in zip(NAMES, shapes, strict=True):
            if name in names:
                linear = nn.Linear(cols, rows, bias=False)
                linear.weight.grad = torch.randn(rows, cols)
                layer[name] = linear
    return nn.Sequential(*layers)


def optimizer_of(layers: nn.Module, head: int, *, by_head: bool, **options: Any) -> distmuon.Muon:
    """Muon of whole matrices, or of heads of so many features."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, param in layers.named_parameters():
        kind = name.split(".")[-2]
        keys: dict[str, Any] = {}
        if by_head and kind in NAMES[:4]:
            axis = int(kind == "o_proj")
            keys = {"num_heads": param.shape[axis] // head, "split_axis": ("rows", "cols")[axis]}
        group = groups.setdefault((*keys.values(),), {"params": [], "use_muon": True, **keys})
        group["params"].append((name, param))
    return distmuon.Muon([*groups.values()], lr=1e-4, **options)


def timed(shapes: Sequence[Shape], blocks: int, head: int, samples: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of steps of one process, in turn; the first step of each does not count."""
    steps = {}
    for word in ("whole", "heads"):
        steps[word] = optimizer_of(matrices_of(shapes, blocks), head, by_head=word == "heads").step
        steps[word]()
    found: dict[str, list[float]] = {word: [] for word in steps}
    for _ in range(samples):
        for word, step in steps.items():
            began = time.process_time()
            step()
            found[word].append((time.process_time() - began) * 1e3)
    return found


def sent(shapes: Sequence[Shape], blocks: int, head: int, ranks: int) -> dict[str, dict[str, int]]:
    """Bytes of a step that all ranks together send, by part and by word."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder, shapes, blocks, head, ranks), nprocs=ranks)
        return json.loads((pathlib.Path(folder) / "bytes.json").read_text())


def _rank(rank: int, folder: str, shapes: Sequence[Shape], blocks: int, head: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    found: dict[str, dict[str, int]] = {}
    for part, names in PARTS.items():
        for word in ("whole", "heads"):
            layers = matrices_of(shapes, blocks, names)
            fully_shard(layers, mesh=mesh)
            optimizer = optimizer_of(layers, head, by_head=word == "heads", step_stats=True)
            for param in layers.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
            total = torch.tensor(optimizer.last_step_stats()["optim/bytes_sent"], dtype=torch.float64)
            dist.all_reduce(total)
            found.setdefault(part, {})[word] = int(total)
    if rank == 0:
        (pathlib.Path(folder) / "bytes.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LLAMAS, default="qwen3_0.6b", help="whose shapes")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--head", type=int, default=128, help="features of a head")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{args.blocks} blocks of {args.model}, heads of {args.head}; torch {torch.__version__}, "
        f"{os.cpu_count()} cores, native bfloat16: {has_native_bf16('cpu')}"
    )
    shapes = MODELS[args.model][1]
    times = timed(shapes, args.blocks, args.head, args.samples)
    for word, ms in times.items():
        print(f"{word}: {statistics.median(ms):.0f} ms ({min(ms):.0f} to {max(ms):.0f}, {len(ms)} steps)")
    found = {ranks: sent(shapes, args.blocks, args.head, ranks) for ranks in args.ranks}
    for ranks, parts in found.items():
        for part, sizes in parts.items():
            told = ", ".join(f"{word} {size / 1e6:.1f} MB" for word, size in sizes.items())
            print(f"FSDP2 on {ranks} ranks sends for {part}: {told}")
    if args.json is not None:
        args.json.write_text(json.dumps({"ms": times, "bytes": found}))


if __name__ == "__main__":
    main()
