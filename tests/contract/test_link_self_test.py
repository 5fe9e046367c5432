"""The self-test of a link, over every transport: real pages, a real sender and receiver, and what may go wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from core.clock import WallClock
from core.errors import GrantRefused, Overloaded
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvLayer, KvLayout
from core.link import ProbeReport
from core.request import ClusterId, SessionId, WorkerId
from decode_worker.link_probe import ProbeReceiver
from kv_transfer.codec import Codec
from kv_transfer.config import KvTransferConfig
from kv_transfer.link_monitor import LinkMonitor
from kv_transfer.probe_pages import RankPages
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.session import Grant
from kv_transfer.transfer_plan import layout_of_pages
from kv_transfer.transport import LayerPages, PageGeometry, PeerIdentity, Region, create_transport
from prefill_worker.link_probe import FIRST_BYTES, MAX_BYTES, LinkProber, next_bytes

pytestmark = pytest.mark.timeout(60)

FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
GEOMETRY = PageGeometry(
    (LayerPages(65536, "bfloat16"), LayerPages(65536, "bfloat16"), LayerPages(4096, "bfloat16")), num_pages=64
)
PATIENCE_S = 20.0


class Loans:
    """Pages 0 to 63, lent a few at a time; counts what is out."""

    def __init__(self) -> None:
        self.free = list(range(GEOMETRY.num_pages))
        self.most = 16

    async def borrow(self, max_pages: int) -> tuple[int, ...]:
        count = min(max_pages, self.most, len(self.free))
        random.Random(count).shuffle(self.free)
        lent, self.free = self.free[:count], self.free[count:]
        return tuple(lent)

    def give_back(self, pages: tuple[int, ...]) -> None:
        assert not set(pages) & set(self.free), "a page came back twice"
        self.free += pages

    @property
    def whole(self) -> bool:
        return len(self.free) == GEOMETRY.num_pages


class Worker:
    """Both halves of a worker's self-test, around the KV half of a worker."""

    def __init__(self, name: str, transport: str, layout: KvLayout | None = None, **differs: str) -> None:
        geometry = GEOMETRY
        if layout is not None:
            pages = (LayerPages(layout.page_bytes(i)) for i in range(len(layout.layers)))
            geometry = PageGeometry(tuple(pages), num_pages=64)
        self.layout = layout or layout_of_pages(geometry)
        self.peer_layout: KvLayout | None = None  # None: the same
        loop = asyncio.get_running_loop()
        config = KvTransferConfig(transport=transport, host="127.0.0.1", lease_s=5.0)
        self.identity = PeerIdentity(WorkerId(name), ClusterId("here"))
        fingerprint = replace(FINGERPRINT, **differs)  # type: ignore[arg-type]
        self.transport = create_transport(config, fingerprint, WallClock(), self.identity)
        sizes = [geometry.num_pages * layer.page_bytes for layer in geometry.layers]
        self.region = Region(geometry, tuple(memoryview(bytearray(size)) for size in sizes))
        self.transport.register(self.region)
        self.loans = Loans()
        self.monitor = LinkMonitor(WallClock())

        def run_soon(work: Awaitable[None]) -> None:
            asyncio.run_coroutine_threadsafe(work, loop)  # type: ignore[arg-type]

        pages = RankPages(self.region, self.layout)
        self.prober = LinkProber(self.loans, self.transport.stats, pages, self.layout, self.monitor, transport)  # type: ignore[arg-type]
        self.probed = ProbeReceiver(self.loans, pages, self.layout, run_soon)  # type: ignore[arg-type]
        self.codec = Codec.RAW  # of its link to the other worker
        self.sender = KvSender(
            self.transport,
            WallClock(),
            lambda s, report: self.is_ours(self.prober.closed(s, report)),
            self.layout,
            codec_for=lambda peer, layers, write: self.codec,
        )
        self.receiver = KvReceiver(
            self.transport,
            WallClock(),
            lambda s, payload: self.on_committed(s),
            lambda s, error: self.is_ours(self.probed.released(s, error)),
            lease_s=5.0,
            layout=self.layout,
        )
        self.prober.attach(self.sender)
        self.probed.attach(self.receiver)
        self.before_digest: Callable[[SessionId], None] = lambda _: None

    def is_ours(self, ours: bool) -> None:
        assert ours

    def on_committed(self, session_id: SessionId) -> None:
        self.before_digest(session_id)
        assert self.probed.committed(session_id)

    # ---- ProbeTarget, without gRPC ----

    async def grant(self, session_id: SessionId, max_tokens: int) -> Grant:
        return await self.probed.grant(session_id, max_tokens, self.peer_layout or self.layout, b"")

    async def digest(self, session_id: SessionId, wait_s: float) -> tuple[bytes, int]:
        arrived = await self.probed.digest(session_id, wait_s)
        return arrived.digest, arrived.num_bytes

    async def give_up(self, session_id: SessionId, reason: str) -> None:
        self.probed.give_up(session_id, reason)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.transport.close()


@asynccontextmanager
async def two(
    transport: str, layouts: tuple[KvLayout | None, KvLayout | None] = (None, None), **differs: str
) -> AsyncIterator[tuple[Worker, Worker]]:
    """A sending and a receiving worker; at the end every page of both is back."""
    prefill, decode = Worker("prefill-0", transport, layouts[0]), Worker("decode-0", transport, layouts[1], **differs)
    decode.peer_layout = prefill.layout
    try:
        yield prefill, decode
    finally:
        for worker in (prefill, decode):
            await asyncio.to_thread(worker.close)
    async with asyncio.timeout(PATIENCE_S):
        while not (prefill.loans.whole and decode.loans.whole):
            await asyncio.sleep(0.005)


async def probe(prefill: Worker, decode: Worker, timeout_s: float = PATIENCE_S) -> ProbeReport:
    return await prefill.prober.run(decode.identity, decode, timeout_s)


everywhere = pytest.mark.parametrize("transport", ["local", "tcp"])


@everywhere
async def test_a_whole_link_passes_and_is_measured(transport: str) -> None:
    async with two(transport) as (prefill, decode):
        report = await probe(prefill, decode)

        assert report.passed, report
        assert report.path.startswith(transport)
        assert report.num_bytes >= FIRST_BYTES
        assert report.rate is not None
        assert report.rate > 0
        estimate = prefill.monitor.estimate(decode.identity.worker_id)
        assert estimate is not None
        assert estimate.samples == 1
        assert decode.receiver.bytes_received == report.num_bytes


@everywhere
async def test_a_link_that_carries_less_exact_numbers_is_tested_raw(transport: str) -> None:
    async with two(transport) as (prefill, decode):
        prefill.codec = Codec.INT8
        report = await probe(prefill, decode)

    assert report.passed, report


@everywhere
async def test_again_and_again_every_page_comes_back(transport: str) -> None:
    async with two(transport) as (prefill, decode):
        for _ in range(3):
            assert (await probe(prefill, decode)).passed
        assert prefill.loans.whole
        assert decode.loans.whole


@everywhere
async def test_one_byte_that_is_wrong_in_the_receivers_pool_fails_it(transport: str) -> None:
    async with two(transport) as (prefill, decode):

        def damage(session_id: SessionId) -> None:
            used = set(range(GEOMETRY.num_pages)) - set(decode.loans.free)
            decode.region.pages(1, min(used), 1)[123] ^= 4

        decode.before_digest = damage
        report = await probe(prefill, decode)

    assert not report.passed
    assert (report.error, report.exact) == ("Corrupted", False)
    assert "arrived changed" in report.reason


@everywhere
async def test_another_cache_at_the_other_end_fails_it(transport: str) -> None:
    async with two(transport, revision="another") as (prefill, decode):
        report = await probe(prefill, decode)

    assert (report.error, report.passed) == ("Incompatible", False)
    assert "revision differs" in report.reason


@everywhere
async def test_a_receiver_that_is_gone_fails_it(transport: str) -> None:
    async with two(transport) as (prefill, decode):
        issue = decode.grant

        async def grant(session_id: SessionId, max_tokens: int) -> Grant:
            granted = await issue(session_id, max_tokens)
            await asyncio.to_thread(decode.close)
            return granted

        decode.grant = grant  # type: ignore[method-assign]
        report = await probe(prefill, decode)

    assert not report.passed
    assert report.error in ("PeerLost", "GrantRefused"), report


@everywhere
async def test_a_refused_grant_fails_it(transport: str) -> None:
    async with two(transport) as (prefill, decode):

        async def refuse(session_id: SessionId, max_tokens: int) -> Grant:
            raise GrantRefused("not today")

        decode.grant = refuse  # type: ignore[method-assign]
        report = await probe(prefill, decode)

    assert (report.error, report.reason) == ("GrantRefused", "not today")


@everywhere
async def test_a_receiver_that_never_answers_fails_it_in_time(transport: str) -> None:
    async with two(transport) as (prefill, decode):
        asked = asyncio.Event()

        async def hang(session_id: SessionId, wait_s: float) -> tuple[bytes, int]:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

        decode.digest = hang  # type: ignore[method-assign]
        report = await probe(prefill, decode, timeout_s=0.5)

        assert asked.is_set()
    assert (report.error, report.passed) == ("PeerLost", False)
    assert "not over after 0.5 s" in report.reason


@pytest.mark.parametrize("short", ["prefill", "decode"])
async def test_without_a_page_to_spare_it_says_nothing(short: str) -> None:
    async with two("local") as (prefill, decode):
        (prefill if short == "prefill" else decode).loans.most = 0

        with pytest.raises(Overloaded, match="no page to spare"):
            await probe(prefill, decode)


async def test_the_receiver_may_have_fewer_pages() -> None:
    async with two("local") as (prefill, decode):
        decode.loans.most = 2

        report = await probe(prefill, decode)

        assert report.passed
        assert report.num_bytes == 4 * GEOMETRY.bytes_per_page


@everywhere
@pytest.mark.parametrize("most", [16, 1], ids=["many pages", "one page"])
@pytest.mark.parametrize(("ours", "theirs"), [(16, 64), (64, 16), (5, 7)])
async def test_pages_of_another_size_at_the_other_end_pass_unless_a_byte_changes(
    transport: str, ours: int, theirs: int, most: int
) -> None:
    layer = KvLayer(4, 32, 32, "float32", 4)
    layouts = KvLayout(ours, (layer,) * 2), KvLayout(theirs, (layer,) * 2)
    async with two(transport, layouts) as (prefill, decode):
        prefill.loans.most = decode.loans.most = most
        report = await probe(prefill, decode)
        assert report.passed, report
        num_pages = min(most, max(1, most * ours // theirs))
        assert report.num_bytes == 2 * 2 * layer.token_bytes * min(most * ours, num_pages * theirs)

        def flip(session_id: SessionId) -> None:
            (pages,) = [lent.pages for name, lent in decode.probed._lent.items() if name == session_id]
            decode.region.pages(1, pages[-1], 1)[0] ^= 1

        decode.before_digest = flip
        assert (await probe(prefill, decode)).error == "Corrupted"


async def test_two_that_are_asked_for_at_once_run_one_after_the_other() -> None:
    async with two("local") as (prefill, decode):
        running = 0
        issue = decode.grant

        async def grant(session_id: SessionId, max_tokens: int) -> Grant:
            nonlocal running
            running += 1
            assert running == 1
            await asyncio.sleep(0.01)
            running -= 1
            return await issue(session_id, max_tokens)

        decode.grant = grant  # type: ignore[method-assign]
        reports = await asyncio.gather(*(probe(prefill, decode) for _ in range(3)))

    assert all(report.passed for report in reports)


async def test_the_digest_of_a_session_that_was_never_granted_is_refused() -> None:
    async with two("local") as (_, decode):
        with pytest.raises(GrantRefused, match="no self-test"):
            await decode.probed.digest(SessionId("unknown"), 0.1)
        granted = await decode.probed.grant(SessionId("known"), 1, decode.layout, b"")
        with pytest.raises(GrantRefused, match="not committed"):
            await decode.probed.digest(SessionId("known"), 0.01)
        with pytest.raises(GrantRefused, match="granted already"):
            await decode.probed.grant(SessionId("known"), 1, decode.layout, b"")
        assert len(granted.pages) == 1


@pytest.mark.parametrize(
    ("num_bytes", "seconds", "expected"),
    [(1 << 20, 1.0, 1 << 20), (1 << 20, 0.01, 40 << 20), (1 << 20, 0.0001, MAX_BYTES), (1 << 20, 0.0, MAX_BYTES)],
    ids=["slow link", "about 0.4 GB/s", "fast link", "not measurable"],
)
def test_the_timed_transfer_is_as_long_as_the_link_is_fast(num_bytes: int, seconds: float, expected: int) -> None:
    assert next_bytes(num_bytes, seconds) == pytest.approx(expected, rel=0.06)
