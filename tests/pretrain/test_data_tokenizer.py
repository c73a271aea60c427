"""The tokenizers behind one interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmuon.pretrain.data import ByteTokenizer, open_tokenizer
from distmuon.pretrain.data.tokenizer import token_dtype
from distmuon.pretrain.errors import UserError


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([256, *ids, 256]) == text


def save_word_tokenizer(folder: Path, eos: str | None = "<end>") -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "<unk>": 1, "def": 2, "return": 3, "x": 9}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token=eos, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_transformers(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(save_word_tokenizer(tmp_path)))
    assert (tokenizer.vocab_size, tokenizer.separator) == (10, 0)
    assert tokenizer.encode("def x").tolist() == [2, 9]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["x", "return x"])] == [[9], [3, 9]]
    assert "return" in tokenizer.decode(np.array([3, 9], dtype=np.uint16))


def test_transformers_needs_a_separator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no end, begin or separator"):
        open_tokenizer(str(save_word_tokenizer(tmp_path, eos=None)))


def test_transformers_names_what_it_cannot_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no-tokenizer-here.*could not be loaded"):
        open_tokenizer(str(tmp_path / "no-tokenizer-here"))


def test_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = SimpleNamespace(
        n_vocab=70_000,
        eot_token=69_999,
        encode_ordinary=lambda text: [ord(c) for c in text],
        encode_ordinary_batch=lambda texts: [[ord(c) for c in text] for text in texts],
        decode=lambda ids: "".join(map(chr, ids)),
    )

    def get_encoding(name: str) -> SimpleNamespace:
        if name != "gpt2":
            raise ValueError(f"unknown encoding {name}")
        return encoding

    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=get_encoding))
    tokenizer = open_tokenizer("tiktoken:gpt2")
    ids = tokenizer.encode("ab")
    assert ids.dtype == np.uint32 and tokenizer.decode(ids) == "ab"
    assert tokenizer.encode_batch(["ab"])[0].tolist() == ids.tolist()
    assert (tokenizer.name, tokenizer.separator) == ("tiktoken:gpt2", 69_999)
    with pytest.raises(UserError, match=r"tiktoken:gpt9.*unknown encoding"):
        open_tokenizer("tiktoken:gpt9")


def test_missing_tiktoken_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install tiktoken"):
        open_tokenizer("tiktoken:gpt2")


def test_token_dtype() -> None:
    assert token_dtype(65_536) is np.uint16
    assert token_dtype(65_537) is np.uint32
