"""The settings of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distmuon.pretrain.errors import UserError

Format = Literal["auto", "text", "jsonl", "parquet", "bin"]


@dataclass(kw_only=True)
class DataConfig:
    """Where the training text comes from and how it becomes tokens.

    Attributes:
        source: ``builtin`` (the running Python's own standard library), or a file, a folder or a glob
            pattern of text files, ``.jsonl``, ``.parquet`` or ``.bin`` token shards.
        format: What ``source`` holds; ``auto`` goes by the file names.
        text_column: The column of ``.jsonl`` and ``.parquet`` rows that holds the text.
        tokenizer: ``bytes`` (256 byte values and a separator), ``tiktoken:<encoding>``, or the name or folder
            of a tokenizer for ``transformers.AutoTokenizer``. Not used for ``.bin`` shards whose folder has
            a ``metadata.json``.
        sequence_length: Tokens of context in one training sample.
        val_fraction: Share of the text that is held out for validation, above 0 and below 1.
        max_megabytes: Read at most this many megabytes (10^6 bytes of text; of tokens for ``.bin``); none
            reads everything.
        seed: Seed of the training order. The split into training and validation does not depend on it.
        cache_dir: Folder for tokenized text; none means ``distmuon`` in the user's cache folder.
    """

    source: str = "builtin"
    format: Format = "auto"
    text_column: str = "text"
    tokenizer: str = "bytes"
    sequence_length: int = 256
    val_fraction: float = 0.05
    max_megabytes: float | None = None
    seed: int = 0
    cache_dir: str | None = None

    def validate(self) -> None:
        """Check the values that need no look at the data.

        Raises:
            UserError: A value is out of its range.
        """
        if self.sequence_length < 1:
            raise UserError(
                f"data.sequence_length is {self.sequence_length}, but a sample needs at least 1 token; "
                "set a positive length."
            )
        if not 0 < self.val_fraction < 1:
            raise UserError(
                f"data.val_fraction is {self.val_fraction}, but it must lie between 0 and 1; set for example 0.05."
            )
        if self.max_megabytes is not None and not self.max_megabytes > 0:
            raise UserError(
                f"data.max_megabytes is {self.max_megabytes}, but a limit must be above 0; "
                "set a positive number, or null to read everything."
            )
        if self.seed < 0:
            raise UserError(f"data.seed is {self.seed}, but a seed must not be negative; set 0 or more.")

    @property
    def max_bytes(self) -> int | None:
        """The limit of ``max_megabytes`` in bytes, or None."""
        return None if self.max_megabytes is None else max(1, int(self.max_megabytes * 1e6))
