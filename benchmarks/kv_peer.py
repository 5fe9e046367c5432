"""What runs in each of the two processes between which the KV benchmark moves pages?

    python -m benchmarks.kv_peer CONTROL_FD MEMORY_FD POOL_PAGES HOST

A ``Peer`` maps the pool and answers the benchmark's calls (child_process.py). Every arm is opened once at both ends and
keeps its connections, as a link does; a repetition is ``expect`` at the receiving end, then ``move`` at the sending
end, which is timed there: from the first page offered to the last one acknowledged.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import kv_ours, kv_rivals
from benchmarks.child_process import answer_calls
from benchmarks.kv_arms import Arm, Ours
from benchmarks.kv_end import End, Moved
from core.credentials import Credentials


class Peer:
    """The process: its memory and its ends."""

    def __init__(self, memory: memoryview, pool_pages: int, host: str) -> None:
        self._memory = memory
        self._pool_pages = pool_pages
        self._host = host
        self._ends: dict[Arm, End] = {}

    def open(self, arm: Arm, sends: bool, credentials: Credentials | None) -> Any:
        """Make an end; its greeting."""
        end = self._make(arm, sends, credentials)
        self._ends[arm] = end
        return end.greet()

    def meet(self, arm: Arm, greeting: Any) -> None:
        self._ends[arm].meet(greeting)

    def expect(self, arm: Arm, session: str, pages: tuple[int, ...]) -> Any:
        return self._ends[arm].expect(session, pages)

    def move(self, arm: Arm, session: str, pages: tuple[int, ...], offer: Any) -> Moved:
        return self._ends[arm].move(session, pages, offer)

    def cpu_s(self) -> float:
        """Processor seconds of all threads so far."""
        return time.process_time()

    def close(self) -> None:
        for end in self._ends.values():
            end.close()
        self._ends.clear()

    def _make(self, arm: Arm, sends: bool, credentials: Credentials | None) -> End:
        if isinstance(arm, Ours):
            return kv_ours.make_end(arm, sends, self._memory, self._pool_pages, self._host, credentials)
        return kv_rivals.make_end(arm, sends, self._memory, self._pool_pages, self._host)


def main(arguments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.WARNING)
    control_fd, memory_fd, pool_pages, host = arguments
    with mmap.mmap(int(memory_fd), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE) as memory:
        answer_calls(int(control_fd), Peer(memoryview(memory), int(pool_pages), host))
        os._exit(0)  # views of the pool are everywhere, so it cannot be unmapped in order; the kernel will


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
