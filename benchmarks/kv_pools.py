"""The two page pools of the KV benchmark: memory that every pair of processes shares, filled once.

Shared memory has small memory pages, as what torch allocates has by default, so it costs TCP and NIXL the same.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack

from benchmarks.kv_prompt import fill, pool_bytes


class Pools:
    """A filled pool and an empty one; a context manager."""

    def __init__(self, pool_pages: int) -> None:
        self._cleanup = ExitStack()
        self.fds: list[int] = []
        views = []
        for side in ("left", "right"):
            fd = os.memfd_create(f"prfaas-bench-{side}")
            self._cleanup.callback(os.close, fd)
            os.ftruncate(fd, pool_bytes(pool_pages))
            self.fds.append(fd)
            views.append(memoryview(mmap.mmap(fd, 0)))
        self.source, self.target = views
        fill(self.source, pool_pages)
        for start in range(0, self.target.nbytes, mmap.PAGESIZE):
            self.target[start] = 0  # so that no arm pays for the kernel's first look at a page

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()
