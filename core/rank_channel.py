"""How do the processes of one worker talk? Over a line of messages between rank 0 and each of the others.

Both ends are processes that one worker started for itself, on one host, and they prove it by a secret when they connect
(``multiprocessing.connection``): so messages are pickled objects, and a message's class says who hears it. What is sent
from one end is handled in that order, on a thread of the other end's. Invariants: ``on_lost`` is called at most once,
when the other process is gone or a message could not be handled, and not after ``close``; whoever waits for an answer
gets one, or ``RankLost``.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from core.errors import PrfaasError, RankLost

logger = logging.getLogger(__name__)

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class _Asked:
    number: int
    message: object


@dataclass(frozen=True, slots=True)
class _Answer:
    number: int
    value: object
    error: PrfaasError | None


class RankChannel:
    """One end of a line. ``peer``: what the other end is called in messages to people."""

    def __init__(self, connection: Connection[Any, Any], peer: str, on_lost: Callable[[RankLost], None]) -> None:
        self.peer = peer
        self._connection = connection
        self._on_lost = on_lost
        self._handlers: dict[type, Callable[[Any], object]] = {}
        self._asked: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._lost: RankLost | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._read, name=f"line to {peer}", daemon=True)

    def hear(self, kind: type[M], handler: Callable[[M], object]) -> None:
        """Have messages of that class handled, on the line's thread: later ones wait. Before they may come.

        What the handler of an asked one returns is the answer, or what it raises, if that is an error of ours.
        """
        self._handlers[kind] = handler

    def start(self) -> None:
        """Begin to hear the other end."""
        self._thread.start()

    def send(self, message: object) -> None:
        """Any thread may. Raises ``RankLost`` if the other end is gone."""
        with self._sending:
            try:
                self._connection.send(message)
            except (OSError, ValueError) as error:
                raise RankLost(f"{self.peer} is gone: {error}") from error

    def ask(self, message: object) -> Future[Any]:
        """What the other end's handler returns or raises; ``RankLost`` if it is gone by then."""
        future: Future[Any] = Future()
        with self._lock:
            if self._lost is not None:
                future.set_exception(self._lost)
                return future
            number = next(self._numbers)
            self._asked[number] = future
        try:
            self.send(_Asked(number, message))
        except RankLost as error:
            self._settle(number, None, error)
        return future

    def join(self, timeout_s: float) -> None:
        """Wait until the line is broken."""
        self._thread.join(timeout_s)

    def close(self) -> None:
        """Hear nothing any more. May be called twice."""
        self._closed = True
        with self._sending:
            self._connection.close()

    # ---- the line's thread ----

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError, TypeError) as error:  # TypeError: closed while it was read
                self._lose(RankLost(f"{self.peer} is gone: {error or 'its process has ended'}"))
                return
            try:
                self._handle(message)
            except Exception as error:  # this end no longer does what the other believes
                if not self._closed:
                    logger.exception("a message of %s failed", self.peer)
                self._lose(RankLost(f"a message of {self.peer} failed: {type(error).__name__}: {error}"))
                return

    def _handle(self, message: object) -> None:
        if isinstance(message, _Answer):
            self._settle(message.number, message.value, message.error)
        elif isinstance(message, _Asked):
            value, error = None, None
            try:
                value = self._handlers[type(message.message)](message.message)
            except PrfaasError as raised:
                error = raised
            self.send(_Answer(message.number, value, error))
        else:
            self._handlers[type(message)](message)

    def _settle(self, number: int, value: object, error: PrfaasError | None) -> None:
        with self._lock:
            future = self._asked.pop(number, None)
        if future is None:
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def _lose(self, error: RankLost) -> None:
        with self._lock:
            self._lost = error
            numbers = list(self._asked)
        for number in numbers:
            self._settle(number, None, error)
        if not self._closed:
            self._on_lost(error)


class RankLines:
    """Rank 0's lines to all the others; ``channels[i]`` leads to rank ``i + 1``."""

    def __init__(self, channels: Sequence[RankChannel]) -> None:
        self._channels = tuple(channels)

    def start(self) -> None:
        """Begin to hear them."""
        for channel in self._channels:
            channel.start()

    @property
    def num_ranks(self) -> int:
        """Of the worker, this one included."""
        return len(self._channels) + 1

    def hear(self, kind: type[M], handler: Callable[[int, M], None]) -> None:
        """As ``RankChannel.hear``; the handler is told from which rank it comes."""
        for rank, channel in enumerate(self._channels, 1):
            channel.hear(kind, lambda message, rank=rank: handler(rank, message))  # type: ignore[misc]

    def send(self, rank: int, message: object) -> None:
        """To one of the others. Raises ``RankLost``."""
        self._channels[rank - 1].send(message)

    def send_all(self, message: object) -> None:
        """To each of the others. Raises ``RankLost``."""
        for channel in self._channels:
            channel.send(message)

    def ask_all(self, message: object, timeout_s: float) -> list[Any]:
        """What each of the others answers, in their order. Raises the first error, or ``RankLost`` for silence.

        Must not be called on a line's thread.
        """
        asked = [channel.ask(message) for channel in self._channels]
        answers = []
        for channel, future in zip(self._channels, asked, strict=True):
            try:
                answers.append(future.result(timeout_s))
            except FutureTimeout:
                raise RankLost(f"{channel.peer} did not answer within {timeout_s:g} s") from None
        return answers

    def close(self) -> None:
        """Hear none of them any more."""
        for channel in self._channels:
            channel.close()
