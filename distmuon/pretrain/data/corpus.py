"""Open the data of a run: two token streams and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distmuon.pretrain.data.cache import cached_shards
from distmuon.pretrain.data.config import DataConfig
from distmuon.pretrain.data.files import find_files
from distmuon.pretrain.data.metadata import Metadata, read_metadata
from distmuon.pretrain.data.shards import read_shard
from distmuon.pretrain.data.stream import TokenStream
from distmuon.pretrain.data.tokenizer import Tokenizer, open_tokenizer
from distmuon.pretrain.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens.

    Attributes:
        train: The training tokens, uint16 or uint32.
        val: The validation tokens, of other documents.
        tokenizer: What made them; None for shards that do not say it.
        vocab_size: One more than the largest id possible (for shards that do not say it: the largest found).
        val_bytes_per_token: Bytes of text for each validation token, which turns loss into bits per byte;
            None where it is not known.
        description: One line for the log.
    """

    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer | None
    vocab_size: int
    val_bytes_per_token: float | None
    description: str


def open_corpus(config: DataConfig) -> Corpus:
    """Open what ``config`` names; text is tokenized on the first call and cached.

    Raises:
        UserError: A setting is out of range, the source or the tokenizer cannot be opened, or a split is
            shorter than one sample.
    """
    config.validate()
    found = None if config.source == "builtin" else find_files(config)
    if found is not None and found[2] == "bin":
        corpus = _open_bin(config, *found[:2])
    else:
        folder = cached_shards(config)
        # with metadata and separate validation shards, no setting of the text is needed again
        corpus = _open_bin(DataConfig(tokenizer=config.tokenizer), folder, sorted(folder.glob("*.bin")))
    for name, stream in (("training", corpus.train), ("validation", corpus.val)):
        if len(stream) <= config.sequence_length:
            raise UserError(
                f"the {name} data of {config.source!r} has {len(stream):,} tokens, but data.sequence_length "
                f"{config.sequence_length} needs at least {config.sequence_length + 1}; give more text, "
                "lower data.sequence_length or change data.val_fraction."
            )
    return corpus


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Check that a model with ``vocab_size`` ids can embed every token; reads each stream once, in chunks.

    Raises:
        UserError: A token id is ``vocab_size`` or more.
    """
    # the tokenizer's own limit makes reading billions of tokens unnecessary
    if corpus.tokenizer is not None and corpus.vocab_size <= vocab_size:
        return
    largest = max(corpus.train.largest, corpus.val.largest)
    if largest >= vocab_size:
        raise UserError(
            f"the data has token id {largest}, but the model's vocabulary has {vocab_size} ids; set its "
            f"vocab_size to at least {largest + 1}, or use the tokenizer that belongs to the model."
        )


def _open_bin(config: DataConfig, root: Path, files: list[Path]) -> Corpus:
    metadata = read_metadata(root)
    train, val = _split_shards(files, config)
    tokenizer = _shard_tokenizer(config, metadata)
    if metadata is not None:
        vocab_size = metadata.vocab_size
    elif tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    else:
        vocab_size = max(train.largest, val.largest) + 1
    # the number holds for the validation text it was measured on, and for no other selection
    measured = metadata is not None and metadata.val_tokens == len(val)
    return Corpus(
        train=train,
        val=val,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_bytes_per_token=metadata.val_bytes_per_token if metadata is not None and measured else None,
        description=(
            f"{metadata.description if metadata is not None else f'token shards of {config.source}'}: "
            f"{len(train):,} training and {len(val):,} validation tokens, "
            f"tokenizer {tokenizer.name if tokenizer is not None else 'not known'}"
        ),
    )


def _split_shards(files: list[Path], config: DataConfig) -> tuple[TokenStream, TokenStream]:
    """Files with ``val`` in the name are for validation; without any, the end of the last file is."""
    val_files = [file for file in files if "val" in file.name.lower()]
    train_parts = [read_shard(file) for file in files if file not in val_files]
    val_parts = [read_shard(file) for file in val_files]
    if not train_parts:
        raise UserError(
            f"data.source {config.source!r} has only validation shards ({val_files[0].name} ...), but "
            "training needs shards without 'val' in the name; add or rename some."
        )
    if not val_parts:
        last = train_parts[-1]
        middle = len(last) - max(1, round(config.val_fraction * len(last)))
        train_parts[-1], val_parts = last[: max(0, middle)], [last[max(0, middle) :]]
    train = TokenStream(train_parts)
    if config.max_bytes is not None and train.parts:
        train = train.head(max(1, config.max_bytes // train.parts[0].itemsize))
    return train, TokenStream(val_parts)


def _shard_tokenizer(config: DataConfig, metadata: Metadata | None) -> Tokenizer | None:
    if metadata is None:
        # the default says nothing about shards that someone else wrote
        return None if config.tokenizer == "bytes" else open_tokenizer(config.tokenizer)
    try:
        return open_tokenizer(metadata.tokenizer)
    except UserError:
        # training needs the ids only; the tokenizer's files may be on another machine
        return None
