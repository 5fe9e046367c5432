from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from queue import SimpleQueue
from typing import Any

import pytest

from core.errors import Incompatible, RankLost
from core.rank_channel import RankChannel, RankLines

WAIT_S = 10.0


@dataclass(frozen=True)
class Told:
    number: int


@dataclass(frozen=True)
class Question:
    number: int


class Line:
    """Both ends."""

    def __init__(self) -> None:
        here, there = Pipe()
        self.lost: SimpleQueue[RankLost] = SimpleQueue()
        self.near = RankChannel(here, "rank 1", self.lost.put)
        self.far = RankChannel(there, "rank 0", self.lost.put)
        self.heard: SimpleQueue[Any] = SimpleQueue()
        self.far.hear(Told, self.heard.put)
        self.far.hear(Question, self.answer)

    def answer(self, question: Question) -> int:
        if question.number < 0:
            raise Incompatible("layout", "4 heads", "3 heads")
        return 2 * question.number

    def start(self) -> None:
        self.near.start()
        self.far.start()

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.close()


def test_messages_are_heard_in_order(line: Line) -> None:
    line.start()
    for number in range(100):
        line.near.send(Told(number))
    assert [line.heard.get(timeout=WAIT_S).number for _ in range(100)] == list(range(100))


def test_questions_get_what_the_handler_returns_or_raises(line: Line) -> None:
    line.start()
    assert RankLines([line.near]).ask_all(Question(4), WAIT_S) == [8]
    with pytest.raises(Incompatible, match="this end has 4 heads"):
        line.near.ask(Question(-1)).result(WAIT_S)


def test_an_end_that_closes_is_lost_to_the_other_once_and_so_is_what_was_asked(line: Line) -> None:
    line.near.start()
    asked = line.near.ask(Question(1))
    line.far.close()
    assert "rank 1 is gone" in str(line.lost.get(timeout=WAIT_S))
    with pytest.raises(RankLost):
        asked.result(WAIT_S)
    with pytest.raises(RankLost):
        line.near.ask(Question(2)).result(WAIT_S)
    assert line.lost.empty()


def test_a_message_that_nobody_handles_ends_the_line(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    line.start()
    line.near.send("what?")
    assert "KeyError" in str(line.lost.get(timeout=WAIT_S))


def test_silence_is_an_error_after_the_time_that_was_given(line: Line) -> None:
    line.near.start()  # the other end does not listen
    with pytest.raises(RankLost, match=r"did not answer within 0\.01 s"):
        RankLines([line.near]).ask_all(Question(1), 0.01)
