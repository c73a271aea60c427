"""Text to token ids and back: bytes, transformers and tiktoken behind one interface."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from distmuon.pretrain.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    """What the package asks of a tokenizer.

    Attributes:
        name: The value of ``data.tokenizer`` that opens it.
        vocab_size: One more than the largest id it can produce.
        separator: The id that is put before every document.
    """

    name: str
    vocab_size: int
    separator: int

    def encode(self, text: str) -> Tokens:
        """The ids of ``text``: a 1-D array of uint16, or of uint32 for a vocabulary over 65536."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """``encode`` of every text; faster than one by one where the library has threads."""

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of ``ids``."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest of uint16 and uint32 that holds every id below ``vocab_size``."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as the separator of documents."""

    name = "bytes"
    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> Tokens:
        """The UTF-8 bytes of ``text`` as uint16."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """``encode`` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of ``ids``; separators are left out and broken UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


class TransformersTokenizer:
    """A tokenizer of the transformers library; the separator is its end (or begin) of sequence token.

    Args:
        name: Name or folder for ``transformers.AutoTokenizer.from_pretrained``.

    Raises:
        UserError: It cannot be loaded, or has no token that could separate documents.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self.name = name
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # the library raises many kinds, by what is missing
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.tokenizer {name!r} could not be loaded by transformers ({reason}); give the name or "
                "folder of a tokenizer, 'tiktoken:gpt2' or 'bytes'."
            ) from error
        found = self._tokenizer
        candidates = (found.eos_token_id, found.bos_token_id, found.sep_token_id)
        separator = next((i for i in candidates if i is not None), None)
        if separator is None:
            raise UserError(
                f"data.tokenizer {name!r} has no end, begin or separator token, but one must stand between "
                "documents; add an eos_token to the tokenizer."
            )
        self.separator: int = separator
        # ids may have holes, so the number of entries is not enough
        self.vocab_size: int = max(found.get_vocab().values()) + 1
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: str) -> Tokens:
        """The ids of ``text``, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """``encode`` of every text, in the library's threads."""
        rows = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(row, dtype=self._dtype) for row in rows]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of ``ids``, special tokens included."""
        return str(self._tokenizer.decode([int(i) for i in ids]))


class TiktokenTokenizer:
    """An encoding of the tiktoken library.

    Args:
        encoding: Its name, for example ``gpt2``.

    Raises:
        UserError: tiktoken is not installed, or does not know or cannot load the encoding.
    """

    def __init__(self, encoding: str) -> None:
        self.name = f"tiktoken:{encoding}"
        try:
            tiktoken: Any = importlib.import_module("tiktoken")
        except ImportError as error:
            raise UserError(
                f"data.tokenizer {self.name!r} needs the tiktoken package, which is not installed; run "
                "'pip install tiktoken'."
            ) from error
        try:
            self._encoding: Any = tiktoken.get_encoding(encoding)
        except Exception as error:  # unknown name, or no network for its table
            raise UserError(
                f"data.tokenizer {self.name!r} could not be loaded by tiktoken ({error}); give an encoding "
                "that it knows, such as 'tiktoken:gpt2'."
            ) from error
        self.vocab_size: int = self._encoding.n_vocab
        self.separator: int = self._encoding.eot_token
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: str) -> Tokens:
        """The ids of ``text``; what looks like a special token is plain text."""
        return np.asarray(self._encoding.encode_ordinary(text), dtype=self._dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """``encode`` of every text, in the library's threads."""
        rows = self._encoding.encode_ordinary_batch(list(texts))
        return [np.asarray(row, dtype=self._dtype) for row in rows]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of ``ids``."""
        return str(self._encoding.decode([int(i) for i in ids]))


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a value of ``data.tokenizer`` names.

    Raises:
        UserError: It cannot be loaded.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name.startswith("tiktoken:"):
        return TiktokenTokenizer(name.removeprefix("tiktoken:"))
    return TransformersTokenizer(name)
