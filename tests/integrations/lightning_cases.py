"""What ranks run by Lightning, and the same by hand on one process."""

import logging
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

import distmuon

EPOCHS, STEPS, ACCUMULATION, BATCH, MAX_NORM = 2, 2, 2, 4, 0.05


class Regression(lightning.LightningModule):
    """The recipe of docs/integrations.md: the optimizer over the module itself, with prefixes and frozen parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)
        self.losses = []

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.head.weight, DTensor):
            for module in (self.net, self.head, self.frozen):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, x, index=0):
        loss = (self.head(self.net(self.frozen(x))) - x[:, :3]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = distmuon.Muon(
            self, lr=0.02, adamw_lr=1e-2, ns_dtype=torch.float32, mesh=torch.distributed.group.WORLD
        )
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def samples(processes):
    """As many as make an epoch of so many processes."""
    return torch.randn(STEPS * ACCUMULATION * BATCH * processes, 6, generator=torch.Generator().manual_seed(2))


def trained(kind, folder, *, epochs=EPOCHS, checkpoint=None):
    """Losses of this rank and weights, and who orthogonalized; it leaves a checkpoint named by its epochs."""
    processes = 1 if kind == "one" else 2
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    strategy = {"one": "auto", "ddp": "ddp", "fsdp2": sharded}[kind]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers, loggers and folders
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=processes,
            strategy=strategy,
            max_epochs=epochs,
            accumulate_grad_batches=ACCUMULATION,
            gradient_clip_val=MAX_NORM,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Regression()
        data = samples(processes)
        # Lightning's own would shuffle
        sampler = DistributedSampler(data, shuffle=False) if processes > 1 else None
        loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
        trainer.fit(module, loader, ckpt_path=None if checkpoint is None else Path(folder) / checkpoint)
        if checkpoint is None:
            trainer.save_checkpoint(Path(folder) / f"{epochs}.ckpt")
    optimizer = trainer.optimizers[0]
    with_state = {name for name, param in module.named_parameters() if optimizer.state.get(param)}
    return module.losses, weights(module), {*optimizer.owners().values()}, with_state


def by_hand(processes):
    """The mean losses of the passes of all processes, and weights."""
    module, losses = Regression(), []
    found = module.configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    for _ in range(EPOCHS):
        for number, x in enumerate(samples(processes).split(BATCH * processes), start=1):
            loss = module.training_step(x)
            (loss / ACCUMULATION).backward()
            losses.append(loss.item())
            if number % ACCUMULATION == 0:
                nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return losses, weights(module)


def weights(module):
    found = {name: param.detach() for name, param in module.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in found.items()}
