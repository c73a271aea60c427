"""Divide documents into training and validation text, the same way every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from distmuon.pretrain.data.documents import Documents

Split = Literal["train", "val"]


def split_documents(
    documents: Documents, val_fraction: float, max_bytes: int | None = None
) -> Iterator[tuple[Split, str]]:
    """Give every document to one of the two splits.

    A document goes whole to validation whenever validation has less than its share of the bytes so far, so
    that the share is kept whatever the sizes. Where so few documents exist that the share is less than one
    of them, the end of each document is cut off for validation instead.

    Args:
        documents: The texts; the outcome depends on their order and sizes only.
        val_fraction: The share of the bytes for validation, in (0, 1).
        max_bytes: Stop after this many bytes of UTF-8; the last document is cut to fit.

    Yields:
        The split and the text, never empty.
    """
    cut_tails = len(documents) * val_fraction < 1
    # with a limit, one large file must not fill validation far beyond its share
    largest_val = None if max_bytes is None else 2 * val_fraction * max_bytes
    total = val = 0
    for text in documents:
        data = text.encode("utf-8", errors="replace")
        if max_bytes is not None and total + len(data) > max_bytes:
            text = data[: max_bytes - total].decode("utf-8", errors="ignore")
            data = text.encode("utf-8")
        if text and cut_tails:
            middle = len(text) - max(1, round(val_fraction * len(text)))
            if middle > 0:
                yield "train", text[:middle]
            yield "val", text[middle:]
        elif text:
            fits = largest_val is None or len(data) <= largest_val
            if fits and val < val_fraction * total:
                val += len(data)
                yield "val", text
            else:
                yield "train", text
        total += len(data)
        if max_bytes is not None and total >= max_bytes:
            return
