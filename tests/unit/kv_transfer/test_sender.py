from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from core.clock import VirtualClock
from core.errors import GrantRefused, PeerLost, ProtocolViolation, TransferAborted
from core.request import ClusterId, SessionId, WorkerId
from kv_transfer.messages import Abort, AbortAck, AbortCause, Begin, Commit, CommitAck, Missing, Renew, Resend, encode
from kv_transfer.sender import KvSender
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import PeerIdentity, SendOrder, Span, Strip, Write

A, B = SessionId("a"), SessionId("b")
TOKEN = bytes(range(16))
LEASE_S = 30.0
WRITE = Write(A, TOKEN, 0, 1, (Strip(8, 40, 16),))


def grant(session_id: SessionId, descriptor: bytes = b"there") -> Grant:
    return Grant(session_id, TOKEN, first_page=0, pages=(5, 6), descriptor=descriptor, lease_s=LEASE_S)


@dataclass
class Rig:
    sender: KvSender
    transport: Any
    closed: list[tuple[SessionId, SendReport]]

    def start(self, session_id: SessionId) -> Any:
        """A granted session; returns the link that it is on."""
        self.sender.open(session_id, 2)
        self.sender.granted(session_id, grant(session_id))
        return self.transport.links[-1]

    @property
    def errors(self) -> dict[SessionId, type[BaseException]]:
        return {session_id: type(report.error) for session_id, report in self.closed}


@pytest.fixture
def rig(transport: Any, clock: VirtualClock) -> Rig:
    closed: list[tuple[SessionId, SendReport]] = []
    sender = KvSender(transport, clock, lambda session_id, report: closed.append((session_id, report)))
    return Rig(sender, transport, closed)


def test_a_session_begins_writes_commits_and_is_acknowledged(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.pages_stored(A, 0, 0, [1, 2])
    rig.sender.commit(A, b"token")
    write = Write(A, TOKEN, 0, 1, (Strip(8, 40, 16),))
    assert link.sent == [Begin(A, TOKEN), write, Commit(A, TOKEN, b"token")]
    rig.sender.written(link, write)
    rig.sender.notified(link, encode(CommitAck(A, TOKEN)))
    assert [(session_id, report.error, report.bytes_sent) for session_id, report in rig.closed] == [(A, None, 16)]
    assert (rig.sender.num_sessions, rig.sender.bytes_sent) == (0, 16)


def test_sessions_to_one_peer_share_a_link(rig: Rig) -> None:
    assert rig.start(A) is rig.start(B)
    assert len(rig.transport.links) == 1


def test_opening_twice_raises_and_keeps_the_first(rig: Rig) -> None:
    rig.sender.open(A, 2)
    with pytest.raises(ProtocolViolation):
        rig.sender.open(A, 2)
    assert rig.sender.num_sessions == 1


def test_a_second_grant_raises_and_changes_nothing(rig: Rig) -> None:
    link = rig.start(A)
    with pytest.raises(ProtocolViolation):
        rig.sender.granted(A, grant(A))
    assert link.sent == [Begin(A, TOKEN)]


def test_a_malformed_descriptor_closes_the_session(rig: Rig) -> None:
    rig.sender.open(A, 2)
    rig.sender.granted(A, grant(A, b"nonsense"))
    assert rig.errors == {A: ProtocolViolation}


def test_calls_for_a_closed_session_are_ignored(rig: Rig) -> None:
    rig.sender.open(A, 2)
    rig.sender.abort(A, "enough")
    rig.sender.pages_stored(A, 0, 0, [1, 2])
    rig.sender.granted(A, grant(A))
    rig.sender.commit(A, b"")
    rig.sender.abort(A, "again")
    assert rig.errors == {A: TransferAborted}
    assert len(rig.closed) == 1
    assert rig.transport.links == []


def test_an_abort_while_nothing_is_read_closes_at_once_and_tells_the_peer(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.abort(A, "enough")
    assert rig.errors == {A: TransferAborted}
    (farewell,) = link.sent[1:]
    assert isinstance(farewell, Abort)
    assert farewell.token == TOKEN


def test_an_abort_while_pages_are_read_closes_when_they_were_read(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.pages_stored(A, 0, 0, [1, 2])
    link.idle = False
    rig.sender.abort(A, "enough")
    assert rig.closed == []
    rig.sender.written(link, WRITE)
    assert rig.closed == []
    rig.sender.drained(link, A)
    assert rig.errors == {A: TransferAborted}


def test_an_acknowledgement_that_crosses_an_abort_is_ignored(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.pages_stored(A, 0, 0, [1, 2])
    rig.sender.commit(A, b"")
    link.idle = False
    rig.sender.abort(A, "enough")
    rig.sender.notified(link, encode(CommitAck(A, TOKEN)))
    assert rig.closed == []
    rig.sender.written(link, WRITE)
    assert rig.closed == []
    rig.sender.drained(link, A)
    assert rig.errors == {A: TransferAborted}


def test_the_peers_abort_is_acknowledged_and_gives_its_reason(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.notified(link, encode(Abort(A, TOKEN, AbortCause.UNKNOWN_GRANT, "who are you")))
    assert link.sent[-1] == AbortAck(A, TOKEN)
    assert rig.errors == {A: GrantRefused}


def test_the_peers_abort_of_a_session_that_ended_is_acknowledged(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.abort(A, "enough")
    rig.sender.notified(link, encode(Abort(A, TOKEN, AbortCause.ABORTED, "")))
    assert link.sent[-1] == AbortAck(A, TOKEN)
    assert len(rig.closed) == 1


def test_what_the_peer_says_of_another_grant_of_the_same_name_is_not_for_this_session(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.commit(A, b"")
    rig.sender.notified(link, encode(CommitAck(A, bytes(16))))
    rig.sender.notified(link, encode(Abort(A, bytes(16), AbortCause.ABORTED, "")))
    assert rig.closed == []
    assert link.sent[-1] == AbortAck(A, bytes(16))


def test_an_acknowledgement_without_a_commit_is_a_violation(rig: Rig) -> None:
    link = rig.start(A)
    with pytest.raises(ProtocolViolation):
        rig.sender.notified(link, encode(CommitAck(A, TOKEN)))


@pytest.mark.parametrize("message", [Begin(A, TOKEN), Commit(A, TOKEN, b""), AbortAck(A, TOKEN)])
def test_a_message_that_only_senders_send_is_a_violation(rig: Rig, message: Begin | Commit | AbortAck) -> None:
    link = rig.start(A)
    with pytest.raises(ProtocolViolation):
        rig.sender.notified(link, encode(message))


def test_a_lost_link_fails_all_its_sessions_and_the_next_grant_makes_a_new_one(rig: Rig) -> None:
    link = rig.start(A)
    rig.start(B)
    rig.sender.lost(link, PeerLost("gone"))
    assert rig.errors == {A: PeerLost, B: PeerLost}
    assert rig.start(SessionId("c")) is not link


def test_a_lost_link_leaves_other_peers_sessions_alone(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.open(B, 2)
    rig.sender.granted(B, replace(grant(B), descriptor=b"elsewhere"))
    rig.sender.lost(link, PeerLost("gone"))
    assert rig.errors == {A: PeerLost}


def test_only_a_link_that_was_silent_for_the_lease_is_closed(rig: Rig, clock: VirtualClock) -> None:
    link = rig.start(A)
    clock.advance(LEASE_S)
    rig.sender.expire(clock.now())
    assert link.closed is None
    clock.advance(0.1)
    rig.sender.expire(clock.now())
    assert isinstance(link.closed, PeerLost)
    assert rig.closed == []  # comes with ``lost``, when nothing is read any more


def missing(offset: int = 40) -> Missing:
    return Missing(range(1), (Span(offset, 16),))


def test_what_the_receiver_misses_is_sent_again_with_the_commit_and_counted(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.pages_stored(A, 0, 0, [1, 2])
    rig.sender.commit(A, b"token")
    rig.sender.notified(link, encode(Resend(A, TOKEN, (missing(),))))
    assert link.sent[1:] == [WRITE, Commit(A, TOKEN, b"token")] * 2
    assert rig.sender.writes_resent == 1
    rig.sender.notified(link, encode(CommitAck(A, TOKEN)))
    assert [report.writes_resent for _, report in rig.closed] == [1]


def test_a_request_for_what_was_never_sent_ends_the_session_at_both_ends(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.commit(A, b"")
    rig.sender.notified(link, encode(Resend(A, TOKEN, (missing(),))))
    assert rig.errors == {A: ProtocolViolation}
    assert isinstance(link.sent[-1], Abort)
    assert link.sent[-1].cause is AbortCause.VIOLATION


def test_a_request_that_crosses_an_abort_or_names_another_grant_is_ignored(rig: Rig) -> None:
    link = rig.start(A)
    rig.sender.pages_stored(A, 0, 0, [1, 2])
    rig.sender.commit(A, b"")
    rig.sender.notified(link, encode(Resend(A, bytes(16), (missing(),))))
    link.idle = False
    rig.sender.abort(A, "enough")
    rig.sender.notified(link, encode(Resend(A, TOKEN, (missing(),))))
    assert rig.sender.writes_resent == 0
    assert [type(item) for item in link.sent] == [Begin, Write, Commit, Abort]


def test_a_session_with_nothing_to_send_renews_its_grant(rig: Rig, clock: VirtualClock) -> None:
    link = rig.start(A)
    rig.sender.open(B, 2)  # has none yet
    for _ in range(2):
        link.heard_at = clock.now()
        clock.advance(LEASE_S / 3)
        rig.sender.expire(clock.now())
        clock.advance(0.1)
        rig.sender.expire(clock.now())
        rig.sender.expire(clock.now())
    assert link.sent == [Begin(A, TOKEN), Renew(A, TOKEN), Renew(A, TOKEN)]
    rig.sender.pages_stored(A, 0, 0, [1, 2])
    rig.sender.pages_stored(A, 1, 0, [1, 2])
    clock.advance(LEASE_S / 3)
    rig.sender.expire(clock.now())
    assert not isinstance(link.sent[-1], Renew)


def test_every_write_of_a_session_carries_its_order(rig: Rig) -> None:
    order = SendOrder(tenant="acme", deadline_at=3.0)
    rig.sender.open(A, 2, order)
    rig.sender.granted(A, grant(A))
    for layer in range(2):
        rig.sender.pages_stored(A, layer, 0, [1, 2])
    rig.sender.commit(A, b"")
    writes = [item for item in rig.transport.links[0].sent if isinstance(item, Write)]
    assert [write.order for write in writes] == [order]


def test_a_known_slow_link_gets_each_layer_at_once(transport: Any, clock: VirtualClock) -> None:
    asked: list[PeerIdentity] = []

    def link_speed(peer: PeerIdentity) -> float:
        asked.append(peer)
        return 1.0

    sender = KvSender(transport, clock, lambda session_id, report: None, link_speed=link_speed)
    receiver = PeerIdentity(WorkerId("decode-0"), ClusterId("east"))
    sender.open(A, 2)
    sender.granted(A, replace(grant(A), receiver=receiver))
    sender.pages_stored(A, 0, 0, [1, 2])
    assert transport.links[0].sent == [Begin(A, TOKEN), WRITE]
    assert asked == [receiver]


def test_a_raising_store_queues_nothing(rig: Rig) -> None:
    link = rig.start(A)
    with pytest.raises(ProtocolViolation):
        rig.sender.pages_stored(A, 0, 1, [1, 2])
    assert link.sent == [Begin(A, TOKEN)]


def test_after_close_nothing_can_be_opened(rig: Rig) -> None:
    rig.sender.open(A, 2)
    rig.sender.close()
    assert rig.errors == {A: TransferAborted}
    with pytest.raises(ProtocolViolation):
        rig.sender.open(B, 2)
