"""What every transport promises (kv_transfer/transport.py). Whatever TRANSPORTS names goes through this suite."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from threading import Condition, Event
from typing import Any

import pytest

from core.clock import WallClock
from core.errors import Incompatible, PeerLost, ProtocolViolation, TransferAborted, TransferError
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from kv_transfer.config import KvTransferConfig
from kv_transfer.transfer_plan import plan_writes
from kv_transfer.transport import (
    TRANSPORTS,
    Link,
    PageGeometry,
    PageRun,
    PageSpan,
    Region,
    SendLink,
    Transport,
    Write,
    create_transport,
)
from kv_transfer.transport import LayerPages as Pages

FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
GEOMETRY = PageGeometry((Pages(64), Pages(96), Pages(4096)), num_pages=40)
A, B = SessionId("a"), SessionId("b")
TOKEN = bytes(range(16))
PATIENCE_S = 20.0


class Pool:
    def __init__(self, fill: random.Random | None) -> None:
        sizes = [GEOMETRY.num_pages * layer.page_bytes for layer in GEOMETRY.layers]
        self.layers = [bytearray(fill.randbytes(size) if fill else size) for size in sizes]
        self.region = Region(GEOMETRY, tuple(memoryview(layer) for layer in self.layers))

    def page(self, layer: int, page: int) -> bytes:
        return bytes(self.region.pages(layer, page, 1))


class Record:
    """What the events of one transport told, in order; ``until`` waits for it to satisfy a condition."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.told: list[Any] = []

    def tell(self, *what: Any) -> None:
        with self.changed:
            self.told.append(what)
            self.changed.notify_all()

    def until(self, enough: Callable[[list[Any]], bool]) -> list[Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: enough(self.told), PATIENCE_S), self.told
            return list(self.told)

    def until_told(self, *what: Any) -> list[Any]:
        return self.until(lambda told: what in told)

    def until_lost(self) -> TransferError:
        (error,) = [what[1] for what in self.until(lambda told: told and told[-1][0] == "lost") if what[0] == "lost"]
        assert isinstance(error, TransferError)
        return error


class Sending(Record):
    def written(self, link: SendLink, write: Write) -> None:
        self.tell("written", write)

    def notified(self, link: SendLink, message: bytes) -> None:
        self.tell("notified", message)

    def lost(self, link: SendLink, error: TransferError) -> None:
        self.tell("lost", error)


class Receiving(Record):
    """Admits by ``judge``; a message waits for ``gate``, so that a test can hold the link up."""

    def __init__(self) -> None:
        super().__init__()
        self.judge: Callable[[bytes, int, tuple[PageSpan, ...]], bool] = lambda token, layer, spans: True
        self.gate = Event()
        self.gate.set()
        self.links: list[Link] = []

    def admit(self, link: Link, token: bytes, layer: int, spans: tuple[PageSpan, ...]) -> SessionId | None:
        self.tell("admit", layer, spans)
        return A if self.judge(token, layer, spans) else None

    def landed(self, link: Link, session_id: SessionId, num_bytes: int) -> None:
        self.tell("landed", num_bytes)

    def notified(self, link: Link, message: bytes) -> None:
        self.links.append(link)
        self.tell("notified", message)
        assert self.gate.wait(PATIENCE_S)
        if message == b"nonsense":
            raise ProtocolViolation("nonsense")

    def lost(self, link: Link, error: TransferError) -> None:
        self.tell("lost", error)


@dataclass
class End:
    """One worker's transport."""

    transport: Transport
    pool: Pool
    received: Receiving
    sent: Sending = field(default_factory=Sending)

    def connect(self, to: End) -> SendLink:
        return self.transport.connect(to.transport.describe(), self.sent)


MakeEnd = Callable[..., End]


@pytest.fixture(params=sorted(TRANSPORTS))
def make_end(request: pytest.FixtureRequest) -> Iterator[MakeEnd]:
    ends: list[End] = []

    def make(fill: random.Random | None = None, fingerprint: CacheFingerprint = FINGERPRINT) -> End:
        config = KvTransferConfig(transport=request.param, host="127.0.0.1", lease_s=0.2)
        end = End(create_transport(config, fingerprint, WallClock()), Pool(fill), Receiving())
        end.transport.register(end.pool.region)
        end.transport.serve(end.received)
        ends.append(end)
        return end

    yield make
    for end in ends:
        end.received.gate.set()
        end.transport.close()


@pytest.fixture
def prefill(make_end: MakeEnd) -> End:
    return make_end(random.Random(1))


@pytest.fixture
def decode(make_end: MakeEnd) -> End:
    return make_end()


def write(layer: int, *pages: tuple[int, int], session_id: SessionId = A) -> Write:
    return Write(session_id, TOKEN, layer, tuple(PageRun(src, dst, 1) for src, dst in pages))


def test_bytes_are_exact_for_random_page_tables(prefill: End, decode: End) -> None:
    dice = random.Random(2)
    src, dst = dice.sample(range(40), 25), dice.sample(range(40), 25)
    link = prefill.connect(decode)
    for layer, pages in enumerate(GEOMETRY.layers):
        for runs in plan_writes(src, dst, pages.page_bytes, max_write_bytes=5 * pages.page_bytes):
            link.write(Write(A, TOKEN, layer, runs))
    link.notify(A, b"all")
    decode.received.until_told("notified", b"all")
    moved = dict(zip(dst, src, strict=True))
    for layer, pages in enumerate(GEOMETRY.layers):
        for page in range(GEOMETRY.num_pages):
            expected = prefill.pool.page(layer, moved[page]) if page in moved else bytes(pages.page_bytes)
            assert decode.pool.page(layer, page) == expected


def test_a_session_arrives_in_order_and_a_message_overtakes_no_write(prefill: End, decode: End) -> None:
    link = prefill.connect(decode)
    expected: list[Any] = []
    for i in range(30):
        link.write(write(2, (i, i)))
        link.notify(A, b"%d" % i)
        expected += [("admit", 2, (PageSpan(i, 1),)), ("landed", 4096), ("notified", b"%d" % i)]
    assert decode.received.until(lambda told: len(told) == len(expected)) == expected
    written = [what[1].runs[0].src_page for what in prefill.sent.told if what[0] == "written"]
    assert written == list(range(30))


def test_each_of_two_sessions_keeps_its_own_order(prefill: End, decode: End) -> None:
    link = prefill.connect(decode)
    for i in range(20):
        link.notify(A, b"a%02d" % i)
        link.notify(B, b"b%02d" % i)
    told = [what[1] for what in decode.received.until(lambda told: len(told) == 40)]
    for name in (b"a", b"b"):
        assert [text for text in told if text.startswith(name)] == [name + b"%02d" % i for i in range(20)]


def test_a_write_that_is_not_admitted_never_lands_and_what_follows_goes_on(prefill: End, decode: End) -> None:
    decode.received.judge = lambda token, layer, spans: token == TOKEN and spans[0].first_page == 7
    link = prefill.connect(decode)
    link.write(write(2, (1, 6)))
    link.write(replace(write(2, (1, 7)), token=bytes(16)))
    link.write(write(2, (1, 7)))
    link.notify(A, b"all")
    told = decode.received.until_told("notified", b"all")
    assert [what for what in told if what[0] == "landed"] == [("landed", 4096)]
    assert decode.pool.page(2, 6) == bytes(4096)
    assert decode.pool.page(2, 7) == prefill.pool.page(2, 1)
    assert decode.transport.counters.writes_refused == 2


def test_after_a_cancel_at_most_the_write_under_way_is_read(prefill: End, decode: End) -> None:
    decode.received.gate.clear()
    link = prefill.connect(decode)
    link.notify(A, b"hold")
    decode.received.until_told("notified", b"hold")
    for i in range(20):
        link.write(write(2, (i, i)))
    if not link.cancel(A):
        prefill.sent.until(lambda told: any(what[0] == "written" for what in told))
    num_read = len([what for what in prefill.sent.told if what[0] == "written"])
    link.notify(A, b"end")
    decode.received.gate.set()
    told = decode.received.until_told("notified", b"end")
    assert len([what for what in told if what[0] == "admit"]) == num_read
    assert told[-1] == ("notified", b"end")


def test_the_receiving_end_answers(prefill: End, decode: End) -> None:
    prefill.connect(decode).notify(A, b"question")
    decode.received.until_told("notified", b"question")
    decode.received.links[0].notify(A, b"answer")
    prefill.sent.until_told("notified", b"answer")


def test_two_transports_write_to_each_other(make_end: MakeEnd) -> None:
    one, two = make_end(random.Random(1)), make_end(random.Random(2))
    expected = one.pool.page(2, 1), two.pool.page(2, 1)
    for here, there in ((one, two), (two, one)):
        link = here.connect(there)
        link.write(write(2, (1, 9)))
        link.notify(A, b"all")
    for end in (one, two):
        end.received.until_told("notified", b"all")
    assert (two.pool.page(2, 9), one.pool.page(2, 9)) == expected


@pytest.mark.parametrize("closing", ["sending link", "receiving link", "sending transport", "receiving transport"])
def test_a_closed_link_is_lost_once_and_last_at_both_ends(prefill: End, decode: End, closing: str) -> None:
    link = prefill.connect(decode)
    link.notify(A, b"hello")
    decode.received.until_told("notified", b"hello")
    match closing:
        case "sending link":
            link.close(TransferAborted("enough"))
            link.close(TransferAborted("again"))
        case "receiving link":
            decode.received.links[0].close(TransferAborted("enough"))
        case "sending transport":
            prefill.transport.close()
        case "receiving transport":
            decode.transport.close()
    assert isinstance(prefill.sent.until_lost(), PeerLost | TransferAborted)
    assert isinstance(decode.received.until_lost(), PeerLost | TransferAborted)
    link.write(write(0, (0, 0)))
    link.notify(A, b"too late")
    assert link.cancel(A) is True


def test_a_link_to_nobody_is_lost(prefill: End, decode: End) -> None:
    descriptor = decode.transport.describe()
    decode.transport.close()
    prefill.transport.connect(descriptor, prefill.sent)
    assert isinstance(prefill.sent.until_lost(), PeerLost)


def test_a_new_link_works_after_one_was_lost(prefill: End, decode: End) -> None:
    prefill.connect(decode).close(TransferAborted("enough"))
    prefill.sent.until_lost()
    link = prefill.connect(decode)
    link.write(write(2, (3, 4)))
    link.notify(A, b"all")
    decode.received.until_told("notified", b"all")
    assert decode.pool.page(2, 4) == prefill.pool.page(2, 3)


@pytest.mark.parametrize("name", ["model", "revision", "dtype", "page_size", "layout"])
def test_a_peer_with_another_cache_is_refused_by_the_name_of_what_differs(
    make_end: MakeEnd, prefill: End, name: str
) -> None:
    other = 8 if name == "page_size" else "other"
    decode = make_end(fingerprint=replace(FINGERPRINT, **{name: other}))  # type: ignore[arg-type]
    link = prefill.connect(decode)
    link.write(write(0, (0, 0)))
    error = prefill.sent.until_lost()
    assert isinstance(error, Incompatible)
    assert (error.field, error.ours, error.theirs) == (name, str(getattr(FINGERPRINT, name)), str(other))
    decode.transport.close()
    assert decode.received.told == []
    assert decode.transport.counters.links_refused == 1


def test_an_event_that_raises_closes_the_link(prefill: End, decode: End) -> None:
    prefill.connect(decode).notify(A, b"nonsense")
    assert isinstance(decode.received.until_lost(), ProtocolViolation)
    assert isinstance(prefill.sent.until_lost(), TransferError)
    assert decode.transport.counters.bad_frames == 1


def test_a_transport_may_write_to_itself(make_end: MakeEnd) -> None:
    end = make_end(random.Random(1))
    link = end.connect(end)
    link.write(write(2, (1, 9)))
    link.notify(A, b"all")
    end.received.until_told("notified", b"all")
    assert end.pool.page(2, 9) == end.pool.page(2, 1)


@pytest.mark.parametrize("descriptor", [b"", b"x", b"tcp/1", b"local", bytes(40)])
def test_a_malformed_descriptor_raises(prefill: End, descriptor: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        prefill.transport.connect(descriptor, prefill.sent)


def test_an_idle_link_hears_its_peer(prefill: End, decode: End) -> None:
    link = prefill.connect(decode)
    link.notify(A, b"hello")
    decode.received.until_told("notified", b"hello")
    for end in (link, decode.received.links[0]):
        before = end.heard_at
        waiting = Condition()
        with waiting:
            assert any(waiting.wait_for(lambda: end.heard_at > before, 0.05) for _ in range(200))  # noqa: B023


def test_closing_twice_changes_nothing(prefill: End) -> None:
    prefill.transport.close()
    prefill.transport.close()
