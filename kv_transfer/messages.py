"""What do the two ends of a session tell each other, beside the pages? Small messages, the same on every transport.

    sending end                               receiving end
    Begin                  ->                 binds the session to this link; writes are admitted from now on
    (writes)               ->
    Renew                  ->                 nothing to send for a while, but the session lives
    Commit(payload)        ->                 every byte arrived: on_committed, then
                           <-                 CommitAck: the source pages may be reused
                           <-                 or Resend(missing): some did not arrive, or not as they were sent
    (those), Commit        ->                 and so on, a few times at most
    Abort(reason)          ->                 no write follows it: the pages are released
                           <-                 Abort(reason): stop writing
    AbortAck               ->                 no write follows it: the pages are released

An Abort of the sending end needs no answer: by the link's order it is the last thing of its session.
Every message names the grant's token beside the session: from the sending end it is the proof, and in both directions
it keeps what was said of an earlier grant from touching a later one of the same name.

Bytes, little endian: kind u8 | length of session id u16 | token [16] | session id, UTF-8 | body.
A Resend's body: for each entry first layer u16 | layers u16 | spans u32, then for each span offset u64 | bytes u64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from core.errors import Corrupted, GrantRefused, ProtocolViolation, TransferAborted, TransferError
from core.request import SessionId
from kv_transfer.transport import Span

MAX_PAYLOAD_BYTES = 1 << 18  # of a commit
MAX_RESEND_SPANS = 1 << 13  # with as many entries a message is still smaller than the largest commit
_MAX_REASON_CHARS = 500
_HEAD = struct.Struct("<BH16s")
_MISSING = struct.Struct("<HHI")
_SPAN = struct.Struct("<QQ")


class AbortCause(IntEnum):
    """Why an end gave a session up, so that the other end can raise the fitting error."""

    ABORTED = 1
    UNKNOWN_GRANT = 2
    VIOLATION = 3
    CORRUPTED = 4


_ERRORS: dict[AbortCause, type[TransferError]] = {
    AbortCause.ABORTED: TransferAborted,
    AbortCause.UNKNOWN_GRANT: GrantRefused,
    AbortCause.VIOLATION: ProtocolViolation,
    AbortCause.CORRUPTED: Corrupted,
}


@dataclass(frozen=True, slots=True)
class Begin:
    session_id: SessionId
    token: bytes


@dataclass(frozen=True, slots=True)
class Renew:
    session_id: SessionId
    token: bytes


@dataclass(frozen=True, slots=True)
class Missing:
    """Bytes of the receiver's memory, the same in each of ``layers``, that are still waited for."""

    layers: range
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.layers) * sum(span.num_bytes for span in self.spans)


@dataclass(frozen=True, slots=True)
class Resend:
    """``missing`` may be a part of what is missing: the next commit shows the rest."""

    session_id: SessionId
    token: bytes
    missing: tuple[Missing, ...]


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


Message = Begin | Renew | Commit | CommitAck | Resend | Abort | AbortAck

_BEGIN, _COMMIT, _COMMIT_ACK, _ABORT, _ABORT_ACK, _RESEND, _RENEW = range(1, 8)


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
        case Resend():
            return _pack(_RESEND, message, b"".join(_pack_missing(missing) for missing in message.missing))
        case Renew():
            return _pack(_RENEW, message, b"")


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
    if kind == _RESEND and body:
        return Resend(session_id, token, _parse_missing(body))
    if kind == _RENEW and not body:
        return Renew(session_id, token)
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


def _pack_missing(missing: Missing) -> bytes:
    head = _MISSING.pack(missing.layers.start, len(missing.layers), len(missing.spans))
    return head + b"".join(_SPAN.pack(span.offset, span.num_bytes) for span in missing.spans)


def _parse_missing(body: bytes) -> tuple[Missing, ...]:
    entries: list[Missing] = []
    at = 0
    num_spans_left = MAX_RESEND_SPANS
    while at < len(body):
        if len(body) < at + _MISSING.size:
            raise ProtocolViolation("a resend ends within an entry")
        first_layer, num_layers, num_spans = _MISSING.unpack_from(body, at)
        at += _MISSING.size
        end = at + num_spans * _SPAN.size
        num_spans_left -= num_spans
        if not num_layers or not num_spans or num_spans_left < 0 or end > len(body):
            raise ProtocolViolation(f"a resend with an entry of {num_layers} layers and {num_spans} spans")
        spans = tuple(Span(offset, num_bytes) for offset, num_bytes in _SPAN.iter_unpack(body[at:end]))
        if not all(span.num_bytes for span in spans):
            raise ProtocolViolation("a resend with an empty span")
        entries.append(Missing(range(first_layer, first_layer + num_layers), spans))
        at = end
    return tuple(entries)
