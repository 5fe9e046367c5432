"""Whole hand-overs, KvSender to KvReceiver, over every transport."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from core.errors import (
    GrantRefused,
    Incompatible,
    PeerLost,
    ProtocolViolation,
    TransferAborted,
)
from core.request import SessionId
from kv_transfer.messages import Begin, Commit, encode
from kv_transfer.transport import SendLink, Strip, Write

A, B = SessionId("a"), SessionId("b")
NUM_LAYERS = 3
SRC = (9, 3, 4, 5, 20, 11)
DST = (30, 31, 32, 8, 7, 2)


class Stranger:
    """Send events of a peer that does as it likes: it drives a link by hand."""

    def written(self, link: SendLink, write: Write) -> None:
        pass

    def drained(self, link: SendLink, session_id: SessionId) -> None:
        pass

    def notified(self, link: SendLink, message: bytes) -> None:
        pass

    def lost(self, link: SendLink, error: Exception) -> None:
        pass


def assert_pages_equal(prefill: Any, decode: Any, src: tuple[int, ...], dst: tuple[int, ...]) -> None:
    for layer in range(NUM_LAYERS):
        for src_page, dst_page in zip(src, dst, strict=True):
            assert decode.page(layer, dst_page) == prefill.page(layer, src_page)


def assert_untouched(decode: Any, pages: tuple[int, ...]) -> None:
    for layer in range(NUM_LAYERS):
        for page in pages:
            assert not any(decode.page(layer, page))


def test_every_page_of_every_layer_arrives_and_then_the_payload(prefill: Any, decode: Any) -> None:
    prefill.hand_over(A, SRC, decode.receiver.issue(A, 0, DST), b"first token")
    assert decode.outcomes.payload_of(A) == b"first token"
    assert_pages_equal(prefill, decode, SRC, DST)
    report = prefill.outcomes.close_of(A)
    assert report.error is None
    assert report.bytes_sent == prefill.sender.bytes_sent == decode.receiver.bytes_received == 6 * (512 + 512 + 2048)
    assert report.transfer_s >= report.exposed_s >= 0


def test_pages_that_the_decode_worker_caches_do_not_travel(prefill: Any, decode: Any) -> None:
    prefill.hand_over(A, SRC, decode.receiver.issue(A, 2, DST[2:]))
    decode.outcomes.payload_of(A)
    assert_pages_equal(prefill, decode, SRC[2:], DST[2:])
    assert_untouched(decode, DST[:2])


def test_nothing_to_send_is_a_commit_alone(prefill: Any, decode: Any) -> None:
    prefill.hand_over(A, SRC, decode.receiver.issue(A, len(SRC), ()), b"token")
    assert decode.outcomes.payload_of(A) == b"token"
    assert prefill.outcomes.close_of(A).bytes_sent == 0


@pytest.mark.parametrize("granted_after", [0, 4, 9, 10])
def test_chunks_arrive_whenever_the_grant_comes(prefill: Any, decode: Any, granted_after: int) -> None:
    grant = decode.receiver.issue(A, 1, DST[1:])

    def store(layer: int, first_page: int) -> Callable[[], None]:
        return lambda: prefill.sender.pages_stored(A, layer, first_page, SRC[first_page : first_page + 2])

    acts = [store(layer, first_page) for first_page in (0, 2, 4) for layer in range(NUM_LAYERS)]
    acts.append(lambda: prefill.sender.commit(A, b""))
    acts.insert(granted_after, lambda: prefill.sender.granted(A, grant))
    prefill.sender.open(A, len(SRC))
    for act in acts:
        act()
    decode.outcomes.payload_of(A)
    assert_pages_equal(prefill, decode, SRC[1:], DST[1:])


def test_a_commit_without_all_pages_fails_at_both_ends(prefill: Any, decode: Any) -> None:
    prefill.sender.open(A, len(SRC))
    prefill.sender.granted(A, decode.receiver.issue(A, 0, DST))
    prefill.store_all(A, SRC, num_layers=2)
    prefill.sender.commit(A, b"")
    assert isinstance(decode.outcomes.release_of(A), ProtocolViolation)
    assert isinstance(prefill.outcomes.close_of(A).error, ProtocolViolation)
    assert decode.outcomes.committed == {}


def test_a_page_that_is_sent_twice_fails_at_both_ends(prefill: Any, decode: Any) -> None:
    prefill.sender.open(A, len(SRC))
    prefill.sender.granted(A, decode.receiver.issue(A, 0, DST))
    prefill.store_all(A, SRC)
    prefill.store_all(A, SRC)
    assert isinstance(decode.outcomes.release_of(A), ProtocolViolation)
    assert isinstance(prefill.outcomes.close_of(A).error, ProtocolViolation)


def test_one_failed_session_leaves_the_others_on_its_link_alone(prefill: Any, decode: Any) -> None:
    prefill.sender.open(A, len(SRC))
    prefill.sender.granted(A, decode.receiver.issue(A, 0, DST))
    prefill.sender.commit(A, b"")
    prefill.hand_over(B, SRC, decode.receiver.issue(B, 0, [page + 10 for page in DST]))
    decode.outcomes.payload_of(B)
    assert isinstance(decode.outcomes.release_of(A), ProtocolViolation)
    assert prefill.outcomes.close_of(B).error is None


def test_the_sender_may_give_up_in_mid_transfer(prefill: Any, decode: Any) -> None:
    prefill.sender.open(A, len(SRC))
    prefill.sender.granted(A, decode.receiver.issue(A, 0, DST))
    prefill.store_all(A, SRC, num_layers=2)
    prefill.sender.abort(A, "the client went away")
    assert isinstance(prefill.outcomes.close_of(A).error, TransferAborted)
    assert "the client went away" in str(decode.outcomes.release_of(A))


def test_no_write_lands_after_the_receiver_gave_up_and_released(prefill: Any, decode: Any) -> None:
    grant = decode.receiver.issue(A, 0, DST)
    prefill.sender.open(A, len(SRC))
    prefill.sender.granted(A, grant)
    prefill.store_all(A, SRC, num_layers=1)
    decode.receiver.abort(A, "no room")
    prefill.sender.pages_stored(A, 1, 0, SRC)
    assert isinstance(decode.outcomes.release_of(A), TransferAborted | GrantRefused)
    for layer in decode.layers:
        layer[:] = bytes(len(layer))
    prefill.sender.pages_stored(A, 2, 0, SRC)
    prefill.sender.commit(A, b"")
    assert isinstance(prefill.outcomes.close_of(A).error, TransferAborted | GrantRefused)
    prefill.hand_over(B, (), decode.receiver.issue(B, 0, ()))
    decode.outcomes.payload_of(B)
    assert_untouched(decode, DST)


def test_a_grant_that_was_taken_back_before_anyone_began_is_refused(prefill: Any, decode: Any) -> None:
    grant = decode.receiver.issue(A, 0, DST)
    decode.receiver.abort(A, "too late")
    assert isinstance(decode.outcomes.release_of(A), TransferAborted)
    prefill.hand_over(A, SRC, grant)
    assert isinstance(prefill.outcomes.close_of(A).error, GrantRefused)
    assert_untouched(decode, DST)


def test_a_forged_token_reaches_nothing_and_the_owner_still_can(prefill: Any, decode: Any) -> None:
    grant = decode.receiver.issue(A, 0, DST)
    prefill.hand_over(A, SRC, replace(grant, token=bytes(16)))
    assert isinstance(prefill.outcomes.close_of(A).error, GrantRefused)
    assert_untouched(decode, DST)
    assert decode.receiver.num_sessions == 1
    prefill.outcomes.closed.clear()
    prefill.hand_over(A, SRC, grant)
    decode.outcomes.payload_of(A)


@pytest.mark.parametrize(
    ("layers", "strip"),
    [
        pytest.param(range(3, 4), Strip(0, DST[0] * 512, 512), id="wrong layer"),
        pytest.param(range(4), Strip(0, DST[0] * 512, 512), id="more layers than there are"),
        pytest.param(range(1), Strip(0, 50 * 512, 512), id="page outside the grant"),
        pytest.param(range(1), Strip(0, 63 * 512, 512), id="last page"),
        pytest.param(range(1), Strip(0, DST[0] * 512, 5 * 512), id="run beyond the grant"),
        pytest.param(range(1), Strip(0, DST[2] * 512 + 1, 512), id="a byte beyond the grant"),
        pytest.param(range(1), Strip(0, 2**40, 512), id="beyond the pool"),
        pytest.param(range(2, 3), Strip(0, DST[4] * 512, 512), id="the offset of another layer"),
    ],
)
def test_a_strangers_bad_write_lands_nowhere_and_fails_its_session(
    prefill: Any, decode: Any, layers: range, strip: Strip
) -> None:
    prefill.transport.region.geometry = replace(
        prefill.transport.region.geometry, layers=prefill.transport.region.geometry.layers * 2
    )
    prefill.transport.region._layers *= 2  # a pool with layers that the receiver does not have
    grant = decode.receiver.issue(A, 0, DST)
    link = prefill.transport.connect(grant.descriptor, Stranger())
    link.notify(A, encode(Begin(A, grant.token)))
    link.write(Write(A, grant.token, layers.start, len(layers), (strip,)))
    link.notify(B, encode(Begin(B, bytes(16))))
    decode.outcomes.until(lambda: decode.transport.counters.writes_refused == 1 or decode.outcomes.released)
    link.close(TransferAborted("done"))
    assert isinstance(decode.outcomes.release_of(A), ProtocolViolation)
    assert_untouched(decode, tuple(range(64)))


def test_a_stranger_cannot_use_another_links_session(prefill: Any, decode: Any) -> None:
    grant = decode.receiver.issue(A, 0, DST)
    prefill.sender.open(A, len(SRC))
    prefill.sender.granted(A, grant)
    prefill.store_all(A, SRC, num_layers=2)
    decode.outcomes.until(lambda: decode.receiver.bytes_received == 6 * 1024)
    link = prefill.transport.connect(grant.descriptor, Stranger())
    link.write(Write(A, grant.token, 2, 1, (Strip(0, DST[0] * 2048, 2048),)))
    link.notify(A, encode(Commit(A, grant.token, b"stolen")))
    link.close(TransferAborted("done"))
    prefill.sender.pages_stored(A, 2, 0, SRC)
    prefill.sender.commit(A, b"mine")
    assert decode.outcomes.payload_of(A) == b"mine"
    assert_pages_equal(prefill, decode, SRC, DST)


def test_a_message_that_makes_no_sense_ends_the_link_and_its_sessions(prefill: Any, decode: Any) -> None:
    grant = decode.receiver.issue(A, 0, DST)
    link = prefill.transport.connect(grant.descriptor, Stranger())
    link.notify(A, encode(Begin(A, grant.token)))
    link.notify(A, b"\xff\xff")
    assert isinstance(decode.outcomes.release_of(A), ProtocolViolation)


@pytest.mark.parametrize("when", ["granted", "writing", "committing"])
@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_a_lost_peer_ends_the_session_at_both_ends(prefill: Any, decode: Any, who: str, when: str) -> None:
    prefill.sender.open(A, len(SRC))
    prefill.sender.granted(A, decode.receiver.issue(A, 0, DST))
    if when != "granted":
        prefill.store_all(A, SRC, num_layers=2)
        decode.outcomes.until(lambda: decode.receiver.bytes_received > 0)
    if when == "committing":
        prefill.sender.commit(A, b"")  # of too few pages: it can never be acknowledged
    (prefill if who == "prefill" else decode).transport.close()
    assert prefill.outcomes.close_of(A).error is not None
    decode.receiver.abort(A, "for the case that it never began")
    decode.outcomes.release_of(A)
    assert decode.receiver.num_quarantined == 0


def test_a_restarted_decode_worker_is_reached_over_a_new_link(prefill: Any, decode: Any, make_worker: Any) -> None:
    prefill.hand_over(A, SRC, decode.receiver.issue(A, 0, DST))
    decode.outcomes.payload_of(A)
    old_grant = decode.receiver.issue(B, 0, DST)
    decode.close()
    prefill.hand_over(B, SRC, old_grant)
    assert isinstance(prefill.outcomes.close_of(B).error, PeerLost)
    restarted = make_worker()
    again = SessionId("b again")
    prefill.hand_over(again, SRC, restarted.receiver.issue(again, 0, DST))
    restarted.outcomes.payload_of(again)
    assert_pages_equal(prefill, restarted, SRC, DST)


def test_another_model_is_refused_by_name(prefill: Any, make_worker: Any) -> None:
    decode = make_worker(model="another")
    prefill.hand_over(A, SRC, decode.receiver.issue(A, 0, DST))
    error = prefill.outcomes.close_of(A).error
    assert isinstance(error, Incompatible)
    assert error.field == "model"
    assert_untouched(decode, DST)


def test_closing_the_sender_ends_every_session_at_both_ends(prefill: Any, decode: Any) -> None:
    prefill.sender.open(A, 1)
    prefill.sender.open(B, len(SRC))
    prefill.sender.granted(B, decode.receiver.issue(B, 0, DST))
    prefill.store_all(B, SRC)
    decode.outcomes.until(lambda: decode.receiver.bytes_received > 0)
    prefill.sender.close()
    assert set(prefill.outcomes.closed) == {A, B}
    decode.outcomes.release_of(B)


def test_closing_the_receiver_ends_every_session_at_both_ends(prefill: Any, decode: Any) -> None:
    decode.receiver.issue(A, 0, (1,))
    prefill.sender.open(B, len(SRC))
    prefill.sender.granted(B, decode.receiver.issue(B, 0, DST))
    prefill.store_all(B, SRC)
    decode.outcomes.until(lambda: decode.receiver.bytes_received > 0)
    decode.receiver.close()
    assert set(decode.outcomes.released) == {A, B}
    assert prefill.outcomes.close_of(B).error is not None


def test_random_hand_overs_with_random_cancels_leak_no_page_and_damage_no_byte(prefill: Any, decode: Any) -> None:
    """200 sessions, several at a time; a toy allocator gives a page out only after its session's last callback."""
    dice = random.Random(7)
    free = set(range(64))
    live: dict[SessionId, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    cancelled: set[SessionId] = set()
    whole: set[SessionId] = set()

    def settle() -> None:
        for session_id in list(live):
            outcomes = decode.outcomes
            ended = session_id in outcomes.committed or session_id in outcomes.released
            if ended and session_id in prefill.outcomes.closed:
                src, dst = live.pop(session_id)
                if session_id in outcomes.committed:
                    whole.add(session_id)
                    assert_pages_equal(prefill, decode, src, dst)
                free.update(dst)

    for i in range(200):
        session_id = SessionId(f"s{i}")
        count = dice.randint(1, 16)
        while len(free) < count:
            changed = decode.outcomes.changed
            with changed:
                changed.wait(0.002)
            settle()
        dst = tuple(dice.sample(sorted(free), count))
        free -= set(dst)
        src = tuple(dice.choices(range(64), k=count))
        live[session_id] = (src, dst)
        grant = decode.receiver.issue(session_id, 0, dst)
        acts = [lambda s=session_id, g=grant: prefill.sender.granted(s, g)]
        acts += [
            lambda s=session_id, layer=layer, p=src: prefill.sender.pages_stored(s, layer, 0, p) for layer in range(3)
        ]
        prefill.sender.open(session_id, count)
        dice.shuffle(acts)
        acts.append(lambda s=session_id: prefill.sender.commit(s, b"token"))
        fate = dice.random()
        if fate < 0.5:
            cancelled.add(session_id)
        if fate < 0.25:
            acts.insert(dice.randint(0, 5), lambda s=session_id: prefill.sender.abort(s, "cancelled"))
        elif fate < 0.5:
            acts.insert(dice.randint(0, 5), lambda s=session_id: decode.receiver.abort(s, "cancelled"))
        for act in acts:
            act()
        if fate < 0.25:
            # A sender that gave up before its grant has told nobody: its worker tells the other (here: abort).
            decode.receiver.abort(session_id, "cancelled")
        settle()
    while live:
        with decode.outcomes.changed:
            decode.outcomes.changed.wait(0.002)
        settle()
    assert free == set(range(64))
    # What was cancelled may have been whole already; whether it was depends on when threads run.
    everything = {SessionId(f"s{i}") for i in range(200)}
    assert everything - cancelled <= whole
    assert 60 < len(cancelled) < 140
    assert decode.receiver.num_sessions == prefill.sender.num_sessions == 0


@pytest.mark.parametrize("first_end", ["committed", "cancelled"])
def test_a_session_that_ended_may_come_again_under_its_name(prefill: Any, decode: Any, first_end: str) -> None:
    if first_end == "committed":
        prefill.hand_over(A, SRC, decode.receiver.issue(A, 0, DST), b"first")
        decode.outcomes.payload_of(A)
    else:
        prefill.sender.open(A, len(SRC))
        prefill.sender.granted(A, decode.receiver.issue(A, 0, DST))
        prefill.store_all(A, SRC)
        prefill.sender.abort(A, "tried again")
        decode.outcomes.release_of(A)
    prefill.outcomes.close_of(A)
    for outcomes in (prefill.outcomes, decode.outcomes):
        for told in (outcomes.closed, outcomes.committed, outcomes.released):
            told.clear()
    again = tuple(page + 10 for page in DST)
    prefill.hand_over(A, SRC[::-1], decode.receiver.issue(A, 0, again), b"second")
    assert decode.outcomes.payload_of(A) == b"second"
    assert_pages_equal(prefill, decode, SRC[::-1], again)
    assert prefill.outcomes.close_of(A).error is None
