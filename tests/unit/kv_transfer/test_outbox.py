from __future__ import annotations

from core.request import SessionId
from kv_transfer.outbox import Outbox
from kv_transfer.transport import PageRun, Write

A, B = SessionId("a"), SessionId("b")


def write(session_id: SessionId, layer: int) -> Write:
    return Write(session_id, b"", layer, (PageRun(0, 0, 1),))


def test_a_session_keeps_its_order_and_sessions_take_turns() -> None:
    outbox = Outbox()
    for layer in range(3):
        outbox.put(A, write(A, layer))
    outbox.put(A, b"commit a")
    outbox.put(B, write(B, 0))
    outbox.put(B, b"commit b")
    taken = [outbox.take(0) for _ in range(6)]
    assert taken == [write(A, 0), write(B, 0), write(A, 1), b"commit b", write(A, 2), b"commit a"]


def test_an_empty_outbox_gives_nothing() -> None:
    assert Outbox().take(0) is None


def test_cancel_forgets_what_is_queued_for_that_session_only() -> None:
    outbox = Outbox()
    outbox.put(A, write(A, 0))
    outbox.put(B, write(B, 0))
    assert outbox.cancel(A) is True
    assert outbox.take(0) == write(B, 0)
    assert outbox.take(0) is None


def test_cancel_tells_of_a_write_under_way_until_it_is_done() -> None:
    outbox = Outbox()
    outbox.put(A, write(A, 0))
    outbox.take(0)
    assert outbox.cancel(A) is False
    assert outbox.cancel(B) is True
    outbox.done()
    assert outbox.cancel(A) is True


def test_a_message_under_way_reads_no_pages() -> None:
    outbox = Outbox()
    outbox.put(A, b"commit")
    outbox.take(0)
    assert outbox.cancel(A) is True


def test_what_is_put_after_a_cancel_is_taken() -> None:
    outbox = Outbox()
    outbox.put(A, write(A, 0))
    outbox.cancel(A)
    outbox.put(A, b"abort")
    assert outbox.take(0) == b"abort"


def test_a_closed_outbox_drops_everything() -> None:
    outbox = Outbox()
    outbox.put(A, b"before")
    outbox.close()
    outbox.put(A, b"after")
    assert outbox.closed
    assert outbox.take(0) is None
