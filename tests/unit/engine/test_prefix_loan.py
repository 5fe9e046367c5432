"""Prefixes on their way out of an engine and into it: whoever leaves before he gets pages leaves none behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from core.prefix_hash import PageHash
from engine.prefix_loan import PrefixLoans
from engine.scheduler import PrefixRoom

NAMES = (PageHash(b"a" * 16), PageHash(b"b" * 16))
ROOM = PrefixRoom(NAMES, (4, 5), 1)
PATIENCE_S = 10.0


class Books:
    """An engine and its thread; each question waits until the test lets it be answered."""

    def __init__(self, lent: tuple[int, ...] = (1, 2), room: PrefixRoom | None = ROOM) -> None:
        self.lent, self.room = lent, room
        self.answer = threading.Event()
        self.asked = threading.Event()
        self.calls: list[tuple[Any, ...]] = []

    def submit(self, fn: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(self))
        return future

    def take_back(self, pages: tuple[int, ...]) -> None:
        self.calls.append(("take_back", pages))

    def adopt(self, room: PrefixRoom) -> None:
        self.calls.append(("adopt", room))

    def num_known_pages(self, names: Sequence[PageHash]) -> int:
        return len(names)

    def lend_prefix(self, names: Sequence[PageHash]) -> tuple[int, ...]:
        self._wait()
        return self.lent

    def expect_prefix(self, names: Sequence[PageHash], num_known: int) -> PrefixRoom | None:
        self._wait()
        return self.room

    def _wait(self) -> None:
        self.asked.set()
        assert self.answer.wait(PATIENCE_S)


def loans_of(books: Books) -> PrefixLoans:
    return PrefixLoans(books, books)  # type: ignore[arg-type]


async def test_what_was_lent_goes_back_through_the_engines_thread() -> None:
    books = Books()
    books.answer.set()
    loans = loans_of(books)

    assert await loans.num_known(NAMES) == 2
    assert await loans.lend(NAMES) == (1, 2)
    assert await loans.expect(NAMES, 1) == ROOM
    await loans.adopt(ROOM)
    loans.give_back((1, 2))

    assert books.calls == [("adopt", ROOM), ("take_back", (1, 2))]


@pytest.mark.parametrize("question", ["lend", "expect", "expect in vain"])
async def test_pages_for_somebody_who_has_left_go_back(question: str) -> None:
    books = Books(room=None if question == "expect in vain" else ROOM)
    loans = loans_of(books)
    asking = asyncio.ensure_future(loans.lend(NAMES) if question == "lend" else loans.expect(NAMES, 1))
    await asyncio.to_thread(books.asked.wait, PATIENCE_S)

    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert books.calls == []
    books.answer.set()

    expected = {"lend": [("take_back", (1, 2))], "expect": [("take_back", (4, 5))], "expect in vain": []}[question]
    async with asyncio.timeout(PATIENCE_S):
        while books.calls != expected or len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.002)


async def test_a_question_that_fails_after_its_asker_left_gives_nothing_back() -> None:
    books = Books()

    def broken(names: Sequence[PageHash]) -> tuple[int, ...]:
        books._wait()
        raise RuntimeError("a bug")

    books.lend_prefix = broken  # type: ignore[method-assign]
    asking = asyncio.ensure_future(loans_of(books).lend(NAMES))
    await asyncio.to_thread(books.asked.wait, PATIENCE_S)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    books.answer.set()
    async with asyncio.timeout(PATIENCE_S):
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.002)
    assert books.calls == []
