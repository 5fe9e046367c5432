from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from core.clock import VirtualClock
from core.errors import Corrupted, PeerLost, ProtocolViolation, TransferAborted, TransferError
from core.request import SessionId
from kv_transfer.messages import Abort, AbortAck, AbortCause, Begin, Commit, CommitAck, Missing, Renew, Resend, encode
from kv_transfer.receiver import KvReceiver
from kv_transfer.session import MAX_RESENDS, Grant
from kv_transfer.transport import Span

A = SessionId("a")
LEASE_S = 30.0
NUM_LAYERS = 2


@dataclass
class Rig:
    receiver: KvReceiver
    link: Any
    other: Any
    committed: list[tuple[SessionId, bytes]]
    released: list[tuple[SessionId, TransferError]]

    def begin(self) -> Grant:
        grant = self.receiver.issue(A, 0, [4, 5])
        self.receiver.notified(self.link, encode(Begin(A, grant.token)))
        return grant

    def write(self, grant: Grant, layer: int, first_page: int = 4, num_pages: int = 2) -> bool:
        layers, spans = range(layer, layer + 1), (Span(8 * first_page, 8 * num_pages),)
        session_id = self.receiver.admit(self.link, grant.token, layers, spans)
        if session_id is not None:
            self.receiver.landed(self.link, session_id, layers, spans)
        return session_id is not None

    def write_all(self, grant: Grant) -> None:
        assert all(self.write(grant, layer) for layer in range(NUM_LAYERS))

    @property
    def errors(self) -> list[type[TransferError]]:
        return [type(error) for _, error in self.released]


@pytest.fixture
def rig(transport: Any, clock: VirtualClock) -> Rig:
    committed: list[tuple[SessionId, bytes]] = []
    released: list[tuple[SessionId, TransferError]] = []
    receiver = KvReceiver(
        transport, clock, lambda s, p: committed.append((s, p)), lambda s, e: released.append((s, e)), LEASE_S
    )
    link, other = transport.connect(b"there", receiver), transport.connect(b"there", receiver)
    return Rig(receiver, link, other, committed, released)


def test_a_session_that_arrived_whole_is_committed_and_acknowledged(rig: Rig) -> None:
    grant = rig.begin()
    rig.write_all(grant)
    rig.receiver.notified(rig.link, encode(Commit(A, grant.token, b"token")))
    assert rig.committed == [(A, b"token")]
    assert rig.link.sent == [CommitAck(A, grant.token)]
    assert (rig.receiver.num_sessions, rig.receiver.bytes_received) == (0, 32)


def test_the_acknowledgement_waits_for_on_committed(transport: Any, clock: VirtualClock) -> None:
    sent_by_then: list[int] = []
    link = transport.connect(b"there", None)
    receiver = KvReceiver(
        transport, clock, lambda s, p: sent_by_then.append(len(link.sent)), lambda s, e: None, LEASE_S
    )
    grant = receiver.issue(A, 0, [])
    receiver.notified(link, encode(Begin(A, grant.token)))
    receiver.notified(link, encode(Commit(A, grant.token, b"")))
    assert sent_by_then == [0]
    assert link.sent == [CommitAck(A, grant.token)]


def test_tokens_are_secrets_of_their_own(rig: Rig) -> None:
    grants = [rig.receiver.issue(SessionId(str(i)), 0, [i]) for i in range(3)]
    assert len({grant.token for grant in grants}) == 3


def test_issuing_twice_raises_and_keeps_the_first(rig: Rig) -> None:
    grant = rig.begin()
    with pytest.raises(ProtocolViolation):
        rig.receiver.issue(A, 0, [6])
    rig.write_all(grant)


def test_a_write_may_overtake_its_begin_and_binds_the_session_to_its_link(rig: Rig) -> None:
    grant = rig.receiver.issue(A, 0, [4, 5])
    assert rig.write(grant, 0)
    rig.receiver.notified(rig.link, encode(Begin(A, grant.token)))
    rig.receiver.notified(rig.other, encode(Begin(A, grant.token)))
    assert [type(message) for message in rig.other.sent] == [Abort]
    assert rig.link.sent == []
    assert rig.write(grant, 1)


def test_a_begin_with_a_wrong_token_is_refused_and_leaves_the_session_to_its_owner(rig: Rig) -> None:
    grant = rig.receiver.issue(A, 0, [4, 5])
    rig.receiver.notified(rig.other, encode(Begin(A, bytes(16))))
    (refusal,) = rig.other.sent
    assert isinstance(refusal, Abort)
    assert refusal.cause is AbortCause.UNKNOWN_GRANT
    rig.receiver.notified(rig.link, encode(Begin(A, grant.token)))
    rig.write_all(grant)


def test_another_link_can_neither_write_nor_commit_nor_end_a_session(rig: Rig) -> None:
    grant = rig.begin()
    assert rig.receiver.admit(rig.other, grant.token, range(1), (Span(32, 8),)) is None
    rig.receiver.notified(rig.other, encode(Begin(A, grant.token)))
    rig.receiver.notified(rig.other, encode(Commit(A, grant.token, b"")))
    rig.receiver.notified(rig.other, encode(Abort(A, grant.token, AbortCause.ABORTED, "")))
    rig.receiver.lost(rig.other, PeerLost("gone"))
    assert (rig.committed, rig.released) == ([], [])
    rig.write_all(grant)


def test_a_second_commit_is_refused_and_commits_nothing(rig: Rig) -> None:
    grant = rig.begin()
    rig.write_all(grant)
    rig.receiver.notified(rig.link, encode(Commit(A, grant.token, b"")))
    rig.receiver.notified(rig.link, encode(Commit(A, grant.token, b"")))
    assert len(rig.committed) == 1
    assert isinstance(rig.link.sent[-1], Abort)


@pytest.mark.parametrize(("layer", "page"), [(2, 4), (0, 3), (0, 6)])
def test_a_write_outside_the_grant_quarantines_the_session(rig: Rig, layer: int, page: int) -> None:
    grant = rig.begin()
    assert not rig.write(grant, layer, page, 1)
    assert rig.receiver.num_quarantined == 2
    assert not rig.write(grant, 0)
    rig.receiver.notified(rig.link, encode(AbortAck(A, grant.token)))
    assert rig.errors == [ProtocolViolation]
    assert rig.receiver.num_quarantined == 0


ALL = Span(32, 16)  # pages 4 and 5


def test_a_commit_with_bytes_missing_asks_for_them_and_waits_for_the_next(rig: Rig) -> None:
    grant = rig.begin()
    rig.write(grant, 0)
    rig.receiver.notified(rig.link, encode(Commit(A, grant.token, b"token")))
    assert rig.link.sent == [Resend(A, grant.token, (Missing(range(1, 2), (ALL,)),))]
    assert (rig.committed, rig.released, rig.receiver.num_resends) == ([], [], 1)
    rig.write(grant, 1)
    rig.receiver.notified(rig.link, encode(Commit(A, grant.token, b"token")))
    assert rig.committed == [(A, b"token")]
    assert isinstance(rig.link.sent[-1], CommitAck)


def test_a_damaged_write_is_asked_for_again_and_not_counted_as_received(rig: Rig) -> None:
    grant = rig.begin()
    rig.receiver.admit(rig.link, grant.token, range(2), (ALL,))
    rig.receiver.damaged(rig.link, A, range(2), (ALL,))
    rig.receiver.notified(rig.link, encode(Commit(A, grant.token, b"")))
    assert rig.link.sent == [Resend(A, grant.token, (Missing(range(2), (ALL,)),))]
    assert rig.receiver.bytes_received == 0


def test_damage_after_an_abort_leaves_the_quarantine_to_the_sender(rig: Rig) -> None:
    grant = rig.begin()
    rig.receiver.admit(rig.link, grant.token, range(2), (ALL,))
    rig.receiver.abort(A, "enough")
    rig.receiver.damaged(rig.link, A, range(2), (ALL,))
    assert (rig.released, rig.receiver.num_quarantined) == ([], 2)
    rig.receiver.notified(rig.link, encode(AbortAck(A, grant.token)))
    assert rig.errors == [TransferAborted]


def test_what_never_arrives_whole_is_given_up_as_corrupted(rig: Rig) -> None:
    grant = rig.begin()
    for _ in range(MAX_RESENDS + 1):
        rig.receiver.notified(rig.link, encode(Commit(A, grant.token, b"")))
    assert [type(message) for message in rig.link.sent] == [Resend] * MAX_RESENDS + [Abort]
    assert rig.link.sent[-1].cause is AbortCause.CORRUPTED
    assert rig.receiver.num_quarantined == 2
    rig.receiver.notified(rig.link, encode(AbortAck(A, grant.token)))
    assert rig.errors == [Corrupted]


def test_an_abort_before_anyone_began_releases_at_once(rig: Rig) -> None:
    rig.receiver.issue(A, 0, [4, 5])
    rig.receiver.abort(A, "enough")
    assert rig.errors == [TransferAborted]
    assert (rig.link.sent, rig.other.sent) == ([], [])


@pytest.mark.parametrize("stop", ["ack", "abort", "lost"])
def test_an_abort_under_way_releases_when_the_sender_stopped(rig: Rig, stop: str) -> None:
    grant = rig.begin()
    rig.receiver.abort(A, "enough")
    rig.receiver.abort(A, "again")
    assert (rig.released, rig.receiver.num_quarantined) == ([], 2)
    if stop == "lost":
        rig.receiver.lost(rig.link, PeerLost("gone"))
    else:
        rig.receiver.notified(
            rig.link,
            encode(AbortAck(A, grant.token) if stop == "ack" else Abort(A, grant.token, AbortCause.ABORTED, "")),
        )
    assert rig.errors == [TransferAborted]
    assert [type(message) for message in rig.link.sent] == [Abort]


def test_the_senders_abort_releases(rig: Rig) -> None:
    grant = rig.begin()
    rig.receiver.notified(rig.link, encode(Abort(A, grant.token, AbortCause.ABORTED, "enough")))
    assert rig.errors == [TransferAborted]


def test_the_senders_abort_releases_also_when_its_begin_never_came(rig: Rig) -> None:
    grant = rig.receiver.issue(A, 0, [4, 5])
    rig.receiver.notified(rig.link, encode(Abort(A, bytes(16), AbortCause.ABORTED, "a stranger")))
    assert rig.errors == []
    rig.receiver.notified(rig.link, encode(Abort(A, grant.token, AbortCause.ABORTED, "enough")))
    assert rig.errors == [TransferAborted]


def test_a_lost_link_releases_its_sessions(rig: Rig) -> None:
    rig.begin()
    rig.receiver.lost(rig.link, PeerLost("gone"))
    assert rig.errors == [PeerLost]


def test_a_grant_that_nobody_began_is_released_after_the_lease(rig: Rig, clock: VirtualClock) -> None:
    rig.receiver.issue(A, 0, [4, 5])
    clock.advance(LEASE_S)
    rig.receiver.expire(clock.now())
    assert rig.released == []
    clock.advance(0.1)
    rig.receiver.expire(clock.now())
    assert rig.errors == [PeerLost]


def test_a_silent_peers_link_is_closed_after_the_lease_and_its_pages_wait_for_that(
    rig: Rig, clock: VirtualClock
) -> None:
    rig.begin()
    clock.advance(LEASE_S + 0.1)
    rig.receiver.expire(clock.now())
    assert isinstance(rig.link.closed, PeerLost)
    assert rig.released == []
    rig.receiver.lost(rig.link, rig.link.closed)
    assert rig.errors == [PeerLost]


def test_a_peer_that_is_heard_keeps_its_session(rig: Rig, clock: VirtualClock) -> None:
    rig.begin()
    clock.advance(LEASE_S + 0.1)
    rig.link.heard_at = clock.now()
    rig.receiver.expire(clock.now())
    assert rig.link.closed is None


def test_a_session_that_a_living_peer_forgot_is_given_up_after_the_lease(rig: Rig, clock: VirtualClock) -> None:
    grant = rig.begin()
    clock.advance(LEASE_S)
    rig.receiver.notified(rig.link, encode(Renew(A, grant.token)))
    clock.advance(LEASE_S)
    rig.write(grant, 0)
    clock.advance(LEASE_S)
    rig.link.heard_at = clock.now()
    rig.receiver.expire(clock.now())
    assert rig.link.sent == []
    clock.advance(0.1)
    rig.receiver.expire(clock.now())
    assert [type(message) for message in rig.link.sent] == [Abort]
    assert (rig.released, rig.link.closed) == ([], None)
    rig.receiver.notified(rig.link, encode(AbortAck(A, grant.token)))
    assert rig.errors == [PeerLost]


def test_a_peer_that_does_not_acknowledge_an_abort_loses_its_link(rig: Rig, clock: VirtualClock) -> None:
    rig.begin()
    rig.receiver.abort(A, "enough")
    clock.advance(LEASE_S + 0.1)
    rig.link.heard_at = clock.now()
    rig.receiver.expire(clock.now())
    assert isinstance(rig.link.closed, PeerLost)
    rig.receiver.lost(rig.link, rig.link.closed)
    assert rig.errors == [TransferAborted]


def test_a_renewal_may_overtake_its_begin_and_an_unknown_one_is_refused(rig: Rig) -> None:
    grant = rig.receiver.issue(A, 0, [4, 5])
    rig.receiver.notified(rig.link, encode(Renew(A, grant.token)))
    assert rig.link.sent == []
    rig.receiver.notified(rig.link, encode(Renew(A, bytes(16))))
    assert [message.cause for message in rig.link.sent] == [AbortCause.UNKNOWN_GRANT]
    rig.receiver.notified(rig.link, encode(Begin(A, grant.token)))
    rig.write_all(grant)


def test_a_grant_invites_the_sender_whose_descriptor_is_known(rig: Rig, transport: Any) -> None:
    rig.receiver.issue(A, 0, [4])
    assert transport.invited == []
    rig.receiver.issue(SessionId("b"), 0, [5], sender_descriptor=b"sender")
    assert transport.invited == [b"sender"]


def test_a_message_that_only_receivers_send_is_a_violation(rig: Rig) -> None:
    with pytest.raises(ProtocolViolation):
        rig.receiver.notified(rig.link, encode(CommitAck(A, bytes(16))))


def test_after_close_nothing_can_be_issued(rig: Rig) -> None:
    rig.receiver.issue(A, 0, [4])
    rig.receiver.close()
    assert rig.errors == [TransferAborted]
    with pytest.raises(ProtocolViolation):
        rig.receiver.issue(SessionId("b"), 0, [5])
