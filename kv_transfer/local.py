"""The transport inside one process: pages are copied from pool to pool by one thread for each direction of a link.

It is the reference: what it does is what every transport must do. It keeps the whole contract (order, turns, cancel,
admission, loss of a link at both ends), so that tests and one-process demonstrations run the real sender and receiver.
A peer in the same process is always heard.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from threading import Condition, Lock, Thread
from typing import ClassVar
from weakref import WeakValueDictionary

from core.clock import Clock
from core.credentials import Credentials
from core.errors import PeerLost, ProtocolViolation, TransferError
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from kv_transfer.config import KvTransferConfig
from kv_transfer.outbox import Notice, Outbox, Taker
from kv_transfer.spans import Spans
from kv_transfer.transport import (
    ANONYMOUS,
    HOST_PIECES,
    LinkStats,
    PeerIdentity,
    PieceLimits,
    ReceiveEvents,
    Region,
    SendEvents,
    TransportCounters,
    Write,
)

_PREFIX = b"local:"
_IDLE_S = 3600.0  # nothing has to be sent while a link is idle


class LocalTransport:
    """One of several ends in this process."""

    # The process is the network: a descriptor must lead to the other end without anything being passed around.
    _endpoints: ClassVar[WeakValueDictionary[bytes, LocalTransport]] = WeakValueDictionary()

    def __init__(
        self,
        config: KvTransferConfig,
        fingerprint: CacheFingerprint,
        clock: Clock,
        identity: PeerIdentity = ANONYMOUS,
        credentials: Credentials | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.clock = clock
        self.identity = identity
        self._region: Region | None = None
        self._events: ReceiveEvents | None = None
        self._descriptor = _PREFIX + secrets.token_bytes(16)
        self._changed = Condition()
        self._joints: set[_Joint] = set()
        self._closed = False
        self._counters = TransportCounters()

    @property
    def region(self) -> Region:
        assert self._region is not None, "register comes first"
        return self._region

    @property
    def counters(self) -> TransportCounters:
        return self._counters

    @property
    def pieces(self) -> PieceLimits:
        return HOST_PIECES

    def register(self, region: Region) -> None:
        assert self._region is None, "a region is registered once"
        self._region = region

    def serve(self, events: ReceiveEvents) -> None:
        assert self._events is None, "a transport serves once"
        self._events = events
        self._endpoints[self._descriptor] = self

    def describe(self) -> bytes:
        return self._descriptor

    def connect(self, descriptor: bytes, events: SendEvents) -> _SendEnd:
        if not descriptor.startswith(_PREFIX):
            raise ProtocolViolation("the descriptor is not of a local transport")
        joint = _Joint(self, events, self._endpoints.get(descriptor))
        if not self._add(joint):
            joint.close(PeerLost("this transport is closed"))
        joint.start()
        return joint.send_end

    def invite(self, descriptor: bytes) -> None:
        """Every link is dialled by its sending end."""

    def stats(self) -> tuple[LinkStats, ...]:
        with self._changed:
            joints = [joint for joint in self._joints if joint.sender is self]
        stats = [one for joint in joints if (one := joint.stats()) is not None]
        return tuple(sorted(stats, key=lambda one: (one.peer.cluster_id, one.peer.worker_id)))

    def close(self) -> None:
        self._endpoints.pop(self._descriptor, None)
        with self._changed:
            self._closed = True
            joints = list(self._joints)
        for joint in joints:
            joint.close(PeerLost("the other end was closed"))
        with self._changed:
            self._changed.wait_for(lambda: not self._joints)
        for joint in joints:
            joint.join()

    def accept(self, joint: _Joint) -> ReceiveEvents:
        """Called by the connecting end's thread. Raises Incompatible or PeerLost."""
        if self._events is None or not self._add(joint):
            raise PeerLost("the other end is closed")
        try:
            joint.sender.fingerprint.require_compatible(self.fingerprint)
        except TransferError:
            with self._changed:
                self._counters = replace(self._counters, links_refused=self._counters.links_refused + 1)
            raise
        return self._events

    def count_refused_write(self) -> None:
        with self._changed:
            self._counters = replace(self._counters, writes_refused=self._counters.writes_refused + 1)

    def count_bad_frame(self) -> None:
        with self._changed:
            self._counters = replace(self._counters, bad_frames=self._counters.bad_frames + 1)

    def forget(self, joint: _Joint) -> None:
        """The link's last event was called."""
        with self._changed:
            self._joints.discard(joint)
            self._changed.notify_all()

    def _add(self, joint: _Joint) -> bool:
        with self._changed:
            if not self._closed:
                self._joints.add(joint)
            return not self._closed


class _Joint:
    """A link: both its ends, and a thread for each direction. The last thread to end tells both ends of the loss."""

    def __init__(self, sender: LocalTransport, events: SendEvents, receiver: LocalTransport | None) -> None:
        self.sender = sender
        self.receiver = receiver
        self._send_events = events
        self._receive_events: ReceiveEvents | None = None
        self.send_end = _SendEnd(self, sender.clock)
        self.receive_end = _End(self, sender.clock)
        self._bytes_sent = 0
        self._error: TransferError | None = None
        self._lock = Lock()
        self._threads = [Thread(target=self._guard, args=(self._forward, receiver), name="kv-local-send", daemon=True)]
        self._num_running = 1

    def start(self) -> None:
        self._threads[0].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def stats(self) -> LinkStats | None:
        """None before the other end was found."""
        if self._receive_events is None or self.receiver is None:
            return None
        outbox = self.send_end.outbox
        return LinkStats(
            peer=self.receiver.identity,
            path="local",
            connections=1,
            bytes_sent=self._bytes_sent,
            busy_s=outbox.busy_s,
            bytes_queued=outbox.bytes_queued,
        )

    def close(self, error: TransferError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self.send_end.outbox.close()
        self.receive_end.outbox.close()

    def _guard(self, body: Callable[[], None], listener: LocalTransport | None) -> None:
        try:
            body()
        except ProtocolViolation as error:
            if listener is not None:
                listener.count_bad_frame()
            self.close(error)
        except TransferError as error:
            self.close(error)
        finally:
            self.close(PeerLost("a thread of the link failed"))
            with self._lock:
                self._num_running -= 1
                last = self._num_running == 0
            if last:
                self._end()

    def _end(self) -> None:
        assert self._error is not None, "a link ends closed"
        try:
            if self._receive_events is not None:
                self._receive_events.lost(self.receive_end, self._error)
            self._send_events.lost(self.send_end, self._error)
        finally:
            self.sender.forget(self)
            if self.receiver is not None:
                self.receiver.forget(self)

    def _forward(self) -> None:
        if self.receiver is None:
            raise PeerLost("nobody is at this descriptor")
        receive_events = self._receive_events = self.receiver.accept(self)
        self._start_backward()
        outbox, taker = self.send_end.outbox, Taker(control=True)
        while not outbox.closed:
            item = outbox.take(taker, _IDLE_S)
            if isinstance(item, Write):
                self._copy(self.receiver, receive_events, item)
                self._bytes_sent += item.num_bytes
                drained = outbox.done(item)
                self._send_events.written(self.send_end, item)
                if drained:
                    self._send_events.drained(self.send_end, item.session_id)
            elif isinstance(item, Notice):
                receive_events.notified(self.receive_end, item.message)

    def _backward(self) -> None:
        outbox, taker = self.receive_end.outbox, Taker(control=True)
        while not outbox.closed:
            item = outbox.take(taker, _IDLE_S)
            if isinstance(item, Notice):
                self._send_events.notified(self.send_end, item.message)

    def _start_backward(self) -> None:
        thread = Thread(target=self._guard, args=(self._backward, self.sender), name="kv-local-reply", daemon=True)
        self._threads.append(thread)
        with self._lock:
            self._num_running += 1
        thread.start()

    def _copy(self, receiver: LocalTransport, events: ReceiveEvents, write: Write) -> None:
        spans = Spans.of(write.table)
        session_id = events.admit(self.receive_end, write.token, write.layers, spans)
        if session_id is None:
            receiver.count_refused_write()
            return
        for layer in write.layers:
            for strip in write.strips:
                src = self.sender.region.bytes_at(layer, strip.src, strip.num_bytes)
                receiver.region.bytes_at(layer, strip.dst, strip.num_bytes)[:] = src
        events.landed(self.receive_end, session_id, write.layers, spans)


class _End:
    """What a caller holds of one end."""

    def __init__(self, joint: _Joint, clock: Clock) -> None:
        self._joint = joint
        self._clock = clock
        self.outbox = Outbox(clock)

    @property
    def peer(self) -> str:
        return "a worker of this process"

    @property
    def heard_at(self) -> float:
        return self._clock.now()

    def notify(self, session_id: SessionId, message: bytes) -> None:
        self.outbox.put(session_id, message)

    def close(self, error: TransferError) -> None:
        self._joint.close(error)


class _SendEnd(_End):
    def write(self, write: Write) -> None:
        self.outbox.put(write.session_id, write)

    def cancel(self, session_id: SessionId) -> bool:
        return self.outbox.cancel(session_id)
