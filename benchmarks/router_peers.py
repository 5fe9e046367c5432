"""The plain ways to know who caches a prompt, for comparison with cluster/prefix_index.py, and the plain way to choose.

dict_of_sets     page |-> set of its holders; a prompt is walked page by page while anybody holds on, as the radix
                 tree of Dynamo's router and the block index of llm-d's scorer are
scan_of_workers  worker |-> set of its pages; each worker's depth is found by halving, for one worker after another
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cluster.view import WorkerView
from core.prefix_hash import PageEvents, PageHash, page_key
from core.request import EngineId

Depths = Mapping[EngineId, int]  # leading pages that a worker holds; who is absent holds none


class PlainIndex(Protocol):
    """What both can do."""

    def apply(self, engine_id: EngineId, events: PageEvents) -> None:
        """Take in what a worker reported."""
        ...

    def depths(self, hashes: Sequence[PageHash]) -> Depths:
        """For one prompt."""
        ...


class DictOfSets:
    def __init__(self) -> None:
        self._holders: dict[int, set[EngineId]] = {}

    def apply(self, engine_id: EngineId, events: PageEvents) -> None:
        for key in events.removed:
            holders = self._holders.get(key)
            if holders is not None:
                holders.discard(engine_id)
                if not holders:
                    del self._holders[key]
        for key in events.stored:
            self._holders.setdefault(key, set()).add(engine_id)

    def depths(self, hashes: Sequence[PageHash]) -> Depths:
        depths: dict[EngineId, int] = {}
        active: set[EngineId] | None = None
        for depth, page_hash in enumerate(hashes):
            holders = self._holders.get(page_key(page_hash), set())
            staying = set(holders) if active is None else active & holders
            for engine_id in () if active is None else active - staying:
                depths[engine_id] = depth
            active = staying
            if not active:
                return depths
        return depths | dict.fromkeys(active or (), len(hashes))


class ScanOfWorkers:
    def __init__(self) -> None:
        self._pages: dict[EngineId, set[int]] = {}

    def apply(self, engine_id: EngineId, events: PageEvents) -> None:
        pages = self._pages.setdefault(engine_id, set())
        pages.difference_update(events.removed)
        pages.update(events.stored)

    def depths(self, hashes: Sequence[PageHash]) -> Depths:
        depths: dict[EngineId, int] = {}
        for engine_id, pages in self._pages.items():
            low, high = 0, len(hashes)  # holds the first ``low`` pages, and at most ``high``
            while low < high:
                middle = (low + high + 1) // 2
                if page_key(hashes[middle - 1]) in pages:
                    low = middle
                else:
                    high = middle - 1
            if low:
                depths[engine_id] = low
        return depths


PLAIN_INDEXES: Mapping[str, Callable[[], PlainIndex]] = {"dict_of_sets": DictOfSets, "scan_of_workers": ScanOfWorkers}


def choose(
    prefill: Sequence[WorkerView], decode: Sequence[WorkerView], depths: Depths, num_tokens: int, page_size: int
) -> tuple[WorkerView, WorkerView]:
    """``CacheAware`` one worker after another: the least tokens to compute, and to ship to one about as idle as any."""

    def to_compute(worker: WorkerView) -> int:
        ahead = worker.load.num_waiting_tokens + worker.num_assigned * num_tokens
        return ahead + num_tokens - min(num_tokens - 1, depths.get(worker.engine_id, 0) * page_size)

    def sequences(worker: WorkerView) -> int:
        return worker.load.num_running + worker.load.num_waiting + worker.num_assigned

    room = [w for w in decode if w.load.pages_free * page_size > num_tokens] or list(decode)
    crowded = 1.25 * min(map(sequences, room)) + 2
    idle = [w for w in room if sequences(w) <= crowded]
    return (
        min(prefill, key=lambda w: (to_compute(w), w.worker_id)),
        min(idle, key=lambda w: (-depths.get(w.engine_id, 0), sequences(w), w.worker_id)),
    )
