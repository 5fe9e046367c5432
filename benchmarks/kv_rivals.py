"""How do others move the same bytes? Plain NIXL as the field's connectors use it, and a sketch of bare sockets.

Both work on the pool that our arms use, within the same kind of process (kv_peer.py).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from threading import Thread
from typing import Any

import numpy as np

from benchmarks.kv_arms import Arm, PlainNixl, Sketch
from benchmarks.kv_end import MOVE_TIMEOUT_S, End, Moved
from benchmarks.kv_prompt import NUM_LAYERS, PAGE_BYTES

_CHUNK_BYTES = 1 << 20
_POLL_S = 100e-6  # leaves the cores to those who move bytes: faster than to spin


def make_end(arm: Arm, sends: bool, memory: memoryview, pool_pages: int, host: str) -> End:
    """The end of an arm that is not ours."""
    if isinstance(arm, PlainNixl):
        return _NixlEnd(arm, sends, memory, pool_pages)
    if isinstance(arm, Sketch):
        return _SketchEnd(arm, sends, memory, host)
    raise ValueError(f"{arm.name} does not run in a peer")


class _NixlEnd:
    """A NIXL agent. For a READ ``move`` is called on the receiving end, with the sending end's pages.

    Only the end that waits has NIXL's progress thread: with one at both ends two cores moved a third less.
    """

    def __init__(self, arm: PlainNixl, sends: bool, memory: memoryview, pool_pages: int) -> None:
        from nixl._api import nixl_agent, nixl_agent_config  # optional

        self._arm = arm
        self._pool_pages = pool_pages
        self._base = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        moves = sends == (arm.operation == "WRITE")
        settings = nixl_agent_config(enable_prog_thread=not moves, backends=["UCX"])
        self._agent = nixl_agent("left" if sends else "right", settings)
        self._registered = self._agent.register_memory([(self._base, memory.nbytes, 0, "")], "DRAM")
        self._local = self._prepare("", self._base)
        self._peer = ""
        self._remote: Any = None

    def greet(self) -> tuple[bytes, int]:
        return self._agent.get_agent_metadata(), self._base

    def meet(self, greeting: tuple[bytes, int]) -> None:
        metadata, base = greeting
        self._peer = _text(self._agent.add_remote_agent(metadata))
        self._remote = self._prepare(self._peer, base)

    def expect(self, session: str, pages: tuple[int, ...]) -> tuple[int, ...]:
        return pages

    def move(self, session: str, pages: tuple[int, ...], offer: tuple[int, ...]) -> Moved:
        """READ the other end's ``offer`` into ``pages``, or WRITE ``pages`` there."""
        began = time.perf_counter()
        local, remote = self._indices(pages), self._indices(offer)
        request = self._agent.make_prepped_xfer(self._arm.operation, self._local, local, self._remote, remote)
        state = self._agent.transfer(request)
        while state not in ("DONE", "ERR"):
            if time.perf_counter() - began > MOVE_TIMEOUT_S:
                raise TimeoutError(f"the transfer has not ended after {MOVE_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
            state = self._agent.check_xfer_state(request)
        seconds = time.perf_counter() - began
        if state == "ERR":
            raise RuntimeError("the transfer failed")
        self._agent.release_xfer_handle(request)
        return Moved(seconds, len(pages) * PAGE_BYTES * NUM_LAYERS, f"ucx:{self._arm.ucx_tls or 'any'}")

    def close(self) -> None:
        self._agent.deregister_memory(self._registered)

    def _prepare(self, agent: str, base: int) -> Any:
        """Descriptors of every page of every layer, made once, as connectors do when they start."""
        starts = base + np.arange(self._pool_pages * NUM_LAYERS, dtype=np.uint64) * PAGE_BYTES
        rows = np.stack([starts, np.full_like(starts, PAGE_BYTES), np.zeros_like(starts)], axis=1)
        return self._agent.prep_xfer_dlist(agent or "NIXL_INIT_AGENT", rows, "DRAM")

    def _indices(self, pages: tuple[int, ...]) -> Any:
        layers = np.arange(NUM_LAYERS)[:, None] * self._pool_pages
        return (layers + np.array(pages)).ravel().astype(np.int32)


class _SketchEnd:
    """Threads with sockets. ``pages`` say how many bytes: they lie one after another from the pool's start."""

    def __init__(self, arm: Sketch, sends: bool, memory: memoryview, host: str) -> None:
        self._arm = arm
        self._memory = memory
        self._cleanup = ExitStack()
        self._sockets: list[socket.socket] = []
        self._listener = None if sends else self._cleanup.enter_context(socket.create_server((host, 0)))

    def greet(self) -> tuple[str, int] | None:
        return self._listener.getsockname()[:2] if self._listener else None

    def meet(self, greeting: tuple[str, int] | None) -> None:
        """The sending end dials; the receiving end then accepts what waits in its backlog."""
        for _ in range(self._arm.connections):
            if greeting is not None:
                connection = socket.create_connection(greeting)
            else:
                assert self._listener is not None, "one of the two ends listens"
                connection = self._listener.accept()[0]
            self._sockets.append(self._cleanup.enter_context(connection))

    def expect(self, session: str, pages: tuple[int, ...]) -> None:
        for take in self._shares(len(pages), _take):
            take.start()

    def move(self, session: str, pages: tuple[int, ...], offer: None) -> Moved:
        began = time.perf_counter()
        threads = self._shares(len(pages), _give)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Moved(time.perf_counter() - began, len(pages) * PAGE_BYTES * NUM_LAYERS, "tcp")

    def close(self) -> None:
        self._cleanup.close()

    def _shares(self, num_pages: int, body: Callable[[socket.socket, memoryview], None]) -> list[Thread]:
        share = num_pages * PAGE_BYTES * NUM_LAYERS // self._arm.connections
        parts = [self._memory[i * share : (i + 1) * share] for i in range(self._arm.connections)]
        return [Thread(target=body, args=pair, daemon=True) for pair in zip(self._sockets, parts, strict=True)]


def _give(connection: socket.socket, part: memoryview) -> None:
    for start in range(0, part.nbytes, _CHUNK_BYTES):
        connection.sendall(part[start : start + _CHUNK_BYTES])
    connection.recv(1)


def _take(connection: socket.socket, part: memoryview) -> None:
    filled = 0
    while filled < part.nbytes:
        count = connection.recv_into(part[filled : filled + _CHUNK_BYTES])
        if not count:
            return
        filled += count
    connection.sendall(b"k")


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
