"""A board in a store, where ranks leave word of what they wait for; who reads those of all ranks asks once for all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeAlias

import torch.distributed as dist

Store: TypeAlias = "dist.Store"  # type: ignore[name-defined]  # torch's stubs leave it out

_COUNT = "distmuon/waits/count"
# In the place of a text: nothing is waited for any longer
_NOTHING = "-"
# Words a rank on a page. A reader gets the last two pages, and older ones go, so that the store does not grow.
_PER_RANK = 4


@dataclass(frozen=True)
class Word:
    """What a rank waits for, and the seconds that it had waited when it said so."""

    what: str
    seconds: float


class Board:
    """What ranks say in a store: each has its last word on it, or none.

    Each word is a line that is appended to the present page, so that all words are read in one request; what many wait
    for alike is on the board once. A word costs three requests, and a look at the board one, or five if there is news.

    Args:
        store: A store that all of the ranks use.
        ranks: Number of them, the same on all.
    """

    def __init__(self, store: Store, ranks: int) -> None:
        self._store, self._page_size = store, _PER_RANK * ranks
        self._seen = 0
        self._words: dict[int, Word] = {}
        self._texts: dict[str, str] = {}

    def say(self, rank: int, seconds: float, what: str) -> None:
        """Leave word, in the place of what this rank said before."""
        digest = hashlib.sha256(what.encode()).hexdigest()[:16]
        self._store.set(_text(digest), what)
        self._append(f"{rank} {seconds:.3f} {digest}\n")

    def take_back(self, rank: int) -> None:
        """Have this rank say nothing."""
        self._append(f"{rank} 0 {_NOTHING}\n")

    def read(self) -> dict[int, Word]:
        """The last word of each rank that has one."""
        count = self._store.add(_COUNT, 0)
        if count == self._seen:
            return self._words
        last, lines = count // self._page_size, list[str]()
        for page in range(max(0, last - 1), last + 1):
            # who has counted may not have written yet, and a key that is not there would be waited for
            if self._store.check([_page(page)]):
                lines += self._store.get(_page(page)).decode().splitlines()
        # what has been counted and is not there yet is read the next time
        first = max(1, (last - 1) * self._page_size)
        self._seen = count if len(lines) > count - first else 0
        words = {int(rank): (float(seconds), digest) for rank, seconds, digest in map(str.split, lines)}
        self._words = {
            rank: Word(self._read_text(digest), seconds)
            for rank, (seconds, digest) in words.items()
            if digest != _NOTHING
        }
        return self._words

    def _append(self, line: str) -> None:
        number = self._store.add(_COUNT, 1)
        page = number // self._page_size
        self._store.append(_page(page), line)
        if number % self._page_size == 0 and page > 1:
            self._store.delete_key(_page(page - 2))

    def _read_text(self, digest: str) -> str:
        if digest not in self._texts:
            self._texts[digest] = self._store.get(_text(digest)).decode()
        return self._texts[digest]


def _page(number: int) -> str:
    return f"distmuon/waits/page/{number}"


def _text(digest: str) -> str:
    return f"distmuon/waits/text/{digest}"
