"""A whole pretraining run: put the parts together, run the loop, leave the reports."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib

import torch

from distmuon._version import __version__
from distmuon.pretrain.batch import plan_batches
from distmuon.pretrain.changes import check_changes, write_config
from distmuon.pretrain.checkpoint import (
    AppState,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_aside_newer,
)
from distmuon.pretrain.config import Config, validate
from distmuon.pretrain.data import Corpus, check_vocabulary, open_corpus, train_loader, val_batches
from distmuon.pretrain.evaluate import Validation, evaluate
from distmuon.pretrain.flops import flops_per_token, peak_flops
from distmuon.pretrain.loop import Hooks, Loop, Parts
from distmuon.pretrain.metrics import MetricsFile, Record, read_metrics
from distmuon.pretrain.model import build_model, count_parameters, model_config
from distmuon.pretrain.optimizer import build_optimizer, routing
from distmuon.pretrain.parallel import resolve_layout, world_size
from distmuon.pretrain.precision import choose_device, choose_dtype, describe, set_up_torch
from distmuon.pretrain.progress import Display, open_display
from distmuon.pretrain.report import Summary, plot_loss, summarize
from distmuon.pretrain.runfolder import RunFolder, open_run_folder
from distmuon.pretrain.sample import sample_text
from distmuon.pretrain.schedule import build_scheduler
from distmuon.pretrain.tensorboard import TensorBoard

logger = logging.getLogger(__name__)


def train(config: Config, resume: str | None = None) -> Summary:
    """Pretrain a language model as the config says.

    Args:
        config: All settings; it is not changed.
        resume: None for a new run, ``"auto"`` for the newest checkpoint of this run's name, or the path of
            a run folder or of a ``step-N`` folder.

    Returns:
        The result, which is also in the run folder as ``summary.json``.

    Raises:
        UserError: For a setting that cannot work, or a loss that is not finite.
        Interrupted: After Ctrl-C or SIGTERM, the state saved.
    """
    validate(config)
    resolve_layout(config.parallel, world_size())
    set_up_torch(config.train)
    corpus = open_corpus(config.data)
    config, parts = _build(config, corpus)
    # the run folder is made after all that can be refused was looked at
    folder = open_run_folder(config.log, resume)
    if folder.resume_from is not None:
        check_changes(folder.config, config)
        load_checkpoint(folder.resume_from, parts.state)
        if parts.state.progress["step"] >= parts.plan.steps:
            return _finished_before(parts, folder, corpus)
        for path in set_aside_newer(folder.resume_from):
            logger.info("set aside a newer checkpoint as %s", path)
    write_config(folder.config, config, step=int(parts.state.progress["step"]))
    (folder.path / "routing.txt").write_text(parts.routing[1].rstrip() + "\n", encoding="utf-8")
    _announce(parts, folder, corpus)
    _run_loop(parts, folder, corpus)
    return _finish(parts, folder, corpus)


def _build(config: Config, corpus: Corpus) -> tuple[Config, Parts]:
    """Make all parts; the config that comes back has the vocabulary filled in."""
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.train.dtype, device)
    plan = plan_batches(config.train, config.data.sequence_length)
    lm_config = model_config(config.model, corpus.vocab_size, config.data.sequence_length)
    check_vocabulary(corpus, lm_config.vocab_size)
    filled = {**config.model.config, "vocab_size": lm_config.vocab_size}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, config=filled))
    model = build_model(
        lm_config,
        device=device,
        seed=config.train.seed,
        activation_checkpointing=config.train.activation_checkpointing,
        compile=config.train.compile,
    )
    optimizer = build_optimizer(model, config.optim)
    routed = routing(optimizer)  # with peak rates, which the schedule changes
    scheduler = build_scheduler(optimizer, config.optim, plan.steps)
    loader = train_loader(corpus, config.data, plan.device_batch)
    return config, Parts(
        config=config,
        plan=plan,
        model=model,
        optimizer=optimizer,
        routing=routed,
        scheduler=scheduler,
        loader=loader,
        state=AppState(model, optimizer, scheduler, loader, device),
        device=device,
        dtype=dtype,
        flops_per_token=flops_per_token(model, lm_config, config.data.sequence_length),
        peak_flops=peak_flops(device, dtype),
    )


def _announce(parts: Parts, folder: RunFolder, corpus: Corpus) -> None:
    plan, config, step = parts.plan, parts.config, int(parts.state.progress["step"])
    rows = {
        "version": f"distmuon {__version__}, torch {torch.__version__}",
        "run folder": str(folder.path),
        "device": describe(parts.device, parts.dtype),
        "data": corpus.description,
        "model": f"{config.model.type}, {count_parameters(parts.model):,} parameters",
        "optimizer": f"lr {config.optim.lr:g} {config.optim.schedule}, {parts.routing[0]} (routing.txt)",
        "step": f"{plan.tokens:,} tokens = {plan.accumulation} x {plan.device_batch} sequences "
        f"x {config.data.sequence_length}",
        "run": f"{plan.steps:,} steps, {plan.steps * plan.tokens:,} tokens",
    }
    if folder.resume_from is not None:
        rows["resumed"] = f"{folder.resume_from} after step {step:,}"
    for key, value in rows.items():
        logger.info("%-11s %s", key, value)


def _run_loop(parts: Parts, folder: RunFolder, corpus: Corpus) -> None:
    config, step = parts.config, int(parts.state.progress["step"])
    with contextlib.ExitStack() as stack:
        sinks: list[MetricsFile | TensorBoard] = [stack.enter_context(MetricsFile(folder.metrics, after_step=step))]
        if config.log.tensorboard:
            sinks.append(stack.enter_context(TensorBoard(folder.path / "tensorboard", after_step=step)))
        display = open_display(config.log.progress, steps=parts.plan.steps, done=step)
        stack.callback(display.close)
        save = functools.partial(_save, parts.state, folder.checkpoints, config.checkpoint.keep)
        hooks = Hooks(
            advance=display.advance,
            record=functools.partial(_record, sinks, display),
            validate=functools.partial(_validate, parts, corpus),
            save=save if config.checkpoint.every > 0 else None,
        )
        Loop(parts, hooks).run()


def _record(sinks: list[MetricsFile | TensorBoard], display: Display, record: Record) -> None:
    for sink in sinks:
        sink.write(record)
    display.show(record)


def _validate(parts: Parts, corpus: Corpus) -> Validation:
    config = parts.config
    batches = val_batches(corpus, config.data, parts.plan.device_batch, config.train.eval_tokens)
    return evaluate(
        parts.model,
        batches,
        bytes_per_token=corpus.val_bytes_per_token,
        device=parts.device,
        dtype=parts.dtype,
    )


def _save(state: AppState, folder: pathlib.Path, keep: int, step: int) -> pathlib.Path:
    return save_checkpoint(folder, step, state, keep)


def _finish(parts: Parts, folder: RunFolder, corpus: Corpus) -> Summary:
    """Sample, draw and sum up."""
    config, records = parts.config, read_metrics(folder.metrics)
    sample = None
    if config.train.sample_tokens > 0 and corpus.tokenizer is None:
        logger.warning("no sample text: the data does not say its tokenizer, so set data.tokenizer")
    elif config.train.sample_tokens > 0 and corpus.tokenizer is not None:
        sample = sample_text(
            parts.model,
            corpus.tokenizer,
            config.train.sample_prompt,
            config.train.sample_tokens,
            device=parts.device,
            dtype=parts.dtype,
            seed=config.train.seed,
        )
        logger.info("sample:\n%s", sample)
    summary = summarize(
        records,
        run_dir=folder.path,
        optimizer=config.optim.name,
        parameters=count_parameters(parts.model),
        checkpoint=newest_checkpoint(folder.checkpoints),
        sample=sample,
    )
    summary.save(folder.summary)
    if config.log.plot:
        title = f"{folder.path.name}: {config.model.type}, {summary.parameters:,} parameters, {config.optim.name}"
        plot_loss(records, folder.path / "loss.png", title)
    bits = "" if summary.bits_per_byte is None else f", {summary.bits_per_byte:.3f} bits/byte"
    logger.info(
        "done: validation loss %.4f%s after %s tokens in %.0f s (%s tok/s); see %s",
        summary.validation_loss,
        bits,
        f"{summary.tokens:,}",
        summary.seconds,
        f"{summary.tokens_per_second:,.0f}",
        folder.path,
    )
    return summary


def _finished_before(parts: Parts, folder: RunFolder, corpus: Corpus) -> Summary:
    step, steps = int(parts.state.progress["step"]), parts.plan.steps
    logger.info(
        "%s is finished: its checkpoint is at step %d and the config asks for %d; raise train.steps (or train.tokens) "
        "to go on",
        folder.path,
        step,
        steps,
    )
    return Summary.load(folder.summary) if folder.summary.exists() else _finish(parts, folder, corpus)
