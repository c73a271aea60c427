"""The end of a run: a sample of its text, and the reports in its folder."""

from __future__ import annotations

import logging

from distmuon.pretrain.checkpoint import newest_checkpoint
from distmuon.pretrain.data import Corpus
from distmuon.pretrain.loop import Parts
from distmuon.pretrain.metrics import read_metrics
from distmuon.pretrain.model import count_parameters
from distmuon.pretrain.report import Summary, plot_loss, summarize
from distmuon.pretrain.runfolder import RunFolder
from distmuon.pretrain.sample import sample_text

logger = logging.getLogger(__name__)


def make_sample(parts: Parts, corpus: Corpus) -> str | None:
    """The text that the model writes at the end, if one was asked for; all ranks have to call it."""
    train = parts.config.train
    if train.sample_tokens == 0:
        return None
    if corpus.tokenizer is None:
        logger.warning("no sample text: the data does not say its tokenizer, so set data.tokenizer")
        return None
    sample = sample_text(
        parts.placed.model,
        corpus.tokenizer,
        train.sample_prompt,
        train.sample_tokens,
        device=parts.device,
        dtype=parts.dtype,
        seed=train.seed,
    )
    logger.info("sample:\n%s", sample)
    return sample


def write_report(parts: Parts, folder: RunFolder, sample: str | None) -> Summary:
    """Write ``summary.json`` and ``loss.png``, and tell the result; on rank 0.

    Raises:
        OSError: If the disk refuses it.
    """
    config, records = parts.config, read_metrics(folder.metrics)
    summary = summarize(
        records,
        run_dir=folder.path,
        optimizer=config.optim.name,
        parameters=count_parameters(parts.placed.model),
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
