"""The tokenizer of a run as transformers saves it."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distmuon.pretrain.data import ByteTokenizer, DataConfig, open_tokenizer
from distmuon.pretrain.data.files import find_files
from distmuon.pretrain.data.metadata import read_metadata
from distmuon.pretrain.errors import UserError

SEPARATOR = "<|separator|>"


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer, or why there is none to save.

    Attributes:
        description: What it is, for a user.
        separator: The id between documents; None where it is not known.
        tokenizer: Of transformers; None where there is none.
    """

    description: str
    separator: int | None = None
    tokenizer: Any = None

    def save(self, folder: pathlib.Path) -> None:
        """Write it, if there is one.

        Raises:
            OSError: If the disk refuses it.
        """
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def find_tokenizer(config: DataConfig) -> SavedTokenizer:
    """The tokenizer that made a run's tokens, if the run and this machine know it."""
    name, reason = _name(config)
    if name is None:
        return SavedTokenizer(f"no tokenizer ({reason})")
    if name == "bytes":
        return SavedTokenizer("tokenizer of bytes", ByteTokenizer.separator, byte_tokenizer())
    try:
        separator = open_tokenizer(name).separator
    except UserError as error:
        return SavedTokenizer(f"no tokenizer ({error})")
    if name.startswith("tiktoken:"):
        return SavedTokenizer(f"no tokenizer (it is {name}, which transformers does not save)", separator)
    return SavedTokenizer(f"tokenizer {name}", separator, AutoTokenizer.from_pretrained(name))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """`ByteTokenizer` as one of transformers: the same ids, and ``<|separator|>`` for its separator."""
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
    )


def _alphabet() -> list[str]:
    """The character that the byte-level form of the tokenizers library has for each byte.

    Printable characters of Latin-1 stand for themselves, the other bytes for characters from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _name(config: DataConfig) -> tuple[str | None, str]:
    """The ``data.tokenizer`` of the tokens, or why it is not known."""
    if config.source == "builtin":
        return config.tokenizer, ""
    # what shards say of themselves goes first; else the default says nothing about those that someone else made
    written = None if config.tokenizer == "bytes" else config.tokenizer
    try:
        root, _, kind = find_files(config)
        if kind != "bin":
            return config.tokenizer, ""
        metadata = read_metadata(root)
    except UserError as error:
        return written, str(error)
    return (metadata.tokenizer, "") if metadata is not None else (written, "the shards do not say it")
