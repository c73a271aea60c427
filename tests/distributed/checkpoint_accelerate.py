"""What ranks run to save and load by accelerate; it keeps state of the process, so in processes of its own."""

import os
from unittest import mock

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn
from torch.distributed.tensor import DTensor

import distmuon


def accelerator_of(kind):
    AcceleratorState._reset_state(True)
    if kind == "ddp":
        return Accelerator(cpu=True)
    # without a GPU accelerate ignores the plugin, unless it takes the CPU for one
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", state_dict_type=kind, cpu_ram_efficient_loading=False
    )
    with (
        mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"),
        mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)),
    ):
        return Accelerator(fsdp_plugin=plugin)


def prepared(accelerator, seed, lr):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3))
    return accelerator.prepare(model, distmuon.Muon(model, lr=lr, adamw_lr=1e-3, foreach=False))


def train(accelerator, model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def by_name(model, optimizer):
    """Weights and state, whole."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = whole(param)
        found |= {f"{key} of {name}": whole(value) for key, value in optimizer.optimizer.state[param].items()}
    return found


def saved_and_loaded(kind, folder):
    """Saves, goes on, loads into others, goes on; what differs, and how it was distributed."""
    accelerator = accelerator_of(kind)
    model, optimizer = prepared(accelerator, 1, 0.02)
    train(accelerator, model, optimizer, range(2))
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    saved = by_name(model, optimizer)
    train(accelerator, model, optimizer, range(2, 4))
    later = by_name(model, optimizer)
    accelerator = accelerator_of(kind)
    model, optimizer = prepared(accelerator, 7, 0.5)
    accelerator.load_state(folder)
    loaded = by_name(model, optimizer)
    train(accelerator, model, optimizer, range(2, 4))
    went_on = by_name(model, optimizer)
    found = [f"loaded: {name}" for name in saved if not torch.equal(saved[name], loaded[name])]
    found += [f"later: {name}" for name in later if not torch.equal(later[name], went_on[name])]
    found += [] if optimizer.param_groups[0]["lr"] == 0.02 else ["lr"]
    return found, accelerator.distributed_type.name, len(saved)
