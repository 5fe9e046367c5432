"""Cached pages that another worker has: fetched before a prompt is prefilled, as in decode_worker/page_pull.py.

    fetch()   what is missing is named to the source, which lends what it has of it; room is made here; the bytes share
              the link as every hand-over's do; what arrived joins the prefix cache
    lend()    the other end: pages are kept from eviction until the puller has them, or is gone

Whatever goes wrong costs the time until then and no more: the pages are computed. What is lent, expected and adopted
is the real scheduler's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.simulator.host import Host
from cluster.simulator.shaped_link import Flow
from cluster.worker_client import CALL_TIMEOUT_S
from core.errors import PeerLost
from core.prefix_hash import PageHash, page_hashes
from core.request import EngineId, PullOutcome, PullReport, PullTask, SequenceSpec

MAX_BACK_OFF_S = 60.0
_BROKEN = frozenset({PullOutcome.TIMEOUT, PullOutcome.UNREACHABLE})


@dataclass(frozen=True, slots=True)
class _BackOff:
    num_failures: int
    until: float


class _Ended(Exception):
    """The pull is over without pages."""

    def __init__(self, outcome: PullOutcome) -> None:
        self.outcome = outcome


class PullingHalf:
    """Both ends of page pulls of one worker. ``source_at`` finds that of the worker at an address."""

    def __init__(self, host: Host, source_at: Callable[[str], PullingHalf | None]) -> None:
        self._host = host
        self._engine = host.engine
        self._source_at = source_at
        self._under_way: dict[PageHash, asyncio.Future[None]] = {}  # first page that is fetched |-> done when it ended
        self._back_offs: dict[EngineId, _BackOff] = {}
        self._sending: dict[Flow, Callable[[], None]] = {}  # what is being read here |-> who hears if this worker dies
        self._alive = True
        self.outcomes: Counter[PullOutcome] = Counter()
        self.num_tokens = 0
        self.num_bytes = 0

    async def fetch(self, spec: SequenceSpec, task: PullTask, deadline_at: float | None) -> PullReport:
        """Fetch what ``task`` names of the sequence's prefix, as far as it is not here; how that went."""
        now = self._host.loop.time()
        bounds = [self._host.kind.pull_timeout_s]
        if task.timeout_s is not None:
            bounds.append(task.timeout_s)
        if deadline_at is not None:
            bounds.append((deadline_at - now) / 2)
        num_pages = 0
        try:
            async with asyncio.timeout(max(0.0, min(bounds))):
                num_pages = await self._fetch(spec, task)
            outcome = PullOutcome.PULLED if num_pages else PullOutcome.CACHED
        except TimeoutError:
            outcome = PullOutcome.TIMEOUT
        except PeerLost:
            outcome = PullOutcome.UNREACHABLE
        except _Ended as ended:
            outcome = ended.outcome
        num_tokens = num_pages * self._host.kind.engine.page_size
        num_bytes = round(num_tokens * self._host.kind.kv.bytes_per_token)
        self._note(task, outcome, num_tokens, num_bytes)
        return PullReport(outcome, num_tokens, num_bytes, self._host.loop.time() - now)

    # ---- the other end ----

    def lend(self, names: Sequence[PageHash]) -> tuple[int, ...]:
        """Pages of these that are cached here and can be spared."""
        return self._engine.lend_prefix(names) if self._alive else ()

    def give_back(self, page_ids: tuple[int, ...]) -> None:
        """Nobody reads them any more."""
        self._engine.submit(lambda: self._engine.scheduler.take_back(page_ids))

    def die(self) -> None:
        """The worker is gone: pullers hear it."""
        self._alive = False
        for flow, lose in list(self._sending.items()):
            flow.cancel()
            lose()
        self._sending.clear()

    # ---- inside ----

    async def _fetch(self, spec: SequenceSpec, task: PullTask) -> int:
        page_size = self._host.kind.engine.page_size
        # A whole prompt is never taken from the cache: its last token must be computed.
        num_pages = min(task.num_tokens, len(spec.token_ids) - 1) // page_size
        names = page_hashes(spec.token_ids[: num_pages * page_size], page_size, spec.salt)
        while (num_known := self._engine.num_known_pages(names)) < len(names):
            running = self._under_way.get(names[num_known])
            if running is not None:
                await asyncio.wait({running})
                continue
            back_off = self._back_offs.get(task.engine_id)
            if back_off is not None and self._host.loop.time() < back_off.until:
                raise _Ended(PullOutcome.BACKING_OFF)
            ended = self._under_way[names[num_known]] = self._host.loop.create_future()
            try:
                return await self._exchange(names, num_known, task)
            finally:
                del self._under_way[names[num_known]]
                ended.set_result(None)
        return 0

    async def _exchange(self, names: Sequence[PageHash], num_known: int, task: PullTask) -> int:
        network, here = self._host.network, self._host.description.cluster_id
        there, back = network.path(here, task.cluster_id), network.path(task.cluster_id, here)
        await there.cross(CALL_TIMEOUT_S)
        source = self._source_at(task.address)
        if source is None:
            raise PeerLost(f"nobody is at {task.address}")
        lent = source.lend(names[num_known:])
        try:
            await back.cross(CALL_TIMEOUT_S)
            if not lent:
                raise _Ended(PullOutcome.NOT_FOUND)
            room = self._engine.expect_prefix(names[: num_known + len(lent)], num_known)
            if room is None:
                raise _Ended(PullOutcome.NO_PAGES)
            arrived = False
            try:
                await there.cross(CALL_TIMEOUT_S)  # the grant
                await source.push(self._host, len(room.missing))
                await back.cross(CALL_TIMEOUT_S)  # the last byte
                arrived = True
            finally:
                if arrived:
                    self._engine.adopt(room)
                else:
                    self._engine.submit(lambda: self._engine.scheduler.take_back(room.page_ids))
            return len(room.missing)
        finally:
            source.give_back(lent)

    async def push(self, puller: Host, num_pages: int) -> None:
        """Send so many pages to ``puller``; returns when the last byte has left. Raises ``PeerLost``."""
        host = self._host
        sent: asyncio.Future[None] = host.loop.create_future()
        if not self._alive:
            raise PeerLost("the source is gone")

        def lose() -> None:
            if not sent.done():
                sent.set_exception(PeerLost("the source is gone"))

        pair = (host.description.cluster_id, puller.description.cluster_id)
        flow = host.network.open_flow(
            host.description.engine_id,
            pair,
            host.kind.send_bytes_per_s,
            lambda: None if sent.done() else sent.set_result(None),
        )
        self._sending[flow] = lose
        if pair[0] != pair[1]:
            host.links.opened(puller.description, flow, 2 * host.network.path(*pair).latency_s)
        flow.add(num_pages * host.kind.engine.page_size * host.kind.kv.bytes_per_token)
        flow.finish()
        try:
            await sent
        finally:
            flow.cancel()
            self._sending.pop(flow, None)

    def _note(self, task: PullTask, outcome: PullOutcome, num_tokens: int, num_bytes: int) -> None:
        self.outcomes[outcome] += 1
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes
        if outcome is PullOutcome.PULLED:
            self._back_offs.pop(task.engine_id, None)
        elif outcome in _BROKEN:
            before = self._back_offs.get(task.engine_id)
            failures = 1 if before is None else before.num_failures + 1
            until = self._host.loop.time() + min(MAX_BACK_OFF_S, 2.0 ** min(failures - 1, 16))
            self._back_offs[task.engine_id] = _BackOff(failures, until)
