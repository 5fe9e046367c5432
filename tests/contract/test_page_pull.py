"""Pulls of cached pages from one worker into another, over every transport and real gRPC, and what may go wrong.

Workers are whole but for the model: scheduler and page allocator, sender and receiver, both ends of the pull. A page
that is cached holds bytes that follow from its hash, so whatever is found under a hash can be checked. However a test
ends, every page of every worker is accounted for, and none is lent.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from hashlib import shake_128
from typing import Any

import grpc
import pytest

from core.clock import WallClock
from core.errors import PeerLost, TransferError
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvLayer, KvLayout
from core.prefix_hash import PageHash, page_hashes
from core.request import (
    ClusterId,
    EngineId,
    PullOutcome,
    PullReport,
    PullTask,
    SamplingParams,
    SequenceId,
    SequenceSpec,
    SessionId,
    WorkerId,
)
from decode_worker.page_client import PageClient
from decode_worker.page_pull import PagePuller
from engine.chunked_prefill import ChunkedPrefillScheduler
from engine.config import EngineConfig
from engine.page_allocator import PageAllocator
from engine.prefix_loan import PrefixLoans
from engine.scheduler import PrefixRoom
from kv_transfer.config import KvTransferConfig, LinkConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.session import SendReport
from kv_transfer.transport import (
    TRANSPORTS,
    LayerPages,
    PageGeometry,
    PeerIdentity,
    Region,
    SendOrder,
    create_transport,
)
from prefill_worker.page_service import PagesService
from prefill_worker.page_source import PageSource
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

pytestmark = pytest.mark.timeout(60)

PAGE_SIZE = 4
NUM_PAGES = 40
LAYER = KvLayer(2, 16, 16, "float32", 4)
LAYOUT = KvLayout(PAGE_SIZE, (LAYER,) * 3)
FINGERPRINT = CacheFingerprint("model", "revision", "float32", PAGE_SIZE, "layout")
PROMPT = tuple(range(100, 130))  # seven full pages and a partial one
PATIENCE_S = 20.0
PLAIN = InternalGrpc(None)


class Clock(WallClock):
    """The wall's, set forward by a test."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


class Engine:
    """The books of an engine without a model; also its thread, which runs at once what is submitted."""

    def __init__(self, prefix_cache: bool) -> None:
        self.allocator = PageAllocator(NUM_PAGES, PAGE_SIZE, prefix_cache)
        self.scheduler = ChunkedPrefillScheduler(EngineConfig(), self.allocator, 1000)
        self.lock = threading.Lock()
        self.before_room: Callable[[], None] = lambda: None

    def submit(self, fn: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(self))
        return future

    def take_back(self, pages: Sequence[int]) -> None:
        with self.lock:
            self.scheduler.take_back(pages)

    def num_known_pages(self, names: Sequence[PageHash]) -> int:
        with self.lock:
            return self.scheduler.num_known_pages(names)

    def lend_prefix(self, names: Sequence[PageHash]) -> tuple[int, ...]:
        with self.lock:
            return self.scheduler.lend_prefix(names)

    def expect_prefix(self, names: Sequence[PageHash], num_known: int) -> PrefixRoom | None:
        self.before_room()
        with self.lock:
            return self.scheduler.expect_prefix(names, num_known)

    def adopt(self, room: PrefixRoom) -> None:
        with self.lock:
            self.scheduler.adopt(room)

    @property
    def whole(self) -> bool:
        with self.lock:
            self.allocator.check_integrity()
            return self.allocator.whole() and self.scheduler.load().num_lent == 0


class Meddler:
    """Hears a transport's receiving end before the receiver does; a test says what it does to what lands."""

    def __init__(self, events: Any, worker: Worker) -> None:
        self._events = events
        self._worker = worker

    def landed(self, link: Any, session_id: SessionId, layers: range, spans: Any) -> None:
        if self._worker.on_landing():
            self._events.landed(link, session_id, layers, spans)
        else:
            self._events.damaged(link, session_id, layers, spans)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)


class MeddledTransport:
    def __init__(self, transport: Any, worker: Worker) -> None:
        self._transport = transport
        self._worker = worker

    def serve(self, events: Any) -> None:
        self._transport.serve(Meddler(events, self._worker))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Worker:
    """Everything of a worker that a pull meets, at either end of it."""

    def __init__(
        self,
        name: str,
        transport: str,
        layout: KvLayout = LAYOUT,
        prefix_cache: bool = True,
        dial: str = "sender",
        **differs: str,
    ) -> None:
        self.identity = PeerIdentity(WorkerId(name), ClusterId("here"))
        self.engine_id = EngineId(f"{name}-engine")
        self.layout = layout
        self.clock = Clock()
        self.engine = Engine(prefix_cache)
        self.on_landing: Callable[[], bool] = lambda: True
        self.calls: list[pb.PagesWanted] = []  # what this worker was asked for
        self.orders: list[SendOrder] = []  # in which it sent
        self.loop = asyncio.get_running_loop()
        fingerprint = replace(FINGERPRINT, page_size=layout.page_size, **differs)  # type: ignore[arg-type]
        config = KvTransferConfig(
            transport=transport, host="127.0.0.1", lease_s=5.0, staging_mib=1, links=(LinkConfig(dial=dial),)
        )
        made = create_transport(config, fingerprint, WallClock(), self.identity)
        self.transport: Any = MeddledTransport(made, self)
        pages = (LayerPages(layout.page_bytes(i), layer.dtype) for i, layer in enumerate(layout.layers))
        geometry = PageGeometry(tuple(pages), NUM_PAGES)
        memory = (memoryview(bytearray(NUM_PAGES * layer.page_bytes)) for layer in geometry.layers)
        self.region = Region(geometry, tuple(memory))
        made.register(self.region)
        loans = PrefixLoans(self.engine, self.engine)  # type: ignore[arg-type]
        self.client = PageClient(self.identity, fingerprint, PLAIN)
        self.puller = PagePuller(loans, layout, self.client, self.clock, self.run_soon, PATIENCE_S)
        self.source = PageSource(loans, layout)
        self.sender = KvSender(self.transport, WallClock(), self._closed, layout)
        self.receiver = KvReceiver(self.transport, WallClock(), self._committed, self._released, 5.0, layout)
        self.source.attach(self.sender)
        self.puller.attach(self.receiver)
        self.service = PagesService(self.source, self.engine_id, fingerprint, layout, made.describe, WallClock())
        self.server = grpc.aio.server()
        self.address = ""
        self._spy()

    def _spy(self) -> None:
        open_session, hashes = self.sender.open, self.service._hashes

        def opened(session_id: SessionId, num_pages: int, order: SendOrder = SendOrder()) -> None:
            self.orders.append(order)
            open_session(session_id, num_pages, order)

        def asked(wanted: pb.PagesWanted) -> list[PageHash]:
            self.calls.append(wanted)
            return hashes(wanted)

        self.sender.open = opened  # type: ignore[method-assign,assignment]
        self.service._hashes = asked  # type: ignore[method-assign]

    async def start(self) -> None:
        rpc.add_PagesServicer_to_server(self.service, self.server)
        self.address = f"127.0.0.1:{PLAIN.listen(self.server, '127.0.0.1:0')}"
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(grace=None)
        await self.puller.close()
        await self.client.close()
        await asyncio.to_thread(self.close_kv)

    def close_kv(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.transport.close()

    def run_soon(self, work: Awaitable[None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop)  # type: ignore[arg-type]

    def _closed(self, session_id: SessionId, report: SendReport) -> None:
        assert self.source.closed(session_id, report)

    def _committed(self, session_id: SessionId, payload: bytes) -> None:
        assert self.puller.committed(session_id)

    def _released(self, session_id: SessionId, error: TransferError) -> None:
        assert self.puller.released(session_id, error)

    # ---- what a test does with it ----

    def names(self, tokens: Sequence[int], salt: bytes = b"") -> tuple[PageHash, ...]:
        return page_hashes(tokens, self.layout.page_size, salt)

    def compute(self, tokens: Sequence[int], salt: bytes = b"") -> bool:
        """The full pages of ``tokens`` are cached from now on, as after a prefill; False: there is no room."""
        room = self.engine.expect_prefix(self.names(tokens, salt), 0)
        if room is None:
            return False
        for page, name in zip(room.missing, room.page_hashes[room.num_cached_pages :], strict=True):
            for layer in range(len(self.layout.layers)):
                self.region.pages(layer, page, 1)[:] = self.bytes_of(name, layer)
        self.engine.adopt(room)
        return True

    def evict(self) -> None:
        """Forget every page that nobody uses."""
        with self.engine.lock:
            pages = self.engine.allocator.allocate(self.engine.allocator.num_free)
            self.engine.allocator.release(pages or ())

    def num_right(self, tokens: Sequence[int], salt: bytes = b"") -> int:
        """Pages of ``tokens`` that are cached, each of which must hold what it should."""
        names = self.names(tokens, salt)
        pages = self.engine.lend_prefix(names)
        for page, name in zip(pages, names, strict=False):
            for layer in range(len(self.layout.layers)):
                assert bytes(self.region.pages(layer, page, 1)) == self.bytes_of(name, layer), f"page {page}"
        self.engine.take_back(pages)
        return len(pages)

    def bytes_of(self, name: PageHash, layer: int) -> bytes:
        return shake_128(name + bytes([layer])).digest(self.layout.page_bytes(layer))

    def task(self, num_tokens: int = 1000, timeout_s: float | None = None) -> PullTask:
        """A pull from this worker."""
        identity = self.identity
        return PullTask(identity.worker_id, identity.cluster_id, self.engine_id, self.address, num_tokens, timeout_s)

    async def pull(
        self,
        source: Worker,
        tokens: Sequence[int] = PROMPT,
        salt: bytes = b"",
        order: SendOrder = SendOrder(),
        **task: Any,
    ) -> PullReport:
        spec = SequenceSpec(SequenceId("sequence"), tuple(tokens), SamplingParams(seed=1), salt=salt)
        return await self.puller.fetch(spec, source.task(**task), order)


@asynccontextmanager
async def workers(
    transport: str, ours: dict[str, Any] | None = None, theirs: dict[str, Any] | None = None
) -> AsyncIterator[tuple[Worker, Worker]]:
    """The one that pulls and the one that has; whatever happens, at the end nothing of either is lent or lost."""
    pair = Worker("puller", transport, **(ours or {})), Worker("source", transport, **(theirs or {}))
    try:
        for worker in pair:
            await worker.start()
        yield pair
        await until(lambda: all(worker.engine.whole for worker in pair))
    finally:
        for worker in pair:
            await worker.stop()
    await until(lambda: all(worker.engine.whole for worker in pair))
    assert [worker.puller.num_sessions + worker.source.num_sessions for worker in pair] == [0, 0]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def back(*pair: Worker) -> None:
    """Every page of both workers is back, while they go on."""
    await until(lambda: all(worker.engine.whole for worker in pair))


everywhere = pytest.mark.parametrize("transport", sorted(TRANSPORTS.keys() - {"nixl"}))


# ---- what arrives ----


@pytest.mark.parametrize("transport", sorted(TRANSPORTS))
async def test_what_the_source_caches_is_cached_here_afterwards_byte_for_byte(transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl", reason="pip install 'prfaas[nixl]'")
    async with workers(transport) as (puller, source):
        source.compute(PROMPT)

        report = await puller.pull(source)

        assert (report.outcome, report.num_tokens) == (PullOutcome.PULLED, 28)
        assert report.num_bytes == 7 * LAYOUT.bytes_per_page == puller.receiver.bytes_received
        assert report.seconds > 0
        assert puller.num_right(PROMPT) == source.num_right(PROMPT) == 7
        assert puller.puller.outcomes == {PullOutcome.PULLED: 1}
        assert (puller.puller.num_tokens, puller.puller.num_bytes) == (28, report.num_bytes)
        assert puller.engine.allocator.take_changes().stored == puller.names(PROMPT), "gateways are told"


async def test_the_puller_may_be_the_end_that_dials() -> None:
    """Where the source's cluster lets nobody out, and the puller's nobody in but what it asked for."""
    async with workers("tcp", {"dial": "receiver"}, {"dial": "receiver"}) as (puller, source):
        source.compute(PROMPT)
        assert (await puller.pull(source)).outcome is PullOutcome.PULLED
        assert puller.num_right(PROMPT) == 7


async def test_only_what_is_missing_travels_and_only_what_was_asked_for() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        puller.compute(PROMPT[:8])

        report = await puller.pull(source, num_tokens=23)

        assert (report.outcome, report.num_tokens) == (PullOutcome.PULLED, 12)
        assert list(source.calls[0].page_hashes) == list(source.names(PROMPT)[2:5])
        assert puller.receiver.bytes_received == 3 * LAYOUT.bytes_per_page
        assert puller.num_right(PROMPT) == 5


async def test_the_last_token_of_a_prompt_is_left_to_be_computed() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)

        report = await puller.pull(source, PROMPT[:8])

        assert report.num_tokens == 4
        assert (await puller.pull(source, PROMPT[:3])).outcome is PullOutcome.CACHED


async def test_a_source_that_evicted_the_end_sends_the_beginning() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT[:12])

        report = await puller.pull(source)

        assert (report.outcome, report.num_tokens) == (PullOutcome.PULLED, 12)
        assert puller.num_right(PROMPT) == 3


async def test_a_source_that_has_nothing_of_it_says_so() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        assert (await puller.pull(source, salt=b"another tenant")).outcome is PullOutcome.NOT_FOUND
        source.evict()
        assert (await puller.pull(source)).outcome is PullOutcome.NOT_FOUND
        assert puller.num_right(PROMPT) == 0
        assert (await puller.pull(source)).outcome is PullOutcome.NOT_FOUND, "which is no reason to back off"


async def test_pages_of_a_tenant_are_found_by_who_has_his_salt() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT, salt=b"tenant")

        assert (await puller.pull(source, salt=b"tenant")).num_tokens == 28
        assert puller.num_right(PROMPT, salt=b"tenant") == 7
        assert puller.num_right(PROMPT) == 0


async def test_nobody_is_asked_for_what_is_here() -> None:
    async with workers("local") as (puller, source):
        puller.compute(PROMPT)

        report = await puller.pull(source)

        assert (report.outcome, report.num_tokens, report.num_bytes) == (PullOutcome.CACHED, 0, 0)
        assert source.calls == []


async def test_what_many_want_at_once_travels_once() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)

        reports = await asyncio.gather(*(puller.pull(source) for _ in range(8)))

        assert sorted(report.outcome for report in reports) == ["cached"] * 7 + ["pulled"]
        assert puller.receiver.bytes_received == 7 * LAYOUT.bytes_per_page
        assert puller.num_right(PROMPT) == 7


async def test_who_waited_for_a_pull_that_failed_tries_himself() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        first = asyncio.create_task(puller.pull(source))
        await until(lambda: puller.puller._under_way)
        second = asyncio.create_task(puller.pull(source))
        await asyncio.sleep(0)
        first.cancel()

        assert (await second).outcome is PullOutcome.PULLED
        assert puller.num_right(PROMPT) == 7


async def test_pages_that_were_computed_here_while_they_travelled_stay() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)

        def meanwhile() -> bool:
            puller.on_landing = lambda: True
            puller.compute(PROMPT)
            return True

        puller.on_landing = meanwhile
        assert (await puller.pull(source)).outcome is PullOutcome.PULLED
        assert puller.num_right(PROMPT) == 7
        await back(puller, source)
        assert puller.engine.allocator.num_cached == 7


async def test_pages_that_were_computed_here_before_there_was_room_need_none() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)

        def meanwhile() -> None:
            puller.engine.before_room = lambda: None
            puller.compute(PROMPT)

        puller.engine.before_room = meanwhile
        assert (await puller.pull(source)).outcome is PullOutcome.CACHED
        assert puller.receiver.bytes_received == 0


async def test_bytes_of_a_pull_travel_in_the_order_of_their_request() -> None:
    async with workers("tcp") as (puller, source):
        source.compute(PROMPT)
        now = source.clock.now()

        await puller.pull(source, order=SendOrder("acme", deadline_at=puller.clock.now() + 60.0))

        (order,) = source.orders
        assert order.tenant == "acme"
        assert order.deadline_at is not None
        assert now + 50.0 < order.deadline_at < now + 70.0


# ---- what may go wrong ----


async def test_without_room_here_nothing_is_sent() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        held = puller.engine.allocator.allocate(NUM_PAGES - 6)
        assert held is not None

        assert (await puller.pull(source)).outcome is PullOutcome.NO_PAGES

        assert source.orders == []
        puller.engine.allocator.release(held)


async def test_room_is_not_made_behind_a_prefix_that_was_evicted_meanwhile() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        puller.compute(PROMPT[:8])
        puller.engine.before_room = puller.evict

        assert (await puller.pull(source)).outcome is PullOutcome.NO_PAGES


async def test_without_a_prefix_cache_nothing_is_pulled() -> None:
    async with workers("local", ours={"prefix_cache": False}) as (puller, source):
        source.compute(PROMPT)
        assert (await puller.pull(source)).outcome is PullOutcome.NO_PAGES


@pytest.mark.parametrize(
    "theirs",
    [
        {"revision": "another"},
        {"layout": KvLayout(8, LAYOUT.layers)},
        {"layout": KvLayout(PAGE_SIZE, (replace(LAYER, num_heads=1, first_head=1),) * 3)},
    ],
    ids=["weights", "page size", "heads"],
)
async def test_pages_of_another_kind_are_refused(theirs: dict[str, Any]) -> None:
    async with workers("local", theirs=theirs) as (puller, source):
        source.compute(PROMPT)
        assert (await puller.pull(source)).outcome is PullOutcome.INCOMPATIBLE
        assert source.orders == []


async def test_another_engine_at_the_sources_address_has_other_pages() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        task = replace(source.task(), engine_id=EngineId("the one before"))
        spec = SequenceSpec(SequenceId("s"), PROMPT, SamplingParams(seed=1))
        assert (await puller.puller.fetch(spec, task, SendOrder())).outcome is PullOutcome.NOT_FOUND


async def test_a_source_that_is_gone_is_left_alone_for_longer_and_longer(caplog: pytest.LogCaptureFixture) -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        await source.server.stop(grace=None)
        seen: list[PullOutcome] = []
        for ahead_s in (0.0, 0.5, 1.1, 2.0, 3.2):
            puller.clock.ahead_s = ahead_s
            seen.append((await puller.pull(source)).outcome)
        unreachable, waits = PullOutcome.UNREACHABLE, PullOutcome.BACKING_OFF
        assert seen == [unreachable, waits, unreachable, waits, unreachable]
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == 3
        assert "that were to be pulled from source: unreachable" in warnings[0]


async def test_a_pull_that_works_again_ends_the_back_off() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        push = source.source.push

        async def fail(*arguments: Any) -> SendReport:
            source.source.push = push  # type: ignore[method-assign]
            raise PeerLost("for once")

        source.source.push = fail  # type: ignore[method-assign]
        assert (await puller.pull(source)).outcome is PullOutcome.FAILED
        assert (await puller.pull(source)).outcome is PullOutcome.BACKING_OFF
        puller.clock.ahead_s = 1.1
        assert (await puller.pull(source)).outcome is PullOutcome.PULLED
        assert puller.puller._back_offs == {}


@everywhere
async def test_a_source_that_dies_between_offer_and_transfer(transport: str) -> None:
    async with workers(transport) as (puller, source):
        source.compute(PROMPT)
        asked = source.source.push

        async def die(*arguments: Any) -> SendReport:
            await asyncio.to_thread(source.close_kv)
            return await asked(*arguments)

        source.source.push = die  # type: ignore[method-assign]
        report = await puller.pull(source)

        assert report.outcome in (PullOutcome.UNREACHABLE, PullOutcome.FAILED), report
        assert puller.num_right(PROMPT) == 0


@everywhere
async def test_a_source_that_dies_while_it_sends(transport: str) -> None:
    async with workers(transport) as (puller, source):
        source.compute(PROMPT)
        dying: list[asyncio.Future[None]] = []
        arrived = threading.Event()

        def hold() -> bool:
            puller.loop.call_soon_threadsafe(arrive)
            arrived.wait(PATIENCE_S)
            return True

        def arrive() -> None:
            if not dying:
                dying.append(asyncio.ensure_future(asyncio.to_thread(source.close_kv)))
                puller.loop.call_later(0.05, arrived.set)

        puller.on_landing = hold
        report = await puller.pull(source)

        assert report.outcome in (PullOutcome.UNREACHABLE, PullOutcome.FAILED), report
        await dying[0]
        await back(puller)
        assert puller.num_right(PROMPT) == 0


@everywhere
async def test_bytes_that_come_damaged_are_sent_again_and_given_up_after_a_while(transport: str) -> None:
    async with workers(transport) as (puller, source):
        source.compute(PROMPT)
        puller.on_landing = iter([False, True, False, *[True] * 100]).__next__
        assert (await puller.pull(source)).outcome is PullOutcome.PULLED
        assert puller.num_right(PROMPT) == 7
        puller.evict()

        puller.on_landing = lambda: False
        assert (await puller.pull(source)).outcome is PullOutcome.CORRUPTED
        await back(puller, source)
        assert puller.num_right(PROMPT) == 0


@everywhere
async def test_a_pull_that_outlasts_its_worth_is_given_up_and_its_pages_come_back(transport: str) -> None:
    async with workers(transport) as (puller, source):
        source.compute(PROMPT)
        go_on = threading.Event()

        def hold() -> bool:
            go_on.wait(PATIENCE_S)
            return True

        puller.on_landing = hold
        report = await puller.pull(source, timeout_s=0.2)

        assert (report.outcome, report.num_tokens) == (PullOutcome.TIMEOUT, 0)
        assert not puller.engine.whole, "a write is landing still: its pages are nobody's until it has"
        go_on.set()
        await back(puller, source)
        assert puller.num_right(PROMPT) == 0


async def test_pages_that_arrive_although_nobody_waits_any_more_are_cached_all_the_same() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        adopt, may_adopt = puller.engine.adopt, threading.Event()

        def late(room: PrefixRoom) -> None:
            may_adopt.wait(PATIENCE_S)
            adopt(room)

        puller.engine.adopt = late  # type: ignore[method-assign]
        report = await puller.pull(source, timeout_s=1.0)
        assert report.outcome is PullOutcome.TIMEOUT
        may_adopt.set()
        await back(puller, source)
        assert puller.num_right(PROMPT) == 7


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"timeout_s": 0.25}, "0.25 s"),
        ({"timeout_s": 9.0, "deadline_s": 0.2}, "0.1 s"),
        ({"deadline_s": -1.0}, "0 s"),
    ],
    ids=["what the router gave it", "half of what is left to the deadline", "too late already"],
)
async def test_how_long_a_pull_may_take(bounds: dict[str, float], said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with workers("local") as (puller, source):
        source.compute(PROMPT)

        async def hang(*arguments: Any) -> SendReport:
            await asyncio.Event().wait()
            raise AssertionError

        source.source.push = hang  # type: ignore[method-assign]
        now = puller.clock.now()
        puller.clock.now = lambda: now  # type: ignore[method-assign]
        deadline_s = bounds.pop("deadline_s", None)
        deadline_at = None if deadline_s is None else now + deadline_s
        report = await puller.pull(source, order=SendOrder(deadline_at=deadline_at), **bounds)

        assert report.outcome is PullOutcome.TIMEOUT
        assert f"not there after {said}" in caplog.text
        assert bool(puller.puller._back_offs) is (said != "0 s"), "a source that had no time is not to blame"
        await back(puller, source)


async def test_a_bug_costs_the_request_nothing_but_the_pages() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)

        async def broken(*arguments: Any) -> Any:
            raise RuntimeError("a bug")

        puller.client.ask = broken  # type: ignore[method-assign]
        assert (await puller.pull(source)).outcome is PullOutcome.FAILED


@pytest.mark.parametrize(
    "told",
    [
        pb.PullRequest(),
        pb.PullRequest(grant=pb.GrantReply()),
        pb.PullRequest(wanted=pb.PagesWanted(session_id="s", page_hashes=[b"half a hash"])),
        pb.PullRequest(wanted=pb.PagesWanted(page_hashes=[b"0" * 16])),
    ],
    ids=["nothing", "a grant first", "what page events tell", "no session"],
)
async def test_a_source_refuses_nonsense(told: pb.PullRequest) -> None:
    async with workers("local") as (puller, source):
        if told.HasField("wanted"):
            told.wanted.engine_id = source.engine_id
            told.wanted.fingerprint.CopyFrom(puller.client._fingerprint)
        async with PLAIN.channel(source.address) as channel:
            call = rpc.PagesStub(channel).Pull(timeout=PATIENCE_S)
            await call.write(told)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
        assert refused.value.code() is grpc.StatusCode.ABORTED


async def test_a_caller_that_takes_the_offer_and_goes_away_holds_nothing() -> None:
    async with workers("local") as (puller, source):
        source.compute(PROMPT)
        async with PLAIN.channel(source.address) as channel:
            call = rpc.PagesStub(channel).Pull(timeout=PATIENCE_S)
            wanted = pb.PagesWanted(
                session_id="s",
                engine_id=source.engine_id,
                page_hashes=source.names(PROMPT),
                fingerprint=puller.client._fingerprint,
            )
            await call.write(pb.PullRequest(wanted=wanted))
            assert (await call.read()).offered.num_pages == 7
            assert not source.engine.whole, "the pages cannot be evicted"
            call.cancel()
            await back(source)


# ---- anything, at any time ----


@everywhere
@pytest.mark.parametrize("seed", range(2))
async def test_pulls_evictions_and_aborts_at_any_time_leave_no_page_behind_and_no_wrong_byte(
    transport: str, seed: int
) -> None:
    """Both workers pull from each other, prompts share beginnings, and everything is cancelled at random instants."""
    dice = random.Random(seed)
    prompts = [tuple(range(start, start + 4 * dice.randint(1, 5))) + (9,) * dice.randint(1, 20) for start in range(4)]
    async with workers(transport) as pair:

        async def one() -> None:
            here, there = dice.sample(pair, 2)
            prompt = dice.choice(prompts)
            pull = asyncio.create_task(here.pull(there, prompt))
            if dice.random() < 0.4:
                await asyncio.sleep(dice.random() * 0.01)
                pull.cancel()
            with suppress(asyncio.CancelledError):
                seen.append((await pull).outcome)

        seen: list[PullOutcome] = []
        for _ in range(25):
            worker = dice.choice(pair)
            if dice.random() < 0.5:
                worker.evict()
            worker.compute(dice.choice(prompts))
            await asyncio.gather(*(one() for _ in range(6)))
            for worker in pair:
                for prompt in prompts:
                    worker.num_right(prompt)
        await back(*pair)
        assert PullOutcome.PULLED in seen
        assert not set(seen) & {PullOutcome.TIMEOUT, PullOutcome.CORRUPTED, PullOutcome.UNREACHABLE}
