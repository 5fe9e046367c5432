"""How do the other ranks of a worker come to be, and how do they end? Rank 0's process starts them, and ends with them.

    start()     a listener at a path that only this user can open; each rank's process connects and shows a secret
    (loading)   all ranks load the model at the same time, rank 0 in the thread of its engine (worker_host.py)
    wait_ready  each says how its pool is reached (``RankReady``), or why it did not start (``RankFailed``)
    (serving)   each tells what its half of the K/V transfer counts (``RankCounts``)
    lost        a line that breaks, or a process that ends: rank 0 is told once, with ``RankLost``, and the worker ends
    stop()      they are asked to stop, and killed if they do not

Ranks are no workers: they register nowhere, and live and die with rank 0. Where they run is the caller's: ``StartRank``
is a process of this host (rank_host.py) or, under Ray, an actor in the worker's placement group (ray_fleet.py).
One that survives rank 0 sees its line break, and ends (rank_host.py).
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, Protocol

from cluster.config import WorkerConfig
from core.errors import PrfaasError, RankLost
from core.kv_layout import KvEnd
from core.rank_channel import RankChannel, RankLines
from kv_transfer.transport import LinkStats

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 120.0  # torch is loaded first, by all of them at once
STOP_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class RankTask:
    """What one rank's process is told. It holds a secret: do not log it."""

    config: WorkerConfig
    rank: int
    size: int
    address: str  # path of rank 0's listener
    secret: bytes
    meeting: str  # file in which torch.distributed meets


@dataclass(frozen=True, slots=True)
class RankReady:
    """A rank has loaded its part."""

    end: KvEnd


@dataclass(frozen=True, slots=True)
class RankFailed:
    """A rank could not start, or could not go on."""

    error: PrfaasError


@dataclass(frozen=True, slots=True)
class StopRank:
    """Asked by rank 0: let go of everything. The answer is that it is done."""


@dataclass(frozen=True, slots=True)
class RankCounts:
    """What one rank's half of the K/V transfer counts, told several times a second."""

    links: tuple[LinkStats, ...] = ()
    bytes_sent: int = 0
    bytes_received: int = 0
    pages_quarantined: int = 0


class RankProcess(Protocol):
    """A rank's process, wherever it runs."""

    def is_alive(self) -> bool: ...
    def kill(self) -> None: ...


StartRank = Callable[[RankTask], RankProcess]


class RankProcesses:
    """The ranks of one worker but the first. Made and used by rank 0's process."""

    def __init__(self, config: WorkerConfig, start: StartRank, on_lost: Callable[[PrfaasError], None]) -> None:
        """``on_lost`` is called once at most, from any thread, until ``stop``: a rank is gone (``RankLost``), or why it
        did not start."""
        self._config = config
        self._start = start
        self._on_lost = on_lost
        self._folder = Path(tempfile.mkdtemp(prefix="prfaas-ranks-"))  # of this user alone
        self._processes: list[RankProcess] = []
        self._lines: RankLines | None = None
        self._ready: list[Future[KvEnd]] = [Future() for _ in range(config.tensor_parallel - 1)]
        self._counts: dict[int, RankCounts] = {}
        self._lock = threading.Lock()
        self._is_over = False

    @property
    def meeting(self) -> Path:
        """Where torch.distributed meets."""
        return self._folder / "meeting"

    @property
    def lines(self) -> RankLines:
        """To the others, once they have connected."""
        assert self._lines is not None, "start() comes first"
        return self._lines

    @property
    def ends(self) -> tuple[KvEnd, ...]:
        """How each of the others is reached, from the second on; ``wait_ready`` comes first."""
        return tuple(future.result(timeout=0) for future in self._ready)

    @property
    def counts(self) -> tuple[RankCounts, ...]:
        """The last that each of them has told."""
        return tuple(self._counts.values())

    def start(self) -> None:
        """Start them, and wait until each has connected. Raises ``RankLost`` if one does not. Start the lines next."""
        address, secret = str(self._folder / "rank-0"), secrets.token_bytes(32)
        size = self._config.tensor_parallel
        with Listener(address, "AF_UNIX", backlog=size, authkey=secret) as listener:
            for rank in range(1, size):  # before the listener has a thread
                task = RankTask(self._config, rank, size, address, secret, str(self.meeting))
                self._processes.append(self._start(task))
            connections = self._accept(listener)
        channels = [
            RankChannel(connections[rank], f"rank {rank} of {self._config.worker_id}", self._lose)
            for rank in range(1, size)
        ]
        self._lines = RankLines(channels)
        self._lines.hear(RankReady, lambda rank, message: self._ready[rank - 1].set_result(message.end))
        self._lines.hear(RankFailed, lambda rank, message: self._failed(rank, message.error))
        self._lines.hear(RankCounts, self._counts.__setitem__)

    def wait_ready(self, timeout_s: float) -> None:
        """Until all have loaded their parts. Raises what one failed with."""
        for rank, future in enumerate(self._ready, 1):
            try:
                future.result(timeout_s)
            except FutureTimeout:
                raise RankLost(f"rank {rank} did not load its part within {timeout_s:g} s of rank 0") from None

    def stop(self) -> None:
        """Have them end, in bounded time. Harmless if they have."""
        with self._lock:
            self._is_over = True
        if self._lines is not None:
            try:
                self._lines.ask_all(StopRank(), STOP_WAIT_S)
            except RankLost as error:
                logger.warning("%s: killed", error)
            self._lines.close()
        for process in self._processes:
            process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- inside ----

    def _accept(self, listener: Listener) -> dict[int, Connection[Any, Any]]:
        """rank |-> its line. A process that ends, or does not come, is not waited for."""
        connections: dict[int, Connection[Any, Any]] = {}
        accepted: Future[None] = Future()

        def accept() -> None:
            try:
                while len(connections) < len(self._processes):
                    connection = listener.accept()
                    connections[connection.recv()] = connection
                accepted.set_result(None)
            except Exception as error:  # the listener was closed, or somebody else knocked
                accepted.set_exception(error)

        threading.Thread(target=accept, name="rank-listener", daemon=True).start()
        for _ in range(int(CONNECT_TIMEOUT_S / 0.1)):
            try:
                accepted.result(0.1)
                return connections
            except FutureTimeout:
                dead = [i for i, process in enumerate(self._processes, 1) if not process.is_alive()]
                if dead:
                    raise RankLost(f"rank {dead[0]} ended before it connected; its log says why") from None
            except Exception as error:
                raise RankLost(f"a rank did not connect: {type(error).__name__}: {error}") from error
        raise RankLost(f"not every rank connected within {CONNECT_TIMEOUT_S:g} s")

    def _failed(self, rank: int, error: PrfaasError) -> None:
        future = self._ready[rank - 1]
        if future.done():
            self._lose(RankLost(f"rank {rank}: {error}"))
        else:
            future.set_exception(error)
            self._lose(error)

    def _lose(self, error: PrfaasError) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        for future in self._ready:
            if not future.done():
                future.set_exception(error)
        self._on_lost(error)
