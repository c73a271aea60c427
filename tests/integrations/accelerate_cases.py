"""What ranks run by accelerate, and the same by hand on one process."""

import contextlib
import os
from unittest import mock

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import distmuon

STEPS, ACCUMULATION, BATCH, MAX_NORM = 4, 2, 4, 0.05


@contextlib.contextmanager
def cpu_as_accelerator():
    """Without a GPU accelerate does not shard, unless it takes the CPU for one."""
    with (
        mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"),
        mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)),
    ):
        yield


def accelerator_of(kind, **settings):
    AcceleratorState._reset_state(True)
    if kind != "fsdp2":
        return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, **settings)
    # without a GPU accelerate ignores the plugin, unless it takes the CPU for one
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="NO_WRAP",
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    with (
        mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"),
        mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)),
    ):
        return Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=ACCUMULATION, **settings)


def parts(*, mesh=None, wrap=lambda model: model):
    """Model, optimizer, loader, schedule; the same everywhere."""
    torch.manual_seed(1)
    model = wrap(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)))
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=1e-2, ns_dtype=torch.float32, mesh=mesh)
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(data), batch_size=BATCH)
    return model, optimizer, loader, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def loss_of(model, x):
    return (model(x) - x[:, :3]).square().mean()


def by_hand(processes, autocast=False):
    """What `processes` of accelerate compute together, on this one; losses and weights."""
    model, optimizer, loader, scheduler = parts()
    batches, losses = iter(loader), []
    for _ in range(STEPS):
        losses.append(0.0)
        for _ in range(ACCUMULATION):
            for _ in range(processes):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loss_of(model, next(batches)[0])
                (loss / (ACCUMULATION * processes)).backward()
                losses[-1] += loss.item() / (ACCUMULATION * processes)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        # the schedule of accelerate counts the batches of all processes
        for _ in range(processes):
            scheduler.step()
    return losses, {name: param.detach() for name, param in model.named_parameters()}


def prepared(accelerator, kind, order):
    """Prepared objects; the optimizer was made of the model as it was before, or is after, it was prepared."""
    if order == "before":
        return accelerator.prepare(*parts(mesh=torch.distributed.group.WORLD if kind == "ddp" else None))
    model, optimizer, loader, scheduler = parts(wrap=accelerator.prepare)
    return model, *accelerator.prepare(optimizer, loader, scheduler)


def trained(kind, order, mixed="no"):
    """Losses and weights of a whole loop, how it was distributed, and who orthogonalized."""
    accelerator = accelerator_of(kind, mixed_precision=mixed)
    model, optimizer, loader, scheduler = prepared(accelerator, kind, order)
    losses = run(accelerator, model, optimizer, loader, scheduler)
    return losses, weights(model), accelerator.distributed_type.name, {*optimizer.optimizer.owners().values()}


def run(accelerator, model, optimizer, loader, scheduler, stop=STEPS * ACCUMULATION):
    losses, kept = [], []
    for number, (x,) in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            # under autocast of accelerate only the forward pass of the model is
            loss = loss_of(model, x)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        kept.append(loss.detach())
        if accelerator.sync_gradients:
            losses.append(accelerator.reduce(torch.stack(kept).mean(), "mean").item())
            kept = []
        if number == stop:
            break
    return losses


class Counter:
    """Something of the user's that is saved too."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def resumed(kind, folder):
    """Names of weights that differ between a run and one that was saved, loaded by others and went on; lr, counter."""
    accelerator = accelerator_of(kind)
    objects, counter = prepared(accelerator, kind, "before"), Counter()
    accelerator.register_for_checkpointing(counter)
    run(accelerator, *objects, stop=STEPS * ACCUMULATION // 2)
    counter.count = 5
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    rest = accelerator.skip_first_batches(objects[2], STEPS * ACCUMULATION // 2)
    run(accelerator, *objects[:2], rest, objects[3])
    undisturbed = weights(objects[0])
    accelerator = accelerator_of(kind)
    model, optimizer, loader, scheduler = prepared(accelerator, kind, "before")
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    accelerator.load_state(folder)
    loaded = optimizer.param_groups[0]["lr"]
    rest = accelerator.skip_first_batches(loader, STEPS * ACCUMULATION // 2)
    run(accelerator, model, optimizer, rest, scheduler)
    found = weights(model)
    return [name for name in found if not torch.equal(found[name], undisturbed[name])], loaded, counter.count


def scaled(kind):
    """Weights after steps by accelerate's scaler for float16, of which one has an infinity on one rank alone.

    accelerate asks for a GPU before it makes a scaler, so it is given one here, and float16 by hand.
    """
    accelerator = accelerator_of(kind)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    model, optimizer, _, _ = prepared(accelerator, kind, "before")
    found = []
    for number in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * number + accelerator.process_index))
        accelerator.gradient_state._set_sync_gradients(True)
        accelerator.backward(loss_of(model, x))
        first = next(model.parameters()).grad
        if number == 1 and (kind == "ddp" or accelerator.process_index == 1):
            (first.to_local() if isinstance(first, DTensor) else first).view(-1)[0] = float("inf")
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        before = weights(model)
        optimizer.step()
        optimizer.zero_grad()
        moved = any(
            not torch.equal(old, new) for old, new in zip(before.values(), weights(model).values(), strict=True)
        )
        found.append((optimizer.step_was_skipped, moved, accelerator.scaler.get_scale()))
    return found, all(torch.isfinite(value).all() for value in weights(model).values())


def weights(model):
    found = {}
    for name, param in model.named_parameters():
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


@contextlib.contextmanager
def alone():
    """A process that was not started as a rank of several."""
    with mock.patch.dict(os.environ):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        yield
        AcceleratorState._reset_state(True)
