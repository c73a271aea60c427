r"""The trainer (`python -m distmuon.pretrain`) as a loop of accelerate: same config, weights, batches and losses.

accelerate launch --config_file launch/accelerate_fsdp2.yaml examples/accelerate_pretrain.py --config configs/debug.yaml
ACCELERATE_USE_CPU=true accelerate launch --config_file launch/accelerate_ddp.yaml --num_processes 2 \
    --mixed_precision no examples/accelerate_pretrain.py --config configs/debug.yaml --train.steps 20
"""

import sys

import torch
from accelerate import Accelerator

import distmuon
from distmuon.pretrain.batch import plan_batches
from distmuon.pretrain.config import Config
from distmuon.pretrain.data import open_corpus, train_loader
from distmuon.pretrain.evaluate import language_model_loss
from distmuon.pretrain.model import build_model, model_config
from distmuon.pretrain.optimizer import muon_options
from distmuon.pretrain.parse import parse_command
from distmuon.pretrain.schedule import build_scheduler


def main(config: Config) -> None:
    """Train as the config says."""
    accelerator = Accelerator(step_scheduler_with_optimizer=False)  # else it steps once for each process
    plan = plan_batches(config.train, config.data.sequence_length, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = plan.accumulation
    corpus = open_corpus(config.data)
    loader = train_loader(corpus, config.data, plan.device_batch)
    lm_config = model_config(config.model, corpus.vocab_size, config.data.sequence_length)
    model = build_model(lm_config, seed=config.train.seed)
    # mesh: with DDP the processes share the work; what FSDP2 shards knows its own
    optimizer = distmuon.Muon(model, mesh=torch.distributed.group.WORLD, **muon_options(config.optim))
    scheduler = build_scheduler(optimizer, config.optim, plan.steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.distributed_type.name}")
    step, losses = 0, []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = language_model_loss(model, batch["input_ids"], batch["labels"])
            losses.append(loss.detach())
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.optim.grad_clip:
                accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            scheduler.step()
            loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
            step, losses = step + 1, []
            accelerator.print(f"step {step}  loss {loss.item():.6f}")
        if step == plan.steps:
            return accelerator.end_training()


if __name__ == "__main__":
    main(parse_command(sys.argv[1:]).config)
