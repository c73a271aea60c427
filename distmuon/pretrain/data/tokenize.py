"""Turn any source of text into training and validation shards."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from distmuon.pretrain.data.config import DataConfig
from distmuon.pretrain.data.documents import open_documents
from distmuon.pretrain.data.metadata import Metadata, write_metadata
from distmuon.pretrain.data.shards import MAX_TOKENS, write_shard
from distmuon.pretrain.data.split import Split, split_documents
from distmuon.pretrain.data.tokenizer import Tokenizer, Tokens, open_tokenizer, token_dtype
from distmuon.pretrain.errors import UserError

_BATCH_CHARACTERS = 1 << 20  # texts given to the tokenizer together, so that its threads have work


def tokenize_to_shards(
    config: DataConfig, out_dir: str | os.PathLike[str], shard_tokens: int = 100_000_000
) -> list[Path]:
    """Write ``train_000000.bin``, ..., ``val_000000.bin``, ... and ``metadata.json``.

    Every document starts with the tokenizer's separator. The metadata are written last, so a folder that
    has them is complete.

    Args:
        config: Names the text, the tokenizer and the split; ``cache_dir`` and ``sequence_length`` do not matter.
        out_dir: Folder to write to; made if missing.
        shard_tokens: Tokens in one shard; the last of each split may have fewer.

    Returns:
        The shards, training ones first.

    Raises:
        UserError: The source or the tokenizer cannot be opened, one split gets no text, ``shard_tokens`` is
            out of range, or ``out_dir`` already holds shards.
    """
    config.validate()
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise UserError(
            f"shard_tokens is {shard_tokens}, but a shard holds 1 to {MAX_TOKENS} tokens; set such a number."
        )
    folder = Path(out_dir)
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} already holds .bin files, but shards of two runs must not mix; name an empty folder."
        )
    documents = open_documents(config)
    tokenizer = open_tokenizer(config.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    splits: tuple[Split, Split] = ("train", "val")
    writers = {split: _Writer(folder, split, shard_tokens, tokenizer) for split in splits}
    for split, text in split_documents(documents, config.val_fraction, config.max_bytes):
        writers[split].add(text)
    for split, writer in writers.items():
        writer.finish()
        if not writer.tokens:
            raise UserError(
                f"data.source {config.source!r} ({documents.description}) leaves no text for {split}; give "
                "more text, or change data.val_fraction or data.max_megabytes."
            )
    train, val = writers["train"], writers["val"]
    write_metadata(
        folder,
        Metadata(
            tokenizer=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            train_tokens=train.tokens,
            val_tokens=val.tokens,
            val_bytes_per_token=val.text_bytes / val.tokens,
            description=documents.description,
        ),
    )
    return train.paths + val.paths


class _Writer:
    """Gathers the tokens of one split and writes a shard whenever enough have come together."""

    def __init__(self, folder: Path, split: Split, shard_tokens: int, tokenizer: Tokenizer) -> None:
        self.tokens = 0
        self.text_bytes = 0
        self.paths: list[Path] = []
        self._folder = folder
        self._split = split
        self._shard_tokens = shard_tokens
        self._tokenizer = tokenizer
        self._separator: Tokens = np.asarray([tokenizer.separator], dtype=token_dtype(tokenizer.vocab_size))
        self._texts: list[str] = []
        self._characters = 0
        self._pending: list[Tokens] = []
        self._pending_tokens = 0

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS:
            self._encode()

    def finish(self) -> None:
        self._encode()
        self._write(1)

    def _encode(self) -> None:
        for text, ids in zip(self._texts, self._tokenizer.encode_batch(self._texts), strict=True):
            self._pending += [self._separator, ids]
            self._pending_tokens += 1 + len(ids)
            self.tokens += 1 + len(ids)
            self.text_bytes += len(text.encode("utf-8", errors="replace"))
        self._texts, self._characters = [], 0
        self._write(self._shard_tokens)

    def _write(self, at_least: int) -> None:
        """Write full shards, and a shorter one if ``at_least`` allows it."""
        if self._pending_tokens < at_least:
            return
        tokens = np.concatenate(self._pending)
        start = 0
        while len(tokens) - start >= at_least:
            piece = tokens[start : start + self._shard_tokens]
            name = f"{self._split}_{len(self.paths):06d}.bin"
            self.paths.append(write_shard(self._folder / name, piece))
            start += len(piece)
        # a copy, so that the written tokens are given back
        self._pending = [tokens[start:].copy()]
        self._pending_tokens = len(self._pending[0])
