"""``metadata.json``: what a folder of shards says about itself."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from distmuon.pretrain.errors import UserError

NAME = "metadata.json"


@dataclass(frozen=True)
class Metadata:
    """What ``tokenize_to_shards`` notes beside the shards.

    Attributes:
        tokenizer: The value of ``data.tokenizer`` that made them.
        vocab_size: One more than the largest id possible.
        train_tokens: Tokens of the training shards.
        val_tokens: Tokens of the validation shards.
        val_bytes_per_token: Bytes of UTF-8 text for each validation token.
        description: Where the text is from.
    """

    tokenizer: str
    vocab_size: int
    train_tokens: int
    val_tokens: int
    val_bytes_per_token: float
    description: str


def write_metadata(folder: Path, metadata: Metadata) -> Path:
    """Write the file under a temporary name and rename it."""
    target = folder / NAME
    temporary = folder / f".{NAME}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(metadata), indent=2) + "\n", encoding="utf-8")
    temporary.replace(target)
    return target


def read_metadata(folder: Path) -> Metadata | None:
    """The metadata of a folder, or None where no file has them.

    Raises:
        UserError: The file is there but does not hold the fields of ``Metadata``.
    """
    target = folder / NAME
    try:
        values = json.loads(target.read_text(encoding="utf-8"))
        return Metadata(**{field.name: values[field.name] for field in dataclasses.fields(Metadata)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{target} does not hold the metadata of token shards ({type(error).__name__}: {error}); write "
            "the shards again with 'distmuon tokenize', or delete this file."
        ) from error
