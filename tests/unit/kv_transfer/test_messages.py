from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import GrantRefused, PeerLost, ProtocolViolation, TransferAborted
from core.request import SessionId
from kv_transfer.messages import (
    MAX_PAYLOAD_BYTES,
    Abort,
    AbortAck,
    AbortCause,
    Begin,
    Commit,
    CommitAck,
    Message,
    decode,
    encode,
)

tokens = st.binary(min_size=16, max_size=16)
session_ids = st.text(max_size=40).map(SessionId)
messages = st.one_of(
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


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (TransferAborted("x"), TransferAborted),
        (GrantRefused("x"), GrantRefused),
        (ProtocolViolation("x"), ProtocolViolation),
        (PeerLost("x"), TransferAborted),
    ],
)
def test_the_other_end_sees_an_error_of_the_same_kind(error: TransferAborted, seen: type[Exception]) -> None:
    told = Abort.because_of(SessionId("s"), bytes(16), error).error
    assert type(told) is seen
    assert "x" in str(told)
