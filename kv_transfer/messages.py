"""What do the two ends of a session tell each other, beside the pages? Small messages, the same on every transport.

    sending end                               receiving end
    Begin                  ->                 binds the session to this link; writes are admitted from now on
    (writes)               ->
    Commit(payload)        ->                 every page arrived: on_committed, then
                           <-                 CommitAck: the source pages may be reused
    Abort(reason)          ->                 no write follows it: the pages are released
                           <-                 Abort(reason): stop writing
    AbortAck               ->                 no write follows it: the pages are released

An Abort of the sending end needs no answer: by the link's order it is the last thing of its session.
Every message names the grant's token beside the session: from the sending end it is the proof, and in both directions
it keeps what was said of an earlier grant from touching a later one of the same name.

Bytes, little endian: kind u8 | length of session id u16 | token [16] | session id, UTF-8 | body.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from core.errors import GrantRefused, ProtocolViolation, TransferAborted, TransferError
from core.request import SessionId

MAX_PAYLOAD_BYTES = 1 << 18  # of a commit
_MAX_REASON_CHARS = 500
_HEAD = struct.Struct("<BH16s")


class AbortCause(IntEnum):
    """Why an end gave a session up, so that the other end can raise the fitting error."""

    ABORTED = 1
    UNKNOWN_GRANT = 2
    VIOLATION = 3


_ERRORS: dict[AbortCause, type[TransferError]] = {
    AbortCause.ABORTED: TransferAborted,
    AbortCause.UNKNOWN_GRANT: GrantRefused,
    AbortCause.VIOLATION: ProtocolViolation,
}


@dataclass(frozen=True, slots=True)
class Begin:
    session_id: SessionId
    token: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    session_id: SessionId
    token: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class CommitAck:
    session_id: SessionId
    token: bytes


@dataclass(frozen=True, slots=True)
class Abort:
    session_id: SessionId
    token: bytes
    cause: AbortCause
    reason: str

    @classmethod
    def because_of(cls, session_id: SessionId, token: bytes, error: TransferError) -> Abort:
        """The message that makes the other end see an error of the same kind, as far as there is one."""
        cause = next((c for c, kind in _ERRORS.items() if isinstance(error, kind)), AbortCause.ABORTED)
        return cls(session_id, token, cause, str(error))

    @property
    def error(self) -> TransferError:
        """What the end that was told so reports."""
        return _ERRORS[self.cause](f"the other end gave up: {self.reason}")


@dataclass(frozen=True, slots=True)
class AbortAck:
    session_id: SessionId
    token: bytes


Message = Begin | Commit | CommitAck | Abort | AbortAck

_BEGIN, _COMMIT, _COMMIT_ACK, _ABORT, _ABORT_ACK = range(1, 6)


def encode(message: Message) -> bytes:
    match message:
        case Begin():
            return _pack(_BEGIN, message, b"")
        case Commit():
            return _pack(_COMMIT, message, message.payload)
        case CommitAck():
            return _pack(_COMMIT_ACK, message, b"")
        case Abort():
            return _pack(_ABORT, message, bytes([message.cause]) + message.reason[:_MAX_REASON_CHARS].encode())
        case AbortAck():
            return _pack(_ABORT_ACK, message, b"")


def decode(data: bytes) -> Message:
    """Raises ProtocolViolation for anything that ``encode`` does not make."""
    kind, session_id, token, body = _unpack(data)
    if kind == _BEGIN and not body:
        return Begin(session_id, token)
    if kind == _COMMIT and len(body) <= MAX_PAYLOAD_BYTES:
        return Commit(session_id, token, body)
    if kind == _COMMIT_ACK and not body:
        return CommitAck(session_id, token)
    if kind == _ABORT and body and body[0] in set(AbortCause):
        return Abort(session_id, token, AbortCause(body[0]), body[1:].decode(errors="replace"))
    if kind == _ABORT_ACK and not body:
        return AbortAck(session_id, token)
    raise ProtocolViolation(f"a message of kind {kind} with {len(body)} bytes means nothing")


def _pack(kind: int, message: Message, body: bytes) -> bytes:
    name = message.session_id.encode()
    return _HEAD.pack(kind, len(name), message.token) + name + body


def _unpack(data: bytes) -> tuple[int, SessionId, bytes, bytes]:
    if len(data) < _HEAD.size:
        raise ProtocolViolation(f"a message of {len(data)} bytes is too short")
    kind, name_bytes, token = _HEAD.unpack_from(data)
    name, body = data[_HEAD.size : _HEAD.size + name_bytes], data[_HEAD.size + name_bytes :]
    if len(name) != name_bytes:
        raise ProtocolViolation("a message ends within its session id")
    try:
        return kind, SessionId(name.decode()), token, body
    except UnicodeDecodeError as error:
        raise ProtocolViolation("a session id is not UTF-8") from error
