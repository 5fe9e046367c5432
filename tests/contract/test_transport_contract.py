"""What every transport promises (kv_transfer/transport.py). Whatever TRANSPORTS names goes through this suite.

A transport may have several lines in ``VARIANTS``: ways to use it that share its promises.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Condition, Event
from typing import Any

import pytest

from cluster.certificates import Authority, write_files
from core.clock import WallClock
from core.credentials import Credentials
from core.errors import Incompatible, PeerLost, ProtocolViolation, TransferAborted, TransferError
from core.fingerprint import MUST_AGREE, CacheFingerprint
from core.request import ClusterId, SessionId, WorkerId
from kv_transfer.config import KvTransferConfig, LinkConfig
from kv_transfer.transport import (
    TRANSPORTS,
    Link,
    PageGeometry,
    PeerIdentity,
    Region,
    SendLink,
    Span,
    Strip,
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
LEASE_S = 4.0  # so long may a reader take nothing before TCP gives it up: longer than a busy machine stops a test


@dataclass(frozen=True)
class Variant:
    transport: str
    link: LinkConfig = field(default_factory=LinkConfig)
    tls: bool = False


VARIANTS = {
    "local": Variant("local"),
    "tcp, one connection": Variant("tcp", LinkConfig(connections=1)),
    "tcp, four connections": Variant("tcp", LinkConfig(connections=4)),
    "tcp, no checksum": Variant("tcp", LinkConfig(connections=2, checksum="none")),
    "tcp, receiver dials": Variant("tcp", LinkConfig(connections=3, dial="receiver")),
    "tcp, TLS": Variant("tcp", LinkConfig(connections=3), tls=True),
    "tcp, TLS, receiver dials": Variant("tcp", LinkConfig(connections=2, dial="receiver"), tls=True),
    "nixl": Variant("nixl"),
    "nixl, no checksum": Variant("nixl", LinkConfig(checksum="none")),
}


def test_the_table_names_every_transport() -> None:
    assert {variant.transport for variant in VARIANTS.values()} == set(TRANSPORTS)


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

    def drained(self, link: SendLink, session_id: SessionId) -> None:
        self.tell("drained", session_id)

    def notified(self, link: SendLink, message: bytes) -> None:
        self.tell("notified", message)

    def lost(self, link: SendLink, error: TransferError) -> None:
        self.tell("lost", error)


class Receiving(Record):
    """Admits by ``judge``; a message waits for ``gate``, so that a test can hold the link up."""

    def __init__(self) -> None:
        super().__init__()
        self.judge: Callable[[bytes, range, Sequence[Span]], bool] = lambda token, layers, spans: True
        self.gate = Event()
        self.gate.set()
        self.links: list[Link] = []

    def admit(self, link: Link, token: bytes, layers: range, spans: Sequence[Span]) -> SessionId | None:
        self.tell("admit", layers, spans)
        return A if self.judge(token, layers, spans) else None

    def landed(self, link: Link, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        self.tell("landed", layers, spans)

    def damaged(self, link: Link, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        self.tell("damaged", layers, spans)

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
        """As a grant does: the receiving end is told of the sending one before that one connects."""
        to.transport.invite(self.transport.describe())
        return self.transport.connect(to.transport.describe(), self.sent)


MakeEnd = Callable[..., End]


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    directory: Path = tmp_path_factory.mktemp("tls")
    authority = Authority.create("contract")
    return write_files(directory, authority.issue("worker"), authority)


@pytest.fixture(params=sorted(VARIANTS))
def make_end(request: pytest.FixtureRequest, credentials: Credentials) -> Iterator[MakeEnd]:
    variant = VARIANTS[request.param]
    if variant.transport == "nixl":
        pytest.importorskip("nixl", reason="pip install 'prfaas[nixl]'")
    ends: list[End] = []

    def make(fill: random.Random | None = None, fingerprint: CacheFingerprint = FINGERPRINT) -> End:
        config = KvTransferConfig(
            transport=variant.transport, host="127.0.0.1", lease_s=LEASE_S, links=(variant.link,), staging_mib=1
        )
        identity = PeerIdentity(WorkerId(f"w{len(ends)}"), ClusterId("here"))
        tls = credentials if variant.tls else None
        end = End(create_transport(config, fingerprint, WallClock(), identity, tls), Pool(fill), Receiving())
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
    size = GEOMETRY.layers[layer].page_bytes
    strips = tuple(Strip(src * size, dst * size, size) for src, dst in pages)
    return Write(session_id, TOKEN, layer, 1, strips)


def spans_of(write: Write) -> tuple[Span, ...]:
    return tuple(Span(strip.dst, strip.num_bytes) for strip in write.strips)


def test_bytes_are_exact_for_random_page_tables(prefill: End, decode: End) -> None:
    dice = random.Random(2)
    src, dst = dice.sample(range(40), 25), dice.sample(range(40), 25)
    link = prefill.connect(decode)
    for layer in range(GEOMETRY.num_layers):
        for i in range(0, 25, 5):
            link.write(write(layer, *zip(src[i : i + 5], dst[i : i + 5], strict=True)))
    link.notify(A, b"all")
    decode.received.until_told("notified", b"all")
    moved = dict(zip(dst, src, strict=True))
    for layer, pages in enumerate(GEOMETRY.layers):
        for page in range(GEOMETRY.num_pages):
            expected = prefill.pool.page(layer, moved[page]) if page in moved else bytes(pages.page_bytes)
            assert decode.pool.page(layer, page) == expected


def test_one_write_may_hold_several_layers_and_parts_of_pages(prefill: End, decode: End) -> None:
    strips = (Strip(10, 30, 20), Strip(64, 0, 7), Strip(1, 60, 1))
    link = prefill.connect(decode)
    link.write(Write(A, TOKEN, 0, 3, strips))
    link.notify(A, b"all")
    told = decode.received.until_told("notified", b"all")
    spans = tuple(Span(strip.dst, strip.num_bytes) for strip in strips)
    assert ("admit", range(3), spans) in told
    assert ("landed", range(3), spans) in told
    for layer in range(3):
        expected = bytearray(len(decode.pool.layers[layer]))
        for strip in strips:
            expected[strip.dst : strip.dst + strip.num_bytes] = prefill.pool.region.bytes_at(
                layer, strip.src, strip.num_bytes
            )
        assert decode.pool.layers[layer] == expected


def test_a_message_overtakes_neither_write_nor_message(prefill: End, decode: End) -> None:
    link = prefill.connect(decode)
    writes = [write(2, (i, i)) for i in range(30)]
    for i, one in enumerate(writes):
        link.write(one)
        link.notify(A, b"%d" % i)
    told = decode.received.until_told("notified", b"29")
    for i, one in enumerate(writes):
        assert told.index(("landed", range(2, 3), spans_of(one))) < told.index(("notified", b"%d" % i))
    assert [what[1] for what in told if what[0] == "notified"] == [b"%d" % i for i in range(30)]
    counts = Counter(what[0] for what in told)
    assert (counts["admit"], counts["landed"], counts["damaged"]) == (30, 30, 0)
    sent = prefill.sent.until(lambda told: len([what for what in told if what[0] == "written"]) == 30)
    assert {what[1] for what in sent} == set(writes)


def test_each_of_two_sessions_keeps_its_own_order(prefill: End, decode: End) -> None:
    link = prefill.connect(decode)
    for i in range(20):
        link.notify(A, b"a%02d" % i)
        link.notify(B, b"b%02d" % i)
    told = [what[1] for what in decode.received.until(lambda told: len(told) == 40)]
    for name in (b"a", b"b"):
        assert [text for text in told if text.startswith(name)] == [name + b"%02d" % i for i in range(20)]


def test_a_write_that_is_not_admitted_never_lands_and_what_follows_goes_on(prefill: End, decode: End) -> None:
    decode.received.judge = lambda token, layers, spans: token == TOKEN and spans[0].offset == 7 * 4096
    link = prefill.connect(decode)
    link.write(write(2, (1, 6)))
    link.write(replace(write(2, (1, 7)), token=bytes(16)))
    link.write(write(2, (1, 7)))
    link.notify(A, b"all")
    told = decode.received.until_told("notified", b"all")
    assert [what for what in told if what[0] == "landed"] == [("landed", range(2, 3), (Span(7 * 4096, 4096),))]
    assert decode.pool.page(2, 6) == bytes(4096)
    assert decode.pool.page(2, 7) == prefill.pool.page(2, 1)
    assert decode.transport.counters.writes_refused == 2


def test_a_write_that_is_sent_again_is_asked_for_again(prefill: End, decode: End) -> None:
    seen: Counter[Sequence[Span]] = Counter()

    def once(token: bytes, layers: range, spans: Sequence[Span]) -> bool:
        seen[spans] += 1
        return seen[spans] == 1

    decode.received.judge = once
    link = prefill.connect(decode)
    for page in (5, 3, 5, 4, 3):
        link.write(write(2, (page, page)))
        link.notify(A, b"%d" % page)  # so that the copies do not race each other into judge
    link.notify(A, b"all")
    told = decode.received.until_told("notified", b"all")
    assert Counter(what[0] for what in told if what[0] != "notified") == {"admit": 5, "landed": 3}
    assert decode.transport.counters.writes_refused == 2


def test_after_a_cancel_only_writes_under_way_are_read_and_drained_tells_of_the_last(prefill: End, decode: End) -> None:
    in_admit, go = Event(), Event()

    def hold(token: bytes, layers: range, spans: Sequence[Span]) -> bool:
        in_admit.set()
        return go.wait(PATIENCE_S)

    decode.received.judge = hold
    link = prefill.connect(decode)
    for _ in range(1000):
        link.write(write(2, *((page, page) for page in range(40))))
    assert in_admit.wait(PATIENCE_S)
    idle = link.cancel(A)
    link.notify(A, b"end")
    go.set()
    told = decode.received.until_told("notified", b"end")
    if not idle:
        prefill.sent.until_told("drained", A)
    names = [what[0] for what in prefill.sent.told]
    assert names.count("drained") == (0 if idle else 1)
    if not idle:
        assert names[-1] == "drained"
    assert len([what for what in told if what[0] == "admit"]) == names.count("written") < 1000
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


def test_an_invitation_alone_is_no_link(prefill: End, decode: End) -> None:
    decode.transport.invite(prefill.transport.describe())
    decode.transport.invite(prefill.transport.describe())
    decode.transport.close()
    assert {what[0] for what in decode.received.told} <= {"lost"}
    assert prefill.sent.told == []


def test_a_new_link_works_after_one_was_lost(prefill: End, decode: End) -> None:
    prefill.connect(decode).close(TransferAborted("enough"))
    prefill.sent.until_lost()
    link = prefill.connect(decode)
    link.write(write(2, (3, 4)))
    link.notify(A, b"all")
    decode.received.until_told("notified", b"all")
    assert decode.pool.page(2, 4) == prefill.pool.page(2, 3)


@pytest.mark.parametrize("name", MUST_AGREE)
def test_a_peer_with_another_cache_is_refused_by_the_name_of_what_differs(
    make_end: MakeEnd, prefill: End, name: str
) -> None:
    decode = make_end(fingerprint=replace(FINGERPRINT, **{name: "other"}))
    link = prefill.connect(decode)
    link.write(write(0, (0, 0)))
    error = prefill.sent.until_lost()
    assert isinstance(error, Incompatible)
    assert (error.field, error.ours, error.theirs) == (name, getattr(FINGERPRINT, name), "other")
    for end in (decode, prefill):  # whichever listened counts when it has refused, which may be later
        end.transport.close()
    assert decode.received.told == []
    assert prefill.transport.counters.links_refused + decode.transport.counters.links_refused >= 1


def test_an_event_that_raises_closes_the_link(prefill: End, decode: End) -> None:
    prefill.connect(decode).notify(A, b"nonsense")
    assert isinstance(decode.received.until_lost(), ProtocolViolation)
    assert isinstance(prefill.sent.until_lost(), TransferError)
    assert decode.transport.counters.bad_frames == 1


def test_the_sending_end_tells_of_its_links(prefill: End, decode: End) -> None:
    link = prefill.connect(decode)
    num_bytes = 10 * 4096
    link.write(write(2, *((page, page) for page in range(10))))
    link.notify(A, b"all")
    decode.received.until_told("notified", b"all")
    prefill.sent.until(lambda told: len(told) == 1)  # written
    for _ in range(int(PATIENCE_S / 0.01)):
        (stats,) = prefill.transport.stats()
        if stats.bytes_sent:  # what was read from the pool may still be on its way
            break
        Event().wait(0.01)
    assert decode.transport.stats() == ()
    assert stats.peer == PeerIdentity(WorkerId("w1"), ClusterId("here"))
    assert (stats.bytes_queued, stats.reconnects) == (0, 0)  # no word of retransmits: a busy kernel has some
    assert stats.bytes_sent == num_bytes
    assert stats.connections >= 1
    assert stats.path
    assert stats.busy_s > 0
    link.close(TransferAborted("enough"))
    prefill.sent.until_lost()
    assert prefill.transport.stats() == ()


def test_a_transport_may_write_to_itself(make_end: MakeEnd) -> None:
    end = make_end(random.Random(1))
    link = end.connect(end)
    link.write(write(2, (1, 9)))
    link.notify(A, b"all")
    end.received.until_told("notified", b"all")
    assert end.pool.page(2, 9) == end.pool.page(2, 1)


@pytest.mark.parametrize("descriptor", [b"", b"x", b"tcp/2", b"local", bytes(80), b"tcp/2" + bytes(80)])
def test_a_malformed_descriptor_raises(prefill: End, descriptor: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        prefill.transport.connect(descriptor, prefill.sent)
    assert prefill.sent.told == []


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
