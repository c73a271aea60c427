"""What ranks run by the Trainer of transformers, and the same by hand on one process."""

import contextlib
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate_cases import cpu_as_accelerator
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import distmuon
from distmuon.integrations.transformers import MuonFactory, MuonMetrics

STEPS, ACCUMULATION, BATCH, MAX_NORM, LENGTH = 6, 2, 2, 0.5, 16
RATES = {"lr": 0.02, "adamw_lr": 5e-3, "weight_decay": 0.1, "ns_dtype": torch.float32}


def small_model():
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )


def samples():
    ids = torch.randint(0, 8, (64, LENGTH), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


class Tracker(TrainerCallback):
    """What a tracker that is named after Muon's metrics gets."""

    seen = ()

    def on_log(self, args, state, control, logs=None, **kwargs):
        Tracker.seen = (*Tracker.seen, dict(logs))


def trainer_of(folder, how, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        train_sampling_strategy="sequential",
        max_grad_norm=MAX_NORM,
        lr_scheduler_type="linear",
        warmup_steps=2,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    model = small_model()
    if how == "factory":
        given = {"optimizer_cls_and_kwargs": (MuonFactory, {**RATES, "step_stats": True})}
    else:
        # None on one process
        given = {"optimizers": (distmuon.Muon(model, **RATES, mesh=torch.distributed.group.WORLD), None)}
    return Trainer(model, arguments, train_dataset=samples(), callbacks=[MuonMetrics(), Tracker()], **given)


def trained(folder, how, checkpoint=None, *, kind="ddp"):
    """Weights, log, and who orthogonalized; checkpoints are written to a folder, or one of it is gone on from."""
    AcceleratorState._reset_state(True)
    with contextlib.ExitStack() as stack:
        if kind == "ddp":
            trainer = trainer_of(folder, how, use_cpu=True)
        else:
            stack.enter_context(cpu_as_accelerator())
            trainer = trainer_of(folder, how, fsdp=True, fsdp_config={"version": 2, "auto_wrap_policy": "NO_WRAP"})
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(Path(folder) / checkpoint))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    owners = {*trainer.optimizer.optimizer.owners().values()}
    return weights(trainer.model), log, owners, trainer.accelerator.distributed_type.name


def trained_sharded(folder, how, checkpoint=None):
    return trained(folder, how, checkpoint, kind="fsdp2")


def by_hand(processes, how):
    """Weights and losses of what `processes` of the Trainer compute together."""
    model, batches, losses = small_model(), iter(samples()), []
    optimizer = distmuon.Muon(model, **RATES) if how == "object" else _without_decay_of_vectors(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (step / 2 if step < 2 else (STEPS - step) / (STEPS - 2))
        losses.append(0.0)
        for _ in range(processes * ACCUMULATION):
            ids = torch.stack([next(batches)["input_ids"] for _ in range(BATCH)])
            loss = model(input_ids=ids, labels=ids).loss / (processes * ACCUMULATION)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), losses


def _without_decay_of_vectors(model):
    named = dict(model.named_parameters())
    hidden = [item for item in named.items() if ".layers." in item[0] and item[1].ndim == 2]
    tables = [(name, named[name]) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    vectors = [item for item in named.items() if item[1].ndim == 1]
    return distmuon.Muon(
        [
            {"params": hidden, "use_muon": True},
            {"params": tables, "use_muon": False},
            {"params": vectors, "use_muon": False, "weight_decay": 0.0},
        ],
        **RATES,
    )


def weights(model):
    found = {name: param.detach() for name, param in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in found.items()}
