from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import PeerLost, ProtocolViolation, TransferAborted, TransferError
from core.request import SessionId
from kv_transfer.messages import Begin, Commit
from kv_transfer.session import (
    RECEIVE_MOVES,
    SEND_MOVES,
    Grant,
    Outgoing,
    ReceiveSession,
    ReceiveState,
    SendReport,
    SendSession,
    SendState,
)
from kv_transfer.transport import LayerPages, PageGeometry, PageRun, PageSpan, Write

NAME = SessionId("s")
TOKEN = bytes(16)
NUM_PAGES = 4
GEOMETRY = PageGeometry((LayerPages(8), LayerPages(8)), num_pages=10)
GRANT = Grant(NAME, TOKEN, first_page=1, pages=(7, 5, 6), descriptor=b"", lease_s=30.0)
ABORTED = TransferAborted("enough")
GONE = PeerLost("gone")


def sending() -> SendSession:
    session = SendSession(NAME, NUM_PAGES, GEOMETRY)
    session.grant(GRANT, 0.0)
    return session


def receiving() -> ReceiveSession:
    session = ReceiveSession(NAME, TOKEN, GRANT.pages, GEOMETRY.num_layers, 0.0)
    session.begin()
    return session


def whole(session: ReceiveSession) -> ReceiveSession:
    for layer in range(GEOMETRY.num_layers):
        session.admit(layer, [PageSpan(5, 3)])
        session.landed()
    return session


# ---- sending ----


def test_what_was_stored_before_the_grant_is_sent_after_it_without_the_pages_cached_at_the_receiver() -> None:
    session = SendSession(NAME, NUM_PAGES, GEOMETRY)
    assert session.store(0, 0, [2, 3, 4, 5], 1.0) == []
    assert session.grant(GRANT, 2.0) == [
        Begin(NAME, TOKEN),
        Write(NAME, TOKEN, 0, (PageRun(3, 7, 1), PageRun(4, 5, 2))),
    ]


def test_what_is_stored_after_the_grant_is_sent_at_once() -> None:
    session = sending()
    assert session.store(1, 2, [8], 1.0) == [Write(NAME, TOKEN, 1, (PageRun(8, 5, 1),))]


def test_pages_that_the_receiver_caches_are_not_sent() -> None:
    assert sending().store(1, 0, [8], 1.0) == []


def test_a_commit_before_the_grant_follows_the_writes() -> None:
    session = SendSession(NAME, NUM_PAGES, GEOMETRY)
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
    assert session.report == SendReport(None, bytes_sent=8, num_writes=1, transfer_s=2.5, exposed_s=0.5)


def test_an_abort_before_the_grant_closes_at_once() -> None:
    session = SendSession(NAME, NUM_PAGES, GEOMETRY)
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
    session = SendSession(NAME, NUM_PAGES + 1, GEOMETRY)
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
        return SendSession(NAME, NUM_PAGES, GEOMETRY)
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
        assert session.state in SEND_MOVES[state]
        return
    with pytest.raises(ProtocolViolation):
        do(session)
    assert session.state is state
    assert session.report is report


# ---- receiving ----


def test_a_session_whose_every_page_landed_commits() -> None:
    session = whole(receiving())
    session.commit()
    assert session.state is ReceiveState.COMMITTED


def test_a_session_of_no_pages_commits_at_once() -> None:
    session = ReceiveSession(NAME, TOKEN, (), GEOMETRY.num_layers, 0.0)
    session.begin()
    session.commit()
    assert session.state is ReceiveState.COMMITTED


def test_a_commit_with_pages_missing_raises_and_changes_nothing() -> None:
    session = receiving()
    session.admit(0, [PageSpan(5, 3)])
    session.landed()
    with pytest.raises(ProtocolViolation, match="3 pages of 1 layers"):
        session.commit()
    assert session.state is ReceiveState.RECEIVING


def test_a_commit_with_a_page_under_way_raises() -> None:
    session = ReceiveSession(NAME, TOKEN, (5,), 1, 0.0)
    session.begin()
    session.admit(0, [PageSpan(5, 1)])
    with pytest.raises(ProtocolViolation):
        session.commit()


@pytest.mark.parametrize(
    ("layer", "spans", "fault"),
    [
        (2, [PageSpan(5, 1)], "layer 2"),
        (0, [PageSpan(4, 2)], "outside"),
        (0, [PageSpan(5, 4)], "outside"),
        (0, [PageSpan(5, 1), PageSpan(5, 1)], "twice"),
        (1, [PageSpan(6, 2)], "twice"),
    ],
)
def test_a_write_outside_the_grant_raises_and_changes_nothing(layer: int, spans: list[PageSpan], fault: str) -> None:
    session = receiving()
    session.admit(1, [PageSpan(7, 1)])
    session.landed()
    with pytest.raises(ProtocolViolation, match=fault):
        session.admit(layer, spans)
    session.admit(0, [PageSpan(5, 3)])
    session.landed()
    session.admit(1, [PageSpan(5, 2)])
    session.landed()
    session.commit()


def in_receive_state(state: ReceiveState) -> ReceiveSession:
    if state is ReceiveState.ISSUED:
        return ReceiveSession(NAME, TOKEN, GRANT.pages, GEOMETRY.num_layers, 0.0)
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
        in_receive_state(state).admit(0, [PageSpan(5, 1)])


def test_an_abort_before_anyone_began_releases_at_once_and_one_after_it_quarantines() -> None:
    issued, begun = in_receive_state(ReceiveState.ISSUED), receiving()
    issued.abort(ABORTED)
    begun.abort(ABORTED)
    assert (issued.state, begun.state) == (ReceiveState.RELEASED, ReceiveState.QUARANTINED)
    begun.stopped(GONE)
    assert begun.error is ABORTED


# ---- both, over a wire that is a queue ----


class Pair:
    """A sending and a receiving session, joined by a queue each way, as KvSender and KvReceiver join them."""

    def __init__(self) -> None:
        self.send = SendSession(NAME, NUM_PAGES, GEOMETRY)
        self.receive = ReceiveSession(NAME, TOKEN, GRANT.pages, GEOMETRY.num_layers, 0.0)
        self.to_receiver: deque[Outgoing | str] = deque()
        self.to_sender: deque[str] = deque()
        self.to_store = [(layer, page) for layer in range(GEOMETRY.num_layers) for page in range(NUM_PAGES)]
        self.committed = False
        self.broken = False

    @property
    def send_ended(self) -> bool:
        return self.send.state is SendState.CLOSED

    @property
    def receive_ended(self) -> bool:
        return self.receive.state in (ReceiveState.COMMITTED, ReceiveState.RELEASED)

    def grant(self) -> None:
        if self.send.state is SendState.OPEN and not self.broken:
            self.to_receiver += self.send.grant(GRANT, 0.0)

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

    def abort_there(self) -> None:
        if self.receive.state in (ReceiveState.ISSUED, ReceiveState.RECEIVING):
            begun = self.receive.state is ReceiveState.RECEIVING
            self.receive.abort(ABORTED)
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
        item = self.to_receiver.popleft()
        if isinstance(item, Begin):
            self._begin()
        elif self.receive_ended or self.receive.state is ReceiveState.ISSUED:
            return
        elif item == "abort":
            self.receive.stopped(ABORTED)
        elif self.receive.state is ReceiveState.RECEIVING:
            self._take(item)

    def reply(self) -> None:
        if not self.to_sender:
            return
        if self.to_sender.popleft() == "abort":
            if self.send_ended:
                self.to_receiver.append("abort")
            self.abort_here()
        elif self.send.state is SendState.COMMITTING:
            self.send.acknowledged(0.0)

    def _begin(self) -> None:
        if self.receive.state is ReceiveState.ISSUED:
            self.receive.begin()
        else:
            self.to_sender.append("abort")

    def _take(self, item: Outgoing | str) -> None:
        if isinstance(item, Write):
            self.receive.admit(item.layer, [PageSpan(run.dst_page, run.num_pages) for run in item.runs])
            self.receive.landed()
        elif isinstance(item, Commit):
            self._take_commit()

    def _take_commit(self) -> None:
        try:
            self.receive.commit()
        except ProtocolViolation:
            self.abort_there()
        else:
            self.to_sender.append("ack")


ENDS = ["commit", "abort_here", "abort_there", "break_link"]
STEPS = ["grant", "store", "store", "finish", "deliver", "deliver", "reply"]


@given(st.lists(st.sampled_from(ENDS + STEPS * 20), max_size=60))
@settings(max_examples=300)
def test_any_interleaving_ends_with_one_outcome_at_each_end(acts: list[str]) -> None:
    pair = Pair()
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
