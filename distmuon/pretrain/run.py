"""A whole pretraining run: put the parts together, run the loop, leave the reports."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging

import torch
from torch import nn
from transformers import PretrainedConfig

from distmuon._version import __version__
from distmuon.pretrain.batch import plan_batches
from distmuon.pretrain.changes import check_changes, write_config
from distmuon.pretrain.checkpoint import AppState, Saver, load_checkpoint, set_aside_newer
from distmuon.pretrain.config import Config, flatten, validate
from distmuon.pretrain.data import Corpus, check_vocabulary, open_corpus, train_loader, val_batches
from distmuon.pretrain.evaluate import Validation, evaluate
from distmuon.pretrain.failures import Failures, put_aside
from distmuon.pretrain.finish import make_sample, write_report
from distmuon.pretrain.flops import flops_per_token, peak_flops
from distmuon.pretrain.loop import Hooks, Loop, Parts
from distmuon.pretrain.metrics import MetricsFile, Record
from distmuon.pretrain.model import build_model, count_parameters, model_config
from distmuon.pretrain.optimizer import attach_qk_clip, build_optimizer, routing
from distmuon.pretrain.parallel import Layout, check_features, resolve_layout
from distmuon.pretrain.precision import choose_device, choose_dtype, describe, set_up_torch
from distmuon.pretrain.processes import agreed, check_same, local_rank, on_first, process_group, rank, world_size
from distmuon.pretrain.progress import Display, open_display
from distmuon.pretrain.report import Summary
from distmuon.pretrain.requeue import take_note
from distmuon.pretrain.runfolder import RunFolder, open_run_folder, written
from distmuon.pretrain.runlock import RunLock
from distmuon.pretrain.schedule import build_scheduler
from distmuon.pretrain.sharding import build_mesh, decoder_blocks, place
from distmuon.pretrain.tensor_parallel import tensor_parallel_plan
from distmuon.pretrain.tensorboard import TensorBoard
from distmuon.pretrain.weights import draws_on_first

logger = logging.getLogger(__name__)


def train(config: Config, resume: str | None = None) -> Summary:
    """Pretrain a language model as the config says.

    In a run of several processes all of them call it, under torchrun or in a process group of the caller. Rank 0
    prints and writes; all save and load checkpoints.

    Args:
        config: All settings; it is not changed.
        resume: None for a new run, ``"auto"`` for the newest checkpoint of this run's name, or the path of
            a run folder or of a ``step-N`` folder.

    Returns:
        The result, which is also in the run folder as ``summary.json``.

    Raises:
        UserError: For a setting that cannot work, or a loss that is not finite.
        Interrupted: After Ctrl-C, SIGTERM or SIGUSR1, the state saved.
        RankLost: If another rank ended or stalled.
    """
    with agreed():
        validate(config)
        layout = resolve_layout(config.parallel, world_size())
        check_features(layout, config.train)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(config.parallel.timeout_seconds))
        _check_settings(config)
        set_up_torch(config.train)
        corpus = _open_corpus(config)
        config, parts = _build(config, corpus, layout)
        # the run folder is made after all that can be refused was looked at
        folder = open_run_folder(config.log, resume, verify=config.checkpoint.verify)
        lock = stack.enter_context(RunLock())
        on_first(lambda: lock.take(folder.path))
        if folder.resume_from is not None:
            on_first(lambda: check_changes(folder.config, config))
            load_checkpoint(folder.resume_from, parts.state, config.checkpoint.routing_changes, layout=str(layout))
            with agreed():
                # other data than the checkpoint's are refused here, before anything in the folder changes
                parts = dataclasses.replace(parts, loader=iter(parts.loader))
            if parts.qk_clip is not None:
                parts.qk_clip.resume(int(parts.state.progress["step"]))
            on_first(lambda: _take_note(folder))
            if parts.state.progress["step"] >= parts.plan.steps:
                return _finished_before(parts, folder, corpus)
        Failures.settle(folder.path, parts.state.progress)
        on_first(lambda: _prepare_folder(config, parts, folder))
        _announce(parts, folder, corpus)
        _run_loop(parts, folder, corpus)
        return _finish(parts, folder, corpus)


def _take_note(folder: RunFolder) -> None:
    with written(folder.path):
        take_note(folder.path)
        failure = put_aside(folder.path)
    if failure is not None:
        logger.info("the start before has failed: %s", failure)


def _check_settings(config: Config) -> None:
    """Machines may keep the data in different places; all else has to be the same."""
    values = flatten(dataclasses.asdict(config))
    check_same({key: value for key, value in values.items() if key not in ("data.source", "data.cache_dir")})


def _open_corpus(config: Config) -> Corpus:
    """One process of each machine first, so that a text is tokenized once and the others find it done."""
    corpus = None
    with agreed():
        if local_rank() == 0:
            corpus = open_corpus(config.data)
    with agreed():
        corpus = corpus or open_corpus(config.data)
    check_same(
        {
            "the number of training tokens": len(corpus.train),
            "the number of validation tokens": len(corpus.val),
            "the size of the vocabulary": corpus.vocab_size,
        }
    )
    return corpus


def _prepare_folder(config: Config, parts: Parts, folder: RunFolder) -> None:
    with written(folder.path):
        if folder.resume_from is not None:
            for path in set_aside_newer(folder.resume_from):
                logger.info("set aside a newer checkpoint as %s", path)
        write_config(folder.config, config, step=int(parts.state.progress["step"]))
        (folder.path / "routing.txt").write_text(parts.routing[1].rstrip() + "\n", encoding="utf-8")


def _build(config: Config, corpus: Corpus, layout: Layout) -> tuple[Config, Parts]:
    """Make all parts; the config that comes back has the vocabulary filled in."""
    length, seed = config.data.sequence_length, config.train.seed
    with agreed():
        device = choose_device(config.train.device, local_rank() if layout.world > 1 else None)
        dtype = choose_dtype(config.train.dtype, device)
        plan = plan_batches(config.train, length, layout.data_ranks)
        lm_config = model_config(config.model, corpus.vocab_size, length)
        check_vocabulary(corpus, lm_config.vocab_size)
        model, source = _build_model(config, lm_config, layout)
        if layout.tp > 1:
            tensor_parallel_plan(model, lm_config, layout.tp)
        if layout.fully_shards:
            decoder_blocks(model, lm_config)
    filled = {**config.model.config, "vocab_size": lm_config.vocab_size}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, config=filled))
    flops = flops_per_token(model, lm_config, length)
    placed = place(
        model,
        lm_config,
        layout,
        build_mesh(layout, device, config.parallel.timeout_seconds),
        device=device,
        dtype=dtype,
        compile=config.train.compile,
        source=source,
    )
    del source  # rank 0 needs no second model
    data_rank = layout.data_rank(rank())
    if layout.data_ranks > 1:
        torch.manual_seed(seed + data_rank)  # other dropout for other data
    with agreed():
        optimizer = build_optimizer(placed.wrapped, config.optim, step_stats=config.log.step_stats)
        qk_clip = attach_qk_clip(placed.wrapped, optimizer, config.optim)
    routed = routing(optimizer)  # with peak rates, which the schedule changes
    scheduler = build_scheduler(optimizer, config.optim, plan.steps)
    loader = train_loader(corpus, config.data, plan.device_batch, rank=data_rank, world_size=layout.data_ranks)
    return config, Parts(
        config=config,
        plan=plan,
        layout=layout,
        placed=placed,
        optimizer=optimizer,
        qk_clip=qk_clip,
        routing=routed,
        scheduler=scheduler,
        loader=loader,
        state=AppState(placed.model, optimizer, scheduler, loader, device),
        device=device,
        dtype=dtype,
        flops_per_token=flops,
        peak_flops=peak_flops(device, dtype),
    )


def _build_model(config: Config, lm_config: PretrainedConfig, layout: Layout) -> tuple[nn.Module, nn.Module | None]:
    """The model as `place` takes it, and its source."""
    settings = config.train
    build = functools.partial(
        build_model, lm_config, seed=settings.seed, activation_checkpointing=settings.activation_checkpointing
    )
    if not draws_on_first(layout, lm_config):
        return build(), None
    source = build() if rank() == 0 else None
    with torch.device("meta"):
        return build(), source


def _announce(parts: Parts, folder: RunFolder, corpus: Corpus) -> None:
    plan, config, step = parts.plan, parts.config, int(parts.state.progress["step"])
    ranks = f" x {parts.layout.data_ranks} ranks" if parts.layout.data_ranks > 1 else ""
    rows = {
        "version": f"distmuon {__version__}, torch {torch.__version__}",
        "run folder": str(folder.path),
        "device": describe(parts.device, parts.dtype),
        "data": corpus.description,
        "model": f"{config.model.type}, {count_parameters(parts.placed.model):,} parameters",
        "processes": f"{parts.layout.world}: {parts.layout}",
        "optimizer": f"lr {config.optim.lr:g} {config.optim.schedule}, {parts.routing[0]} (routing.txt)",
        "step": f"{plan.tokens:,} tokens = {plan.accumulation} x {plan.device_batch} sequences "
        f"x {config.data.sequence_length}{ranks}",
        "run": f"{plan.steps:,} steps, {plan.steps * plan.tokens:,} tokens",
    }
    if parts.layout.world == 1:
        del rows["processes"]
    if folder.resume_from is not None:
        rows["resumed"] = f"{folder.resume_from} after step {step:,}"
    for key, value in rows.items():
        logger.info("%-11s %s", key, value)


def _run_loop(parts: Parts, folder: RunFolder, corpus: Corpus) -> None:
    config, step = parts.config, int(parts.state.progress["step"])
    sinks: list[MetricsFile | TensorBoard] = []
    with contextlib.ExitStack() as stack:
        with agreed(), written(folder.path):
            if rank() == 0:
                sinks.append(stack.enter_context(MetricsFile(folder.metrics, after_step=step)))
            if rank() == 0 and config.log.tensorboard:
                sinks.append(stack.enter_context(TensorBoard(folder.path / "tensorboard", after_step=step)))
        progress = config.log.progress if rank() == 0 else "off"
        display = open_display(progress, steps=parts.plan.steps, done=step)
        stack.callback(display.close)
        saver = None
        if config.checkpoint.every > 0:
            saver = stack.enter_context(
                Saver(folder.checkpoints, parts.state, config.checkpoint, layout=str(parts.layout))
            )
        hooks = Hooks(
            advance=display.advance,
            record=functools.partial(_record, folder, sinks, display),
            validate=functools.partial(_validate, parts, corpus),
            saver=saver,
        )
        Loop(parts, hooks).run()


def _record(folder: RunFolder, sinks: list[MetricsFile | TensorBoard], display: Display, record: Record) -> None:
    with written(folder.path):
        for sink in sinks:
            sink.write(record)
    display.show(record)


def _validate(parts: Parts, corpus: Corpus) -> Validation:
    config, layout = parts.config, parts.layout
    batches = val_batches(
        corpus,
        config.data,
        parts.plan.device_batch,
        config.train.eval_tokens,
        rank=layout.data_rank(rank()),
        world_size=layout.data_ranks,
    )
    return evaluate(
        parts.placed.model,
        batches,
        bytes_per_token=corpus.val_bytes_per_token,
        device=parts.device,
        dtype=parts.dtype,
        copies=layout.tp,
    )


def _finish(parts: Parts, folder: RunFolder, corpus: Corpus) -> Summary:
    """Sample, draw and sum up; the result is that of rank 0 on all ranks."""
    sample = make_sample(parts, corpus)
    return on_first(lambda: _report(parts, folder, sample))


def _report(parts: Parts, folder: RunFolder, sample: str | None) -> Summary:
    with written(folder.path):
        return write_report(parts, folder, sample)


def _finished_before(parts: Parts, folder: RunFolder, corpus: Corpus) -> Summary:
    step, steps = int(parts.state.progress["step"]), parts.plan.steps
    logger.info(
        "%s is finished: its checkpoint is at step %d and the config asks for %d; raise train.steps (or train.tokens) "
        "to go on",
        folder.path,
        step,
        steps,
    )
    # one that was made longer and killed before its report has the summary of before
    before = on_first(lambda: Summary.load(folder.summary))
    return before if before is not None and before.steps >= step else _finish(parts, folder, corpus)
