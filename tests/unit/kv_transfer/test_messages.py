from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Corrupted, GrantRefused, PeerLost, ProtocolViolation, TransferAborted
from core.request import SessionId
from kv_transfer.messages import (
    MAX_PAYLOAD_BYTES,
    MAX_RESEND_SPANS,
    Abort,
    AbortAck,
    AbortCause,
    Begin,
    Commit,
    CommitAck,
    Message,
    Missing,
    Renew,
    Resend,
    decode,
    encode,
)
from kv_transfer.transport import Span

tokens = st.binary(min_size=16, max_size=16)
session_ids = st.text(max_size=40).map(SessionId)
spans = st.lists(st.builds(Span, st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1)), min_size=1, max_size=5)
missing = st.builds(
    Missing,
    st.builds(lambda first, count: range(first, first + count), st.integers(0, 2**15), st.integers(1, 2**15)),
    spans.map(tuple),
)
messages = st.one_of(
    st.builds(Renew, session_ids, tokens),
    st.builds(Resend, session_ids, tokens, st.lists(missing, min_size=1, max_size=5).map(tuple)),
    st.builds(Begin, session_ids, tokens),
    st.builds(Commit, session_ids, tokens, st.binary(max_size=200)),
    st.builds(CommitAck, session_ids, tokens),
    st.builds(Abort, session_ids, tokens, st.sampled_from(AbortCause), st.text(max_size=100)),
    st.builds(AbortAck, session_ids, tokens),
)


@given(messages)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=64))
def test_nonsense_is_a_violation_or_a_message_that_encodes_to_something_decodable(data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolViolation:
        return
    assert decode(encode(message)) == message


@given(messages, st.data())
def test_a_message_cut_within_its_session_id_is_a_violation(message: Message, data: st.DataObject) -> None:
    encoded = encode(message)
    end = 19 + len(message.session_id.encode())
    with pytest.raises(ProtocolViolation):
        decode(encoded[: data.draw(st.integers(0, end - 1))])


def test_an_oversized_commit_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation):
        decode(encode(Commit(SessionId("s"), bytes(16), bytes(MAX_PAYLOAD_BYTES + 1))))


def resend(*missing: Missing) -> bytes:
    return encode(Resend(SessionId("s"), bytes(16), missing))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(resend(Missing(range(0), (Span(0, 1),))), id="no layer"),
        pytest.param(resend(Missing(range(1), ())), id="no span"),
        pytest.param(resend(Missing(range(1), (Span(0, 0),))), id="an empty span"),
        pytest.param(resend(Missing(range(1), (Span(0, 1),)))[:-1], id="cut short in a span"),
        pytest.param(resend(Missing(range(1), (Span(0, 1),))) + b"x", id="cut short in an entry"),
        pytest.param(resend(), id="nothing"),
        pytest.param(resend(*[Missing(range(1), (Span(0, 1),))] * (MAX_RESEND_SPANS + 1)), id="too much"),
    ],
)
def test_a_resend_that_asks_for_nothing_sensible_is_a_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode(data)


def test_the_largest_resend_is_smaller_than_the_largest_commit() -> None:
    largest = resend(*[Missing(range(i, i + 1), (Span(0, 1),)) for i in range(MAX_RESEND_SPANS)])
    assert len(largest) < len(encode(Commit(SessionId("s"), bytes(16), bytes(MAX_PAYLOAD_BYTES))))
    assert isinstance(decode(largest), Resend)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (TransferAborted("x"), TransferAborted),
        (GrantRefused("x"), GrantRefused),
        (ProtocolViolation("x"), ProtocolViolation),
        (Corrupted("x"), Corrupted),
        (PeerLost("x"), TransferAborted),
    ],
)
def test_the_other_end_sees_an_error_of_the_same_kind(error: TransferAborted, seen: type[Exception]) -> None:
    told = Abort.because_of(SessionId("s"), bytes(16), error).error
    assert type(told) is seen
    assert "x" in str(told)
