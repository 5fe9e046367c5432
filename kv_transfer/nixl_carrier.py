"""Who talks to NIXL? One thread for all links of a transport: it owns the agent, the rings and what is under way.

It takes the notes that came, steps the ends of links (nixl_links.py), asks how the writes under way fare, and keeps
links alive. It polls, since NIXL can wake nobody: at once while something moves and for 2 ms after that, then, for a
tenth of a second, in which a model may store its next layer, every 0.3 ms, and every 2 ms while nothing happens.
Each look takes the interpreter from the threads that launch the model's kernels, so not more often. (NIXL's own
progress thread would take a whole core, always.)

NIXL knows no connections, so a link is made by notes: the descriptor holds the agent's connection metadata and an
access key; HELLO proves the key; WELCOME tells of a ring made for this link. Rules:

- Rings outlive links. A ring into which a peer may still write (it is silent, and said no BYE) goes to no other link
  until NIXL says that the peer is gone.
- BYE is sent when nothing of this end is under way any more.
- Who speaks nonsense, or does not know the access key, is counted and gets no answer.

Everything below ``the loop`` runs on the thread, and state that begins with ``_`` is its own.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock, Thread
from typing import Any, Protocol

from core.clock import Clock
from core.errors import InvalidConfig, PeerLost, ProtocolViolation, TransferError
from core.fingerprint import CacheFingerprint
from kv_transfer.config import KvTransferConfig
from kv_transfer.nixl_links import LinkEnd, ReceiveEnd, SendEnd
from kv_transfer.nixl_notes import (
    Hello,
    Memory,
    Note,
    NoteKind,
    RingPlace,
    Role,
    Welcome,
    pack_hello,
    pack_welcome,
    parse_hello,
    parse_note,
    parse_welcome,
)
from kv_transfer.staging import Ring, StagedRegion, make_ring, ring_shape
from kv_transfer.transport import PeerIdentity, ReceiveEvents, Region
from kv_transfer.ucx_log import fell_to_tcp, path_of, ucx_log

logger = logging.getLogger(__name__)

_HANDSHAKE_S = 5.0
_GREET_AGAIN_S = 1.0  # an endpoint whose other end was closed may swallow a HELLO without a word
_KEEPALIVES_PER_LEASE = 4
_MIN_SILENCE_S = 5.0
_CLOSE_S = 1.0  # how long a transport that closes waits for its writes under way
# Pauses between two looks, each from so many seconds after the last move on.
_PAUSES_S = ((0.1, 2e-3), (2e-3, 3e-4), (0.0, 20e-6))
_KEEP_ALIVE_S = 2e-3  # between two looks at who is silent


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes at one end of a write. ``device``: ordinal of the device that holds them; None: host memory."""

    address: int
    num_bytes: int
    device: int | None


class Agent(Protocol):
    """The calls of NIXL that are made here. What goes wrong with a peer is PeerLost. For one thread."""

    name: str  # of this agent
    connection: bytes  # metadata by which peers reach it

    def register(self, ring: Ring) -> Any:
        """Let the hardware reach the ring."""
        ...

    def deregister(self, registration: Any) -> None: ...

    def metadata(self, registration: Any) -> bytes:
        """What a peer must load to write into the ring."""
        ...

    def load(self, metadata: bytes) -> str:
        """Learn what a peer's metadata tells; return the peer's name. Raises PeerLost when it cannot be reached."""
        ...

    def unload(self, name: str) -> None:
        """Forget a peer, also one that is not known."""
        ...

    def send(self, name: str, note: bytes) -> None:
        """Raises PeerLost."""
        ...

    def received(self) -> dict[str, list[bytes]]:
        """Notes that came since it was asked last, by the sender's name; also makes NIXL work."""
        ...

    def write(self, name: str, ours: Place, theirs: Place, note: bytes) -> Any:
        """Begin to write, with a note behind the bytes; return a handle. Raises PeerLost."""
        ...

    def is_done(self, handle: Any) -> bool:
        """Raises PeerLost when the write failed."""
        ...

    def release(self, handle: Any) -> None:
        """The handle is not needed any more, done or not."""
        ...


class Owner(Protocol):
    """The transport, as far as its thread needs it."""

    @property
    def config(self) -> KvTransferConfig: ...

    @property
    def clock(self) -> Clock: ...

    @property
    def fingerprint(self) -> CacheFingerprint: ...

    @property
    def identity(self) -> PeerIdentity: ...

    @property
    def key(self) -> bytes: ...

    @property
    def events(self) -> ReceiveEvents | None:
        """Whom to ask about what peers write; None: this end takes no links (any more)."""
        ...

    def add(self, end: LinkEnd) -> bool:
        """True: the transport is closed, and the end must be too."""
        ...

    def forget(self, end: LinkEnd) -> None:
        """The end's last event was called."""
        ...

    def count(self, **more: int) -> None:
        """Add to the counters of those names."""
        ...


@dataclass(eq=False, slots=True)
class _OwnRing:
    """A ring of this process, registered with NIXL."""

    ring: Ring
    registration: Any


@dataclass(eq=False, slots=True)
class _Peer:
    """An agent that NIXL knows, by its name."""

    num_links: int = 0
    idle_since: float = 0.0


@dataclass(frozen=True, slots=True)
class _Handshake:
    end: SendEnd
    connection: bytes
    key: bytes
    since: float
    greeted_at: float


@dataclass(frozen=True, slots=True)
class _Transfer:
    end: SendEnd
    handle: Any
    num_bytes: int


class _Bell:
    """Wakes one thread, also if it rang before that waited. An Event does too, in half as much time again."""

    def __init__(self) -> None:
        self._silent = Lock()
        self._silent.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # it is ringing already
            self._silent.release()

    def wait(self, timeout_s: float) -> None:
        self._silent.acquire(timeout=timeout_s)


class CarrierThread:
    """The thread that owns the agent, and all that it alone reads and writes. A ``Carrier`` for the links."""

    def __init__(self, transport: Owner, region: Region, make_agent: Callable[[], Agent]) -> None:
        """``make_agent`` is called on the thread."""
        self._transport = transport
        self._make_agent = make_agent
        self._region = region
        self._config = transport.config
        self._keepalive_s = self._config.lease_s / _KEEPALIVES_PER_LEASE
        self._queue: deque[Callable[[], object]] = deque()
        self._bell = _Bell()
        self._stopping_at: float | None = None
        self._thread = Thread(target=self._run, name="kv-nixl", daemon=True)
        self._started: Future[bytes] = Future()
        self._links: dict[tuple[Role, bytes], LinkEnd] = {}  # role of our end, link id
        self._rings: dict[LinkEnd, _OwnRing] = {}
        self._free: list[_OwnRing] = []
        self._quarantined: dict[bytes, tuple[str, _OwnRing]] = {}  # link id |-> the agent that may still write, ring
        self._peers: dict[str, _Peer] = {}
        self._handshakes: dict[SendEnd, _Handshake] = {}
        self._transfers: list[_Transfer] = []
        self._ends: list[LinkEnd] = []  # whose last event was not called yet
        self._finishing: list[LinkEnd] = []  # ended, with writes that may be under way
        self._is_broken = False  # by a bug: links end at once
        self._log_marks: dict[SendEnd, int] = {}  # whose path is not known yet |-> where UCX's log stood

    # ---- from any thread ----

    @property
    def clock(self) -> Clock:
        return self._transport.clock

    def start(self) -> bytes:
        """Return the agent's connection metadata."""
        self._thread.start()
        return self._started.result()

    def queue(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        self._bell.ring()

    def stop(self) -> None:
        def stop() -> None:
            self._stopping_at = self._stopping_at or self.clock.now() + _CLOSE_S

        self.queue(stop)
        self._thread.join()

    def count(self, *, bad_frames: int = 0, writes_refused: int = 0, writes_damaged: int = 0) -> None:
        self._transport.count(bad_frames=bad_frames, writes_refused=writes_refused, writes_damaged=writes_damaged)

    def wake(self) -> None:
        self._bell.ring()

    def adopt(self, end: SendEnd) -> None:
        """Step the end from now on. Of a thread that was stopped: end it at once, which another one reports."""
        if self._thread.is_alive():
            self.queue(partial(self._ends.append, end))
        else:
            Thread(target=self._end_late, args=(end,), name="kv-nixl-lost", daemon=True).start()

    # ---- the loop ----

    def _run(self) -> None:
        try:
            if isinstance(self._region, StagedRegion):
                self._region.bind_thread()
            self._agent = self._make_agent()
        except Exception as error:
            self._started.set_exception(InvalidConfig("kv_transfer.transport", f"NIXL does not start: {error}"))
            return
        self._started.set_result(self._agent.connection)
        try:
            self._loop()
        except Exception:
            logger.exception("kv over nixl is broken by a bug: its links end here")
        finally:
            self._tear_down()
        while self._stopping_at is None:
            self._run_queue()
            self._stop_ends()
            self._bell.wait(_KEEP_ALIVE_S)
        self._run_queue()
        self._stop_ends()

    def _loop(self) -> None:
        clock = self.clock
        moved_at = kept_at = clock.now()
        while not self._stopped():
            moved = self._run_queue() + self._take_notes() + self._step_ends()
            moved += self._poll_transfers() + self._finish_ends()
            now = clock.now()
            if moved:
                moved_at = now
            if now - kept_at >= _KEEP_ALIVE_S:
                self._keep_alive()
                kept_at = now
            if not moved:
                since_s = 0.0 if self._transfers else now - moved_at
                self._bell.wait(next(pause_s for from_s, pause_s in _PAUSES_S if since_s >= from_s))

    def _stopped(self) -> bool:
        if self._stopping_at is None or self._queue:
            return False
        return not (self._ends or self._finishing or self._transfers) or self.clock.now() > self._stopping_at

    def _tear_down(self) -> None:
        self._is_broken = True
        self._stop_ends()
        for transfer in self._transfers:
            self._agent.release(transfer.handle)
        self._transfers.clear()
        for name in list(self._peers):
            self._agent.unload(name)
        for own in [*self._free, *self._rings.values(), *(own for _, own in self._quarantined.values())]:
            self._agent.deregister(own.registration)
        del self._agent

    def _step_ends(self) -> int:
        return sum([end.step() for end in tuple(self._ends)])

    def _stop_ends(self) -> None:
        """Nothing goes any more: end those that did not end in order."""
        for end in tuple(self._ends):
            end.close(PeerLost("this end's thread has ended"))
            end.stop()

    def _end_late(self, end: LinkEnd) -> None:
        self._ends.append(end)
        self._stop_ends()

    # ---- for the links, within their steps ----

    def send(self, end: LinkEnd, note: bytes) -> bool:
        """False: the peer is gone."""
        if self._is_broken:
            return False
        try:
            self._agent.send(end.agent, note)
        except PeerLost as error:
            end.close(error)
            self._lose(end.agent, error)
            return False
        end.sent_at = self.clock.now()
        return True

    def post(self, end: SendEnd, slot: int, num_bytes: int, note: bytes) -> None:
        if end.error is not None or self._is_broken:
            return  # nothing is begun for a link that ends
        ring, theirs = end.ring, end.theirs
        assert ring is not None, "a link that writes was opened"
        assert theirs is not None, "a link that writes was opened"
        here = Place(ring.address + slot * ring.slot_bytes, num_bytes, ring.device)
        device = theirs.device if theirs.memory is Memory.DEVICE else None
        there = Place(theirs.address + slot * theirs.slot_bytes, num_bytes, device)
        try:
            handle = self._agent.write(end.agent, here, there, note)
        except PeerLost as error:
            end.close(error)
            self._lose(end.agent, error)
            return
        end.sent_at = self.clock.now()
        self._transfers.append(_Transfer(end, handle, num_bytes))

    def ended(self, end: LinkEnd) -> None:
        self._ends.remove(end)
        self._finishing.append(end)
        self._transport.forget(end)

    # ---- the rest of the loop ----

    def _run_queue(self) -> int:
        count = len(self._queue)
        for _ in range(count):
            self._queue.popleft()()
        return count

    def _take_notes(self) -> int:
        received = self._agent.received()
        for name, notes in received.items():
            for data in notes:
                self._take_note(name, data)
        return len(received)

    def _take_note(self, name: str, data: bytes) -> None:
        try:
            note = parse_note(data)
        except ProtocolViolation as error:
            known = name in self._peers or name == self._agent.name
            self._transport.count(**{"bad_frames" if known else "links_refused": 1})
            logger.warning("kv agent %s was not understood: %s", name, error)
            return
        end = self._links.get((note.role, note.link_id))
        if note.kind is NoteKind.HELLO and end is None:
            self._take_hello(name, note)
        elif end is not None and end.agent == name:
            try:
                self._take_link_note(end, note)
            except TransferError as error:
                if isinstance(error, ProtocolViolation):
                    self._transport.count(bad_frames=1)
                    logger.warning("kv link with %s closed: %s", end.peer, error)
                end.close(error)
        elif note.kind is NoteKind.BYE and note.link_id in self._quarantined:
            self._free.append(self._quarantined.pop(note.link_id)[1])
        # else: of a link that has ended here

    def _take_link_note(self, end: LinkEnd, note: Note) -> None:
        if note.kind is NoteKind.WELCOME and isinstance(end, SendEnd) and end in self._handshakes:
            self._take_welcome(end, parse_welcome(note))
        elif not (note.kind is NoteKind.HELLO and isinstance(end, ReceiveEnd)):  # it greets again if we are slow
            end.heard(note)

    def _poll_transfers(self) -> int:
        going: list[_Transfer] = []
        for transfer in self._transfers:
            end = transfer.end
            try:
                if not self._agent.is_done(transfer.handle):
                    going.append(transfer)
                    continue
                end.bytes_sent += transfer.num_bytes
                self._learn_path(end, transfer.num_bytes)
            except PeerLost as error:
                end.close(error)
            self._agent.release(transfer.handle)
        moved = len(self._transfers) - len(going)
        self._transfers = going
        return moved

    def _finish_ends(self) -> int:
        if not self._finishing:
            return 0
        under_way = {transfer.end for transfer in self._transfers}
        finished = [end for end in self._finishing if end not in under_way]
        for end in finished:
            self._finishing.remove(end)
            self._finish(end)
        return len(finished)

    def _finish(self, end: LinkEnd) -> None:
        """Nothing of the end is under way: say so, and give up what it held."""
        self._handshakes.pop(end, None)  # type: ignore[call-overload]
        self._log_marks.pop(end, None)  # type: ignore[call-overload]
        known = self._links.pop((end.role, end.link_id), None) is not None
        reached = known and self.send(end, end.bye_note())
        own = self._rings.pop(end, None)
        if own is not None and (isinstance(end, SendEnd) or end.peer_is_done or not reached):
            self._free.append(own)
        elif own is not None:
            self._quarantined[end.link_id] = (end.agent, own)
        peer = self._peers.get(end.agent)
        if known and peer is not None:
            peer.num_links -= 1
            peer.idle_since = self.clock.now()

    def _keep_alive(self) -> None:
        now = self.clock.now()
        for end in list(self._links.values()):
            if isinstance(end, SendEnd) and end in self._handshakes:
                self._greet_again(self._handshakes[end], now)
            elif end.error is None and now - end.sent_at >= self._keepalive_s:
                self.send(end, end.alive_note())
                if end.silence(now) > max(self._config.lease_s, _MIN_SILENCE_S):
                    end.close(PeerLost(f"{end.peer} was silent for {end.silence(now):.1f} s"))
        held = {name for name, _ in self._quarantined.values()}
        for name, peer in list(self._peers.items()):
            if not peer.num_links and name not in held and now - peer.idle_since > self._config.lease_s:
                self._forget_peer(name)

    # ---- peers ----

    def _meet(self, name: str) -> None:
        self._peers.setdefault(name, _Peer(idle_since=self.clock.now())).num_links += 1

    def _forget_peer(self, name: str) -> None:
        self._peers.pop(name, None)
        self._agent.unload(name)

    def _lose(self, name: str, error: PeerLost) -> None:
        """NIXL says that the peer is gone: nothing from it can land any more."""
        for end in list(self._links.values()):
            if end.agent == name:
                end.close(error)
        gone = [link_id for link_id, (agent, _) in self._quarantined.items() if agent == name]
        self._free += [self._quarantined.pop(link_id)[1] for link_id in gone]
        if name != self._agent.name:
            self._forget_peer(name)

    def _learn_path(self, end: SendEnd, num_bytes: int) -> None:
        since = self._log_marks.pop(end, None)
        if since is None:
            return
        end.path = path_of(ucx_log().transports(self._agent.name, num_bytes, since))
        if fell_to_tcp(end.path, os.environ):
            self._transport.count(links_on_tcp=1)
            logger.warning(
                "kv link with %s goes over %s: UCX found nothing faster (UCX_TLS, UCX_NET_DEVICES, and in containers"
                " CAP_SYS_PTRACE or --ipc=host decide what it may use)",
                end.peer,
                end.path,
            )
        else:
            logger.info("kv link with %s goes over %s", end.peer, end.path)

    # ---- rings ----

    def _take_ring(self, end: LinkEnd) -> _OwnRing:
        own = self._free.pop() if self._free else self._make_ring()
        self._rings[end] = own
        return own

    def _make_ring(self) -> _OwnRing:
        shape = ring_shape(self._region, self._config.staging_mib)
        ring = make_ring(self._region, shape.num_slots, shape.slot_bytes)
        return _OwnRing(ring, self._agent.register(ring))

    # ---- handshakes ----

    def dial(self, end: SendEnd, connection: bytes, key: bytes) -> None:
        if self._is_broken:
            end.close(PeerLost("this end's thread has ended"))
            return
        now = self.clock.now()
        handshake = _Handshake(end, connection, key, now, now)
        try:
            name = self._reach(connection)
            end.agent = name
            self._links[(end.role, end.link_id)] = end
            self._meet(name)
            self._handshakes[end] = handshake
            self._agent.send(name, self._hello(handshake))
        except PeerLost as error:
            if end not in self._handshakes:
                end.close(error)
            # else: the endpoint is of an earlier life of the peer, so we shall greet again over a new one

    def _reach(self, connection: bytes) -> str:
        if connection == self._agent.connection:
            return self._agent.name  # NIXL always knows itself
        return self._agent.load(connection)

    def _hello(self, handshake: _Handshake) -> bytes:
        hello = Hello(self._transport.fingerprint, self._transport.identity, self._agent.connection)
        return pack_hello(hello, handshake.end.link_id, handshake.key)

    def _greet_again(self, handshake: _Handshake, now: float) -> None:
        end = handshake.end
        if now - handshake.since > _HANDSHAKE_S:
            end.close(PeerLost(f"{end.peer} did not answer within {_HANDSHAKE_S:.0f} s"))
        if end.error is not None or now - handshake.greeted_at < _GREET_AGAIN_S:
            return
        self._handshakes[end] = replace(handshake, greeted_at=now)
        others = any(link.agent == end.agent and link is not end for link in self._links.values())
        try:
            if not others and end.agent != self._agent.name:
                self._agent.unload(end.agent)
                self._agent.load(handshake.connection)
            self._agent.send(end.agent, self._hello(handshake))
        except PeerLost as error:
            end.close(error)

    def _take_hello(self, name: str, note: Note) -> None:
        events = self._transport.events
        try:
            hello = parse_hello(note, self._transport.key)
            if events is None or self._reach(hello.connection) != name:
                raise ProtocolViolation("nobody takes links here, or its metadata is another agent's")
        except TransferError as error:
            self._transport.count(links_refused=1)
            logger.warning("kv link from agent %s refused: %s", name, error)
            return
        self._peers.setdefault(name, _Peer(idle_since=self.clock.now()))
        try:
            self._transport.fingerprint.require_compatible(hello.fingerprint)
        except TransferError as error:
            self._transport.count(links_refused=1)
            logger.warning("kv link from %s refused: %s", hello.identity.worker_id or name, error)
            self._answer(name, note.link_id, None)
            return
        self._accept(name, note.link_id, hello, events)

    def _accept(self, name: str, link_id: bytes, hello: Hello, events: ReceiveEvents) -> None:
        own = self._free.pop() if self._free else self._make_ring()
        end = ReceiveEnd(self, link_id, name, events, own.ring, hello.identity)
        self._rings[end] = own
        self._links[(end.role, link_id)] = end
        self._meet(name)
        closed = self._transport.add(end)
        ring = own.ring
        memory = Memory.HOST if ring.device is None else Memory.DEVICE
        metadata = self._agent.metadata(own.registration)
        place = RingPlace(ring.num_slots, ring.slot_bytes, ring.address, ring.device or 0, memory, metadata)
        self._ends.append(end)
        if closed:
            end.close(PeerLost("this end's transport is closed"))
        else:
            self._answer(name, link_id, place)

    def _answer(self, name: str, link_id: bytes, place: RingPlace | None) -> None:
        welcome = Welcome(self._transport.fingerprint, self._transport.identity, place)
        try:
            self._agent.send(name, pack_welcome(welcome, link_id))
        except PeerLost as error:
            self._lose(name, error)

    def _take_welcome(self, end: SendEnd, welcome: Welcome) -> None:
        del self._handshakes[end]
        self._transport.fingerprint.require_compatible(welcome.fingerprint)
        if welcome.ring is None:
            raise PeerLost(f"{end.peer} refused the link")
        if end.agent != self._agent.name:
            self._agent.load(welcome.ring.metadata)
        own = self._take_ring(end)
        link = self._config.link(self._transport.identity.cluster_id, welcome.identity.cluster_id)
        self._log_marks[end] = ucx_log().size()
        end.opened(own.ring, welcome.ring, welcome.identity, checked=link.checksum == "xxh3")
