"""What ranks run with TorchTitan's containers."""

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from torchtitan_optimizer import MuonContainer

import distmuon

STEPS = 4
MUON = {"lr": 0.02, "adamw_lr": 1e-2, "ns_dtype": torch.float32}


def built(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizers = MuonContainer.Config(muon=MUON).build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=STEPS)
    return model, optimizers, schedule


def train(model, optimizers, schedule, steps):
    for step in steps:
        optimizers.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        mine = x.chunk(2)[torch.distributed.get_rank()] if torch.distributed.is_initialized() else x
        (model(mine) - mine[:, :3]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizers.step()
        schedule.step()


def state_of(model, optimizers, schedule):
    return {"optimizer": optimizers.state_dict(), "model": model.state_dict(), "schedule": schedule}


def weights(model):
    return {name: param.full_tensor() for name, param in model.named_parameters()}


def saved_and_gone_on(folder):
    """Weights of a run, and what of one that was loaded in the middle by another differs."""
    model, optimizers, schedule = built(1)
    train(model, optimizers, schedule, range(2))
    dcp.save(
        {"optimizer": optimizers.state_dict(), "model": model.state_dict(), "schedule": schedule}, checkpoint_id=folder
    )
    train(model, optimizers, schedule, range(2, STEPS))
    undisturbed = weights(model)
    model, optimizers, schedule = built(7)
    state = state_of(model, optimizers, schedule)
    dcp.load(state, checkpoint_id=folder)
    optimizers.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])
    train(model, optimizers, schedule, range(2, STEPS))
    found = weights(model)
    return undisturbed, [name for name in found if not torch.equal(found[name], undisturbed[name])]


def by_hand():
    """The same on one process without TorchTitan; its schedule warms up in two steps and goes down to 1/3."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = distmuon.Muon(model, **MUON)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step, factor in enumerate((1 / 2, 1.0, 1.0, 1 / 2)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        (model(x) - x[:, :3]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}
