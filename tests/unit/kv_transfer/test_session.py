from __future__ import annotations

from collections import deque

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.errors import Corrupted, PeerLost, ProtocolViolation, TransferAborted, TransferError
from core.request import SessionId
from kv_transfer import session as session_module
from kv_transfer.messages import Begin, Commit, Missing, Resend
from kv_transfer.session import (
    MAX_RESENDS,
    RECEIVE_MOVES,
    SEND_MOVES,
    Expected,
    Grant,
    Outgoing,
    ReceiveSession,
    ReceiveState,
    SendReport,
    SendSession,
    SendState,
)
from kv_transfer.spans import Spans
from kv_transfer.transfer_plan import layout_of_pages
from kv_transfer.transport import LayerPages, PageGeometry, PieceLimits, SendOrder, Span, Strip, Write

NAME = SessionId("s")
TOKEN = bytes(16)
NUM_PAGES = 4
GEOMETRY = PageGeometry((LayerPages(8), LayerPages(8)), num_pages=10)
LAYOUT = layout_of_pages(GEOMETRY)
GRANT = Grant(NAME, TOKEN, first_page=1, pages=(7, 5, 6), descriptor=b"", lease_s=30.0)
ABORTED = TransferAborted("enough")
GONE = PeerLost("gone")


SLOW = 1.0  # bytes/s of a link on which layers are not let pile up


def opened(num_pages: int = NUM_PAGES) -> SendSession:
    return SendSession(NAME, num_pages, GEOMETRY, LAYOUT, SendOrder())


def sending() -> SendSession:
    session = opened()
    session.grant(GRANT, 0.0, SLOW)
    return session


def issued(pages: tuple[int, ...] = GRANT.pages) -> ReceiveSession:
    expected = Expected(LAYOUT, GRANT.first_page, pages, GRANT.first_page + len(pages), LAYOUT)
    return ReceiveSession(NAME, TOKEN, expected, 0.0)


def receiving() -> ReceiveSession:
    session = issued()
    session.begin()
    return session


def only(layer: int) -> range:
    return range(layer, layer + 1)


def whole(session: ReceiveSession) -> ReceiveSession:
    for layer in range(GEOMETRY.num_layers):
        session.admit(only(layer), [Span(40, 24)])
        session.landed()
    return session


# ---- sending ----


def test_what_was_stored_before_the_grant_is_sent_after_it_without_the_pages_cached_at_the_receiver() -> None:
    session = opened()
    assert session.store(0, 0, [2, 3, 4, 5], 1.0) == []
    assert session.grant(GRANT, 2.0, SLOW) == [
        Begin(NAME, TOKEN),
        Write(NAME, TOKEN, 0, 1, (Strip(24, 56, 8), Strip(32, 40, 16))),
    ]


def test_what_is_stored_after_the_grant_is_sent_at_once() -> None:
    session = sending()
    assert session.store(1, 2, [8], 1.0) == [Write(NAME, TOKEN, 1, 1, (Strip(64, 40, 8),))]


def test_pages_that_the_receiver_caches_are_not_sent() -> None:
    assert sending().store(1, 0, [8], 1.0) == []


def test_a_commit_before_the_grant_follows_the_writes() -> None:
    session = opened()
    session.store(0, 1, [3], 0.0)
    assert session.commit(b"token", 1.0) == []
    outgoing = session.grant(GRANT, 2.0)
    assert [type(item) for item in outgoing] == [Begin, Write, Commit]
    assert session.state is SendState.COMMITTING


def test_an_acknowledged_commit_closes_with_the_times_of_the_hand_over() -> None:
    session = sending()
    (item,) = session.store(0, 1, [3], 10.0)
    assert isinstance(item, Write)
    session.written(item)
    session.commit(b"", 12.0)
    session.acknowledged(12.5)
    assert session.report == SendReport(
        None, bytes_sent=8, num_writes=1, transfer_s=2.5, exposed_s=0.5, tail_bytes=0, num_groups=1
    )
    assert session.report.bytes_overlapped == 8


@pytest.mark.parametrize(("granted_at", "wait_s"), [(11.0, 0.0), (13.5, 1.5)], ids=["before", "after"])
def test_of_the_tail_it_is_told_how_long_the_grant_was_waited_for(granted_at: float, wait_s: float) -> None:
    session = opened()
    session.store(0, 1, [3], 10.0)
    outgoing: list[Outgoing] = []
    if granted_at < 12.0:
        outgoing += session.grant(GRANT, granted_at)
    outgoing += session.commit(b"", 12.0)
    if granted_at > 12.0:
        outgoing += session.grant(GRANT, granted_at)
    for write in outgoing:
        if isinstance(write, Write):
            session.written(write)
    session.acknowledged(14.0)
    assert session.report is not None
    assert (session.report.exposed_s, session.report.wait_s) == (2.0, wait_s)


def test_what_the_receiver_misses_is_sent_again_and_the_commit_behind_it() -> None:
    session = sending()
    (first,) = session.store(0, 1, [3, 4], 0.0)
    session.store(1, 1, [3, 4, 8], 0.0)
    session.commit(b"token", 0.0)
    assert isinstance(first, Write)
    assert session.resend([Missing(only(0), (Span(56, 8), Span(40, 4)))]) == [
        Write(NAME, TOKEN, 0, 1, (Strip(24, 56, 8), Strip(32, 40, 4))),
        Commit(NAME, TOKEN, b"token"),
    ]
    assert session.state is SendState.COMMITTING
    session.acknowledged(1.0)
    assert session.report is not None
    assert session.report.writes_resent == 1


@pytest.mark.parametrize(
    "missing",
    [
        pytest.param(Missing(only(0), (Span(56, 16),)), id="more than was sent"),
        pytest.param(Missing(range(2), (Span(56, 8),)), id="a layer that was not stored"),
        pytest.param(Missing(only(7), (Span(56, 8),)), id="a layer that does not exist"),
        pytest.param(Missing(only(0), (Span(56, 8), Span(60, 2))), id="a byte twice"),
    ],
)
def test_a_request_for_what_was_never_sent_raises_and_changes_nothing(missing: Missing) -> None:
    session = sending()
    session.store(0, 1, [3], 0.0)
    session.commit(b"", 0.0)
    for _ in range(MAX_RESENDS + 1):
        with pytest.raises(ProtocolViolation):
            session.resend([missing])
    assert len(session.resend([Missing(only(0), (Span(56, 8),))])) == 2


def test_a_request_too_many_raises() -> None:
    session = sending()
    session.store(0, 1, [3], 0.0)
    session.commit(b"", 0.0)
    for _ in range(MAX_RESENDS):
        session.resend([Missing(only(0), (Span(56, 8),))])
    with pytest.raises(ProtocolViolation, match="more than"):
        session.resend([Missing(only(0), (Span(56, 8),))])


# ---- groups of layers ----


def test_layers_pile_up_until_the_last_one_and_travel_as_one_write() -> None:
    session = opened()
    session.grant(GRANT, 0.0)
    assert session.store(0, 1, [3, 4], 0.0) == []
    assert session.store(1, 1, [3, 4], 0.0) == [Write(NAME, TOKEN, 0, 2, (Strip(24, 56, 8), Strip(32, 40, 8)))]


@pytest.mark.parametrize(("bytes_per_s", "sizes"), [(SLOW, [8, 8, 8]), (16 / 1.5e-3, [16, 8])])
def test_pieces_are_as_large_as_the_speed_of_the_link_lets_them_be(bytes_per_s: float, sizes: list[int]) -> None:
    session = SendSession(NAME, NUM_PAGES, GEOMETRY, LAYOUT, SendOrder(), PieceLimits(8, 8, fast_bytes=16))
    session.grant(GRANT, 0.0, bytes_per_s)
    session.store(0, 1, [3, 5, 8], 0.0)
    writes = session.store(1, 1, [3, 5, 8], 0.0)
    assert [write.num_bytes for write in writes if isinstance(write, Write) and write.first_layer == 1] == sizes


@pytest.mark.parametrize(
    ("layer", "first_page", "pages"),
    [
        pytest.param(0, 2, [4], id="the next chunk"),
        pytest.param(1, 1, [4], id="other pages"),
    ],
)
def test_what_does_not_continue_a_group_sends_it_off(layer: int, first_page: int, pages: list[int]) -> None:
    session = opened()
    session.grant(GRANT, 0.0)
    assert session.store(0, 1, [3], 0.0) == []
    assert session.store(layer, first_page, pages, 0.0)[0] == Write(NAME, TOKEN, 0, 1, (Strip(24, 56, 8),))


def test_a_commit_sends_off_what_was_held_back() -> None:
    session = opened()
    session.grant(GRANT, 0.0)
    session.store(0, 1, [3], 0.0)
    assert [type(item) for item in session.commit(b"", 0.0)] == [Write, Commit]


def test_layers_of_unequal_pages_are_not_one_group() -> None:
    geometry = PageGeometry((LayerPages(8), LayerPages(16), LayerPages(16)), num_pages=10)
    session = SendSession(NAME, NUM_PAGES, geometry, layout_of_pages(geometry), SendOrder())
    session.grant(GRANT, 0.0)
    writes = [item for layer in range(3) for item in session.store(layer, 1, [3], 0.0)]
    assert [(item.first_layer, item.num_layers) for item in writes if isinstance(item, Write)] == [(0, 1), (1, 2)]


def test_an_abort_before_the_grant_closes_at_once() -> None:
    session = opened()
    session.abort(ABORTED, 0.0)
    assert session.report is not None
    assert session.report.error is ABORTED


@pytest.mark.parametrize("committed", [False, True])
def test_an_abort_after_the_grant_closes_when_drained(committed: bool) -> None:
    session = sending()
    if committed:
        session.commit(b"", 0.0)
    session.abort(ABORTED, 0.0)
    assert session.report is None
    assert session.store(0, 1, [3], 0.0) == []
    session.drained(0.0)
    assert session.report is not None
    assert session.report.error is ABORTED


def test_an_abort_stays_the_reason_when_the_link_is_lost_after_it() -> None:
    session = sending()
    session.abort(ABORTED, 0.0)
    session.lost(GONE, 0.0)
    assert session.report is not None
    assert session.report.error is ABORTED


def test_a_grant_of_another_size_raises_and_changes_nothing() -> None:
    session = opened(NUM_PAGES + 1)
    with pytest.raises(ProtocolViolation):
        session.grant(GRANT, 0.0)
    assert session.state is SendState.OPEN


@pytest.mark.parametrize(
    ("layer", "first_page", "pages"),
    [(2, 0, [1]), (-1, 0, [1]), (0, -1, [1]), (0, 3, [1, 2]), (0, 0, [10]), (0, 0, [-1])],
)
def test_storing_what_does_not_exist_raises(layer: int, first_page: int, pages: list[int]) -> None:
    with pytest.raises(ProtocolViolation):
        sending().store(layer, first_page, pages, 0.0)


def test_storing_or_committing_after_the_commit_raises() -> None:
    session = sending()
    session.commit(b"", 0.0)
    with pytest.raises(ProtocolViolation):
        session.store(0, 1, [1], 0.0)
    with pytest.raises(ProtocolViolation):
        session.commit(b"", 0.0)
    assert session.state is SendState.COMMITTING


def in_send_state(state: SendState) -> SendSession:
    if state is SendState.OPEN:
        return opened()
    session = sending()
    if state is SendState.COMMITTING:
        session.commit(b"", 0.0)
    if state is SendState.ABORTING:
        session.abort(ABORTED, 0.0)
    if state is SendState.CLOSED:
        session.lost(GONE, 0.0)
    return session


SEND_ACTS = {
    "grant": (lambda s: s.grant(GRANT, 0.0), {SendState.OPEN}),
    "acknowledged": (lambda s: s.acknowledged(0.0), {SendState.COMMITTING}),
    "resend": (lambda s: s.resend(()), {SendState.COMMITTING}),
    "abort": (lambda s: s.abort(ABORTED, 0.0), {SendState.OPEN, SendState.SENDING, SendState.COMMITTING}),
    "drained": (lambda s: s.drained(0.0), {SendState.ABORTING}),
    "lost": (lambda s: s.lost(GONE, 0.0), set(SendState) - {SendState.CLOSED}),
}


@pytest.mark.parametrize("state", SendState)
@pytest.mark.parametrize("act", SEND_ACTS)
def test_an_illegal_act_on_a_sending_session_raises_and_changes_nothing(act: str, state: SendState) -> None:
    do, legal = SEND_ACTS[act]
    session = in_send_state(state)
    report = session.report
    if state in legal:
        do(session)
        assert session.state in SEND_MOVES[state] | ({state} if act == "resend" else set())
        return
    with pytest.raises(ProtocolViolation):
        do(session)
    assert session.state is state
    assert session.report is report


# ---- receiving ----


def test_a_session_whose_every_page_landed_commits() -> None:
    session = whole(receiving())
    assert session.commit() == ()
    assert session.state is ReceiveState.COMMITTED


def test_a_session_of_no_pages_commits_at_once() -> None:
    session = issued(())
    session.begin()
    session.commit()
    assert session.state is ReceiveState.COMMITTED


def test_a_commit_with_bytes_missing_asks_for_them_and_changes_nothing_else() -> None:
    session = receiving()
    session.admit(only(0), [Span(40, 24)])
    session.landed()
    assert session.commit() == (Missing(only(1), (Span(40, 24),)),)
    assert session.state is ReceiveState.RECEIVING
    session.admit(only(1), [Span(40, 24)])
    session.landed()
    assert session.commit() == ()


def test_layers_that_miss_the_same_are_asked_for_in_one_entry() -> None:
    session = receiving()
    session.admit(range(2), [Span(40, 8)])
    session.landed()
    assert session.commit() == (Missing(range(2), (Span(48, 16),)),)


@pytest.mark.parametrize("committed", [False, True], ids=["before the commit", "after it"])
def test_what_came_damaged_is_missing_again(committed: bool) -> None:
    session = receiving()
    session.admit(range(2), [Span(40, 24)])
    if committed:
        session.landed()
        session = receiving()
        assert session.commit() == (Missing(range(2), (Span(40, 24),)),)
        session.admit(range(2), [Span(40, 24)])
    session.damaged(range(2), [Span(40, 24)])
    assert session.commit() == (Missing(range(2), (Span(40, 24),)),)


def test_damage_while_quarantined_ends_with_the_quarantine() -> None:
    session = receiving()
    session.admit(only(0), [Span(40, 24)])
    session.abort(ABORTED)
    session.damaged(only(0), [Span(40, 24)])
    assert session.state is ReceiveState.QUARANTINED
    session.stopped(GONE)
    assert (session.state, session.error) == (ReceiveState.RELEASED, ABORTED)


def test_what_was_asked_for_too_often_is_corrupted() -> None:
    session = receiving()
    for _ in range(MAX_RESENDS):
        assert session.commit() != ()
    with pytest.raises(Corrupted, match="48 bytes"):
        session.commit()
    assert session.state is ReceiveState.RECEIVING


def test_a_commit_with_a_page_under_way_raises() -> None:
    session = issued((5,))
    session.begin()
    session.admit(only(0), [Span(40, 8)])
    with pytest.raises(ProtocolViolation):
        session.commit()
    session.landed()
    session.admit(only(1), [Span(40, 8)])
    session.landed()
    assert session.commit() == ()


@pytest.mark.parametrize(
    ("layer", "spans", "fault"),
    [
        (2, [Span(40, 8)], "layers range"),
        (0, [Span(40, 0)], "twice|outside"),
        (0, [Span(44, 24)], "outside"),
        (0, [Span(32, 16)], "outside"),
        (0, [Span(40, 32)], "outside"),
        (0, [Span(40, 8), Span(40, 8)], "twice"),
        (1, [Span(48, 16)], "twice"),
    ],
)
def test_a_write_outside_the_grant_raises_and_changes_nothing(layer: int, spans: list[Span], fault: str) -> None:
    session = receiving()
    session.admit(only(1), [Span(56, 8)])
    session.landed()
    with pytest.raises(ProtocolViolation, match=fault):
        session.admit(only(layer), spans)
    session.admit(only(0), [Span(40, 24)])
    session.landed()
    session.admit(only(1), [Span(40, 16)])
    session.landed()
    assert session.commit() == ()


def test_a_write_of_two_layers_of_which_one_may_not_take_it_changes_neither() -> None:
    session = receiving()
    session.admit(only(1), [Span(48, 8)])
    session.landed()
    with pytest.raises(ProtocolViolation, match="layer 1 are written twice"):
        session.admit(range(2), [Span(40, 8), Span(48, 8)])
    assert session.commit() == (Missing(only(0), (Span(40, 24),)), Missing(only(1), (Span(40, 8), Span(56, 8))))


def in_receive_state(state: ReceiveState) -> ReceiveSession:
    if state is ReceiveState.ISSUED:
        return issued()
    session = whole(receiving())
    if state is ReceiveState.QUARANTINED:
        session.abort(ABORTED)
    if state is ReceiveState.COMMITTED:
        session.commit()
    if state is ReceiveState.RELEASED:
        session.stopped(GONE)
    return session


RECEIVE_ACTS = {
    "begin": (lambda s: s.begin(), {ReceiveState.ISSUED}),
    "commit": (lambda s: s.commit(), {ReceiveState.RECEIVING}),
    "abort": (lambda s: s.abort(ABORTED), {ReceiveState.ISSUED, ReceiveState.RECEIVING}),
    "stopped": (lambda s: s.stopped(GONE), {ReceiveState.ISSUED, ReceiveState.RECEIVING, ReceiveState.QUARANTINED}),
}


@pytest.mark.parametrize("state", ReceiveState)
@pytest.mark.parametrize("act", RECEIVE_ACTS)
def test_an_illegal_act_on_a_receiving_session_raises_and_changes_nothing(act: str, state: ReceiveState) -> None:
    do, legal = RECEIVE_ACTS[act]
    session = in_receive_state(state)
    error = session.error
    if state in legal:
        do(session)
        assert session.state in RECEIVE_MOVES[state]
        return
    with pytest.raises(ProtocolViolation):
        do(session)
    assert session.state is state
    assert session.error is error


@pytest.mark.parametrize("state", [state for state in ReceiveState if state is not ReceiveState.RECEIVING])
def test_no_write_is_admitted_but_while_receiving(state: ReceiveState) -> None:
    with pytest.raises(ProtocolViolation):
        in_receive_state(state).admit(only(0), [Span(40, 8)])


def test_an_abort_before_anyone_began_releases_at_once_and_one_after_it_quarantines() -> None:
    issued, begun = in_receive_state(ReceiveState.ISSUED), receiving()
    issued.abort(ABORTED)
    begun.abort(ABORTED)
    assert (issued.state, begun.state) == (ReceiveState.RELEASED, ReceiveState.QUARANTINED)
    begun.stopped(GONE)
    assert begun.error is ABORTED


# ---- both, over a wire that is a queue ----


def spans_of(write: Write) -> list[Span]:
    return [Span(strip.dst, strip.num_bytes) for strip in write.strips]


class Pair:
    """A sending and a receiving session, joined by a queue each way, as KvSender and KvReceiver join them."""

    def __init__(self, link_bytes_per_s: float | None) -> None:
        self.link_bytes_per_s = link_bytes_per_s
        self.send = opened()
        self.receive = issued()
        self.to_receiver: deque[Outgoing | str] = deque()
        self.to_sender: deque[str | Resend] = deque()
        self.to_store = [(layer, page) for layer in range(GEOMETRY.num_layers) for page in range(NUM_PAGES)]
        self.committed = False
        self.broken = False
        self.copied: dict[tuple[int, int], int] = {}  # (layer, byte there) |-> byte here

    @property
    def send_ended(self) -> bool:
        return self.send.state is SendState.CLOSED

    @property
    def receive_ended(self) -> bool:
        return self.receive.state in (ReceiveState.COMMITTED, ReceiveState.RELEASED)

    def grant(self) -> None:
        if self.send.state is SendState.OPEN and not self.broken:
            self.to_receiver += self.send.grant(GRANT, 0.0, self.link_bytes_per_s)

    def store(self) -> None:
        if self.to_store and not self.committed:
            layer, page = self.to_store.pop()
            self.to_receiver += self.send.store(layer, page, [page], 0.0)

    def finish(self) -> None:
        while self.to_store and not self.committed:
            self.store()
        self.commit()

    def commit(self) -> None:
        if not self.committed:
            self.committed = True
            self.to_receiver += self.send.commit(b"", 0.0)

    def abort_here(self, error: TransferError = ABORTED, farewell: str = "abort") -> None:
        if self.send.state in (SendState.ABORTING, SendState.CLOSED):
            return
        granted = self.send.state is not SendState.OPEN
        self.send.abort(error, 0.0)
        if granted:
            self.to_receiver = deque(item for item in self.to_receiver if not isinstance(item, Write | Commit))
            self.to_receiver.append(farewell)
            self.send.drained(0.0)

    def abort_there(self, error: TransferError = ABORTED) -> None:
        if self.receive.state in (ReceiveState.ISSUED, ReceiveState.RECEIVING):
            begun = self.receive.state is ReceiveState.RECEIVING
            self.receive.abort(error)
            if begun and not self.broken:
                self.to_sender.append("abort")

    def break_link(self) -> None:
        """The link belongs to the session from the grant (sender) and from Begin (receiver) on."""
        self.broken = True
        self.to_receiver.clear()
        self.to_sender.clear()
        if self.send.state not in (SendState.OPEN, SendState.CLOSED):
            self.send.lost(GONE, 0.0)
        if self.receive.state in (ReceiveState.RECEIVING, ReceiveState.QUARANTINED):
            self.receive.stopped(GONE)

    def deliver(self) -> None:
        if not self.to_receiver:
            return
        item = self._next()
        if isinstance(item, Begin):
            self._begin()
        elif self.receive_ended or self.receive.state is ReceiveState.ISSUED:
            return
        elif item == "abort":
            self.receive.stopped(ABORTED)
        elif self.receive.state is ReceiveState.RECEIVING:
            self._take(item)

    def lose(self) -> None:
        """A connection breaks with a write in it."""
        self.to_receiver = deque(item for i, item in enumerate(self.to_receiver) if i or not isinstance(item, Write))

    def damage(self) -> None:
        """A write arrives, but not as it was sent."""
        if self.receive.state is not ReceiveState.RECEIVING or not self.to_receiver:
            return
        if isinstance(self.to_receiver[0], Write):
            write = self._next()
            assert isinstance(write, Write)
            self.receive.admit(write.layers, spans_of(write))
            self.receive.damaged(write.layers, spans_of(write))

    def reply(self) -> None:
        if not self.to_sender:
            return
        item = self.to_sender.popleft()
        if item == "abort":
            if self.send_ended:
                self.to_receiver.append("abort")
            self.abort_here()
        elif self.send.state is SendState.COMMITTING:
            if isinstance(item, Resend):
                self._ask_again(item)
            else:
                self.send.acknowledged(0.0)

    def _ask_again(self, item: Resend) -> None:
        try:
            self.to_receiver += self.send.resend(item.missing)
        except ProtocolViolation as error:  # the model may commit without having stored everything
            self.abort_here(error)

    def _next(self) -> Outgoing | str:
        """Writes of one session land in any order; nothing overtakes a write that was queued before it."""
        num_writes = next((i for i, item in enumerate(self.to_receiver) if not isinstance(item, Write)), 0)
        self.to_receiver.rotate(-max(0, num_writes - 1))
        item = self.to_receiver.popleft()
        self.to_receiver.rotate(max(0, num_writes - 1))
        return item

    def _begin(self) -> None:
        if self.receive.state is ReceiveState.ISSUED:
            self.receive.begin()
        else:
            self.to_sender.append("abort")

    def _take(self, item: Outgoing | str) -> None:
        if isinstance(item, Write):
            self.receive.admit(item.layers, spans_of(item))
            self.receive.landed()
            for layer in item.layers:
                for strip in item.strips:
                    self.copied |= {(layer, strip.dst + i): strip.src + i for i in range(strip.num_bytes)}
        elif isinstance(item, Commit):
            self._take_commit()

    def _take_commit(self) -> None:
        try:
            missing = self.receive.commit()
        except (ProtocolViolation, Corrupted) as error:
            self.abort_there(error)
            return
        self.to_sender.append(Resend(NAME, TOKEN, missing) if missing else "ack")


ENDS = ["commit", "abort_here", "abort_there", "break_link"]
STEPS = ["grant", "store", "store", "finish", "deliver", "deliver", "reply"]
FAULTS = ["lose", "damage"] * 8
WHOLE = {
    (layer, GRANT.pages[page - 1] * 8 + i): page * 8 + i
    for layer in range(GEOMETRY.num_layers)
    for page in range(1, NUM_PAGES)
    for i in range(8)
}


@given(st.lists(st.sampled_from(ENDS + FAULTS + STEPS * 20), max_size=60), st.sampled_from([SLOW, None]))
@settings(max_examples=500)
def test_any_interleaving_ends_with_one_outcome_at_each_end(acts: list[str], link_bytes_per_s: float | None) -> None:
    pair = Pair(link_bytes_per_s)
    for act in acts:
        getattr(pair, act)()
    while pair.to_receiver or pair.to_sender:
        pair.deliver()
        pair.reply()
    pair.abort_here()
    while pair.to_receiver or pair.to_sender:
        pair.deliver()
        pair.reply()
    pair.abort_there()  # what expire does for a grant that nobody began
    assert pair.send_ended
    assert pair.receive_ended
    report = pair.send.report
    assert report is not None
    if report.error is None:
        assert pair.receive.state is ReceiveState.COMMITTED
    assert (pair.receive.state is ReceiveState.COMMITTED) == (pair.receive.error is None)
    if pair.receive.state is ReceiveState.COMMITTED:
        assert pair.copied == WHOLE


@given(st.lists(st.sampled_from(["lose", "damage", "deliver", "reply"]), max_size=40))
@example(["damage", "lose", "damage", "deliver", "deliver", "deliver", "deliver", "deliver", "reply"] * 5)
def test_a_hand_over_over_a_bad_link_arrives_whole_or_is_corrupted(acts: list[str]) -> None:
    pair = Pair(SLOW)
    pair.grant()
    pair.deliver()  # Begin: messages are never lost while the link lives
    pair.finish()
    for act in acts:
        getattr(pair, act)()
    while pair.to_receiver or pair.to_sender:
        pair.deliver()
        pair.reply()
    assert pair.send_ended
    assert pair.receive_ended
    report = pair.send.report
    assert report is not None
    if report.error is None:
        assert pair.copied == WHOLE
    else:
        assert isinstance(pair.receive.error, Corrupted)


# ---- long tables of spans, which layers share ----

TABLES = tuple(
    Spans(Span(8 * page + start, end - start) for page, start, end in table)
    for table in (
        [(7, 0, 8)],
        [(5, 0, 8), (6, 0, 8)],
        [(6, 0, 4), (7, 4, 8)],
        [(6, 4, 8)],
        [(7, 0, 4), (2, 0, 8)],  # its second span is of a page that was not granted
    )
)


@given(
    st.lists(st.tuples(st.sampled_from(range(len(TABLES))), st.sampled_from([(0, 1), (1, 1), (0, 2)]), st.booleans()))
)
def test_what_is_remembered_of_a_table_changes_nothing(writes: list[tuple[int, tuple[int, int], bool]]) -> None:
    """Two sessions hear the same; to one of them no table is long enough to be remembered."""
    plain, remembering = receiving(), receiving()
    with pytest.MonkeyPatch.context() as patch:
        for number, (first, count), is_damaged in writes:
            layers, spans = range(first, first + count), TABLES[number]
            outcomes = []
            for session, long_table in ((plain, 1000), (remembering, 1)):
                patch.setattr(session_module, "_LONG_TABLE", long_table)
                try:
                    session.admit(layers, spans)
                    outcomes.append("admitted")
                except ProtocolViolation as error:
                    outcomes.append(str(error))
                    continue
                if is_damaged:
                    session.damaged(layers, spans)
                else:
                    session.landed()
            assert outcomes[0] == outcomes[1]
        assert plain.commit() == remembering.commit()
        assert plain.state is remembering.state


def test_only_so_much_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_LONG_TABLE", 1)
    monkeypatch.setattr(session_module, "_MAX_TAKEN", 2)
    session = receiving()
    for page in GRANT.pages:
        for layer in range(2):
            session.admit(only(layer), (Span(8 * page, 8),))
            session.landed()
    assert session.commit() == ()
