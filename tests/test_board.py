"""The board in a store on which ranks leave word: what is read, what it costs, and that it does not grow."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distmuon.comm.board import Board, Word

EXCHANGE = "the exchange of the bucket of 'model.layers.7.self_attn.q_proj.weight' (4096, 4096) and 3 others"


class Counting:
    """A store that counts requests and what it sends back, in bytes."""

    def __init__(self, store: Any) -> None:
        self.store, self.requests, self.sent = store, Counter[str](), 0

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: Any) -> Any:
            self.requests[name] += 1
            answer = getattr(self.store, name)(*arguments)
            self.sent += len(answer) if isinstance(answer, bytes) else 0
            return answer

        return request


@pytest.fixture(params=["tcp", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "file":
        return dist.FileStore(str(tmp_path / "store"), 1)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_each_rank_has_its_last_word(store: Any) -> None:
    boards = [Board(dist.PrefixStore("group", store), 3) for _ in range(3)]
    assert boards[0].read() == {}
    boards[0].say(0, 1.5, "the sums")
    boards[2].say(2, 0.25, EXCHANGE)
    assert boards[1].read() == {0: Word("the sums", 1.5), 2: Word(EXCHANGE, 0.25)}
    boards[2].say(2, 3.0, "the sums")
    boards[0].take_back(0)
    assert boards[1].read() == boards[1].read() == Board(dist.PrefixStore("group", store), 3).read()
    assert boards[1].read() == {2: Word("the sums", 3.0)}


def test_words_move_on_over_pages_and_old_pages_go() -> None:
    store = dist.HashStore()
    board, reader = Board(store, 2), Board(store, 2)
    for number in range(100):
        board.say(number % 2, number, "the sums")
        board.take_back(number % 2)
        board.say(number % 2, number, f"the {number % 3}")
        expected = {number % 2: Word(f"the {number % 3}", number)}
        if number:
            expected[1 - number % 2] = Word(f"the {(number - 1) % 3}", number - 1)
        assert reader.read() == expected
    assert store.num_keys() < 10


def test_a_word_that_was_counted_and_not_yet_written_is_read_later() -> None:
    store = dist.HashStore()
    board, reader = Board(store, 2), Board(store, 2)
    board.say(0, 1.0, "the sums")
    number = store.add("distmuon/waits/count", 1)
    assert reader.read().keys() == {0}
    store.append(
        f"distmuon/waits/page/{number // 8}", store.get("distmuon/waits/page/0").decode().replace("0 1", "1 1")
    )
    assert reader.read().keys() == {0, 1}


@pytest.mark.parametrize("ranks", [512, 2048])
def test_the_requests_of_a_reader_do_not_grow_with_the_ranks(ranks: int) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = Counting(dist.PrefixStore("default_pg", server))
    for rank in range(ranks):
        if rank != 7:
            Board(store, ranks).say(rank, 600.0 + rank, EXCHANGE)
    assert store.requests.total() == 3 * (ranks - 1)
    store.requests.clear()
    store.sent = 0
    reader = Board(store, ranks)
    words = reader.read()
    assert words.keys() == {*range(ranks)} - {7}
    assert words[ranks - 1] == Word(EXCHANGE, 600.0 + ranks - 1)
    assert store.requests.total() <= 5
    assert store.sent < 35 * ranks
    assert reader.read() == words
    assert store.requests.total() <= 6
