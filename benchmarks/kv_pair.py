"""Two processes with a page pool each, and the arms between them, as the KV benchmark drives them.

Invariants: the pools are shared memory of the benchmark, so every pair of processes moves the same bytes and what
arrived can be compared; a pair that is not in its turn is stopped (SIGSTOP), so that no thread of it takes processor
time from another arm; a pair whose call failed to return is killed; no process outlives the ``with`` block.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.kv_arms import Arm, Environment, PlainNixl, variables
from benchmarks.kv_end import MOVE_TIMEOUT_S, Moved
from core.credentials import Credentials

Wrap = Callable[[Sequence[str]], list[str]]  # a command |-> the same within a namespace

_ROOT = Path(__file__).resolve().parent.parent
_CALL_TIMEOUT_S = MOVE_TIMEOUT_S + 10.0


class CallFailed(Exception):
    """A process of the pair said why it could not do what it was asked."""


class PairBroken(CallFailed):
    """A process of the pair ended or did not answer; the pair is of no more use."""


@dataclass(frozen=True)
class Side:
    """Where one of the two processes runs."""

    wrap: Wrap
    host: str
    memory_fd: int


class PeerProcess:
    """A ``kv_peer`` process and the calls to it."""

    def __init__(self, side: Side, pool_pages: int, environment: Environment) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            words = [str(theirs.fileno()), str(side.memory_fd), str(pool_pages), side.host]
            self._process = subprocess.Popen(
                side.wrap([sys.executable, "-m", "benchmarks.kv_peer", *words]),
                cwd=_ROOT,
                env={**os.environ, **variables(environment)},
                pass_fds=(theirs.fileno(), side.memory_fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._control = Connection(ours.detach())

    @property
    def process_id(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returned. Raises CallFailed with its reason, PairBroken when none came."""
        try:
            self._control.send((method, arguments))
            if not self._control.poll(_CALL_TIMEOUT_S):
                raise PairBroken(f"{method} has not returned after {_CALL_TIMEOUT_S:.0f} s")
            ok, result = self._control.recv()
        except (EOFError, OSError) as error:
            raise PairBroken(f"the process ended in {method}: exit code {self._process.poll()}") from error
        if not ok:
            raise CallFailed(result)
        return result

    def signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


class Pair:
    """The two processes of one environment; a context manager, stopped until ``resume``."""

    def __init__(self, left: Side, right: Side, pool_pages: int, environment: Environment) -> None:
        """Bytes go from ``left`` to ``right``."""
        with ExitStack() as cleanup:
            self._left = PeerProcess(left, pool_pages, environment)
            cleanup.callback(self._left.close)
            self._right = PeerProcess(right, pool_pages, environment)
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
            moved = self._right.call("move", arm, session, dst_pages, offer)
        else:
            offer = self._right.call("expect", arm, session, dst_pages)
            moved = self._left.call("move", arm, session, src_pages, offer)
        return moved, self._cpu_s() - began

    def _open(self, arm: Arm, credentials: Credentials | None) -> None:
        greeting = self._right.call("open", arm, False, credentials)
        answer = self._left.call("open", arm, True, credentials)
        self._left.call("meet", arm, greeting)
        self._right.call("meet", arm, answer)
        self._opened.add(arm)

    def _cpu_s(self) -> float:
        return float(self._left.call("cpu_s")) + float(self._right.call("cpu_s"))
