"""Two processes with a page pool each, and the arms between them, as the KV benchmark drives them.

Invariants: the pools are shared memory of the benchmark, so every pair of processes moves the same bytes and what
arrived can be compared; a pair that is not in its turn is stopped (SIGSTOP), so that no thread of it takes processor
time from another arm; a pair whose call failed to return is killed; no process outlives the ``with`` block.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.child_process import ChildProcess, Wrap
from benchmarks.kv_arms import Arm, Environment, PlainNixl
from benchmarks.kv_end import MOVE_TIMEOUT_S, Moved
from core.credentials import Credentials

_CALL_TIMEOUT_S = MOVE_TIMEOUT_S + 10.0


@dataclass(frozen=True)
class Side:
    """Where one of the two processes runs."""

    wrap: Wrap
    host: str
    memory_fd: int


def _start(side: Side, pool_pages: int, environment: Environment) -> ChildProcess:
    arguments = [str(side.memory_fd), str(pool_pages), side.host]
    return ChildProcess(side.wrap, "benchmarks.kv_peer", arguments, fds=[side.memory_fd], variables=dict(environment))


class Pair:
    """The two processes of one environment; a context manager, stopped until ``resume``."""

    def __init__(self, left: Side, right: Side, pool_pages: int, environment: Environment) -> None:
        """Bytes go from ``left`` to ``right``."""
        with ExitStack() as cleanup:
            self._left = _start(left, pool_pages, environment)
            cleanup.callback(self._left.close)
            self._right = _start(right, pool_pages, environment)
            cleanup.callback(self._right.close)
            for process in (self._left, self._right):
                process.call("cpu_s")  # it is up
            self._cleanup = cleanup.pop_all()
        self._opened: set[Arm] = set()
        self._num_moves = 0

    @property
    def process_ids(self) -> tuple[int, int]:
        """Of the left and of the right process."""
        return self._left.process_id, self._right.process_id

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._cleanup.close()

    def pause(self) -> None:
        for process in (self._left, self._right):
            process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        for process in (self._left, self._right):
            process.signal(signal.SIGCONT)

    def move(
        self, arm: Arm, src_pages: tuple[int, ...], dst_pages: tuple[int, ...], credentials: Credentials | None
    ) -> tuple[Moved, float]:
        """Move the pages once; what the moving end measured, and the processor seconds of both processes."""
        if arm not in self._opened:
            self._open(arm, credentials)
        self._num_moves += 1
        session = f"move-{self._num_moves}"
        began = self._cpu_s()
        if isinstance(arm, PlainNixl) and arm.operation == "READ":  # the end that wants the bytes fetches them
            offer = self._left.call("expect", arm, session, src_pages)
            moved = self._right.call("move", arm, session, dst_pages, offer, timeout_s=_CALL_TIMEOUT_S)
        else:
            offer = self._right.call("expect", arm, session, dst_pages)
            moved = self._left.call("move", arm, session, src_pages, offer, timeout_s=_CALL_TIMEOUT_S)
        return moved, self._cpu_s() - began

    def _open(self, arm: Arm, credentials: Credentials | None) -> None:
        greeting = self._right.call("open", arm, False, credentials)
        answer = self._left.call("open", arm, True, credentials)
        self._left.call("meet", arm, greeting)
        self._right.call("meet", arm, answer)
        self._opened.add(arm)

    def _cpu_s(self) -> float:
        return float(self._left.call("cpu_s")) + float(self._right.call("cpu_s"))
