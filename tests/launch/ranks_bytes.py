"""A rank that steps distmuon.Muon alone under several layouts, and counts what its host sends over the cable meanwhile.

Run by torchrun on two hosts with two ranks each; writes what it found to the file that is its argument, with the number
of the host in its name.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distmuon import Muon

KINDS = ("hsdp", "fsdp", "ddp")
DTYPES = ("bfloat16", "float32")
STEPS = 3
# Time for the last acknowledgements
_SETTLE = 0.3


def model() -> nn.Sequential:
    """A few megabytes of matrices, several of each shape."""
    shapes = [(256, 256)] * 6 + [(512, 256), (256, 512)] * 3
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(inner, outer, bias=False) for outer, inner in shapes])


def stepping(kind: str, dtype: str) -> Muon:
    """The optimizer of a model that is stored as ``kind`` says, with gradients put in by hand."""
    whole, mesh = model(), None
    if kind == "hsdp":
        # the hosts are replicas, and shards are inside of each
        fully_shard(whole, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "fsdp":
        fully_shard(whole, mesh=init_device_mesh("cpu", (4,), mesh_dim_names=("shard4",)))
    else:
        mesh = dist.group.WORLD
    for param in whole.parameters():
        local = param.to_local() if isinstance(param, DTensor) else param
        torch.manual_seed(local.numel())
        grad = torch.randn_like(local)
        if isinstance(param, DTensor):
            param.grad = DTensor.from_local(
                grad, param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
            )
        else:
            param.grad = grad
    return Muon(whole, lr=0.01, adamw_lr=0.01, ns_dtype=getattr(torch, dtype), mesh=mesh)


def counted(steps: int, optimizer: Muon) -> dict[str, int]:
    """What this host sends in so many steps between two barriers, pauses included."""
    dist.barrier()
    time.sleep(_SETTLE)
    before = counters()
    dist.barrier()
    for _ in range(steps):
        optimizer.step()
    dist.barrier()
    time.sleep(_SETTLE)
    after = counters()
    return {key: after[key] - before[key] for key in before}


def counters() -> dict[str, int]:
    folder = Path("/sys/class/net") / os.environ["GLOO_SOCKET_IFNAME"] / "statistics"
    return {key: int((folder / f"tx_{key}").read_text()) for key in ("bytes", "packets")}


def main(out: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for kind in KINDS:
        for dtype in DTYPES:
            optimizer = stepping(kind, dtype)
            optimizer.step()  # plans, and connects
            plan = optimizer._binding.parts[0].pipeline.plan
            found[f"{kind} {dtype}"] = {
                "nodes": plan.nodes,
                "teams": plan.teams,
                "idle": counted(0, optimizer),
                "steps": counted(STEPS, optimizer),
            }
    if os.environ["LOCAL_RANK"] == "0":
        path = Path(f"{out}-{os.environ['GROUP_RANK']}.json")
        path.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
