"""The transport over NIXL: RDMA, NVLink (CUDA IPC) or shared memory, whatever UCX finds; the one file that meets NIXL.

    nixl.py           NIXL's calls, and what the worker sees: a Transport
    nixl_carrier.py   the thread that makes those calls; handshakes, rings, peers that come and go
    nixl_links.py     the two ends of a link: order, slots, events
    nixl_notes.py     what the notifications mean

NIXL encrypts nothing, and UCX listens where it likes: on the loopback device alone if the worker's host is a loopback
address, else where UCX_NET_DEVICES allows. Use it within one trusted network.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Condition
from typing import Any

from core.clock import Clock
from core.credentials import Credentials
from core.errors import InvalidConfig, PeerLost, ProtocolViolation
from core.fingerprint import CacheFingerprint
from kv_transfer.config import KvTransferConfig
from kv_transfer.nixl_carrier import CarrierThread, Place
from kv_transfer.nixl_links import LinkEnd, SendEnd
from kv_transfer.nixl_notes import KEY_BYTES, LINK_ID_BYTES
from kv_transfer.staging import Ring, ring_shape
from kv_transfer.transport import (
    ANONYMOUS,
    LinkStats,
    PeerIdentity,
    PieceLimits,
    ReceiveEvents,
    Region,
    SendEvents,
    TransportCounters,
)
from kv_transfer.ucx_log import environment, ucx_log

logger = logging.getLogger(__name__)

_DESCRIPTOR_MAGIC = b"nixl1"
_BACKEND = "UCX"
MAX_SPANS = 4096  # of a write: 48 KiB of its note
_MAX_KEPT = 256  # writes that NIXL knows: sixteen links of four slots, each of several lengths


class NixlTransport:
    """One process's NIXL agent and every link that it made or accepted."""

    def __init__(
        self,
        config: KvTransferConfig,
        fingerprint: CacheFingerprint,
        clock: Clock,
        identity: PeerIdentity = ANONYMOUS,
        credentials: Credentials | None = None,
    ) -> None:
        """Raises InvalidConfig when NIXL is not installed, or a link is to have a codec."""
        _require_nixl()
        for index, link in enumerate(config.links):
            if link.codecs != ("raw",):
                key = f"kv_transfer.links[{index}].codecs"
                raise InvalidConfig(key, f"nixl carries raw bytes only, got {list(link.codecs)}")
        if credentials is not None:
            logger.warning("kv over nixl is not encrypted: TLS protects this worker's gRPC calls, not its KV")
        self._config = config
        self._fingerprint = fingerprint
        self._clock = clock
        self._identity = identity
        self._key = secrets.token_bytes(KEY_BYTES)
        self._region: Region | None = None
        self._events: ReceiveEvents | None = None
        self._connection = b""  # NIXL metadata by which this agent is reached
        self._changed = Condition()
        self._ends: set[LinkEnd] = set()  # whose last event was not called yet
        self._closed = False
        self._counters = TransportCounters()
        self._thread: CarrierThread | None = None

    @property
    def region(self) -> Region:
        assert self._region is not None, "register comes first"
        return self._region

    @property
    def counters(self) -> TransportCounters:
        return self._counters

    @property
    def pieces(self) -> PieceLimits:
        """A write fills a slot; many strips cost a longer note."""
        return PieceLimits(ring_shape(self.region, self._config.staging_mib).slot_bytes, MAX_SPANS)

    def register(self, region: Region) -> None:
        """Also raises InvalidConfig when UCX does not start."""
        assert self._region is None, "a region is registered once"
        self._region = region
        self._thread = CarrierThread(self, region, lambda: _Agent(self._config))
        self._connection = self._thread.start()

    def serve(self, events: ReceiveEvents) -> None:
        assert self._events is None, "a transport serves once"
        self._events = events

    def describe(self) -> bytes:
        assert self._events is not None, "serve comes first"
        return _DESCRIPTOR_MAGIC + self._key + self._connection

    def connect(self, descriptor: bytes, events: SendEvents) -> SendEnd:
        start = len(_DESCRIPTOR_MAGIC)
        if len(descriptor) <= start + KEY_BYTES or not descriptor.startswith(_DESCRIPTOR_MAGIC):
            raise ProtocolViolation("the descriptor is not of a nixl transport")
        key, connection = descriptor[start : start + KEY_BYTES], descriptor[start + KEY_BYTES :]
        assert self._thread is not None, "register comes first"
        thread = self._thread
        end = SendEnd(thread, secrets.token_bytes(LINK_ID_BYTES), "not reached yet", events)
        closed = self.add(end)
        thread.adopt(end)
        if closed:
            end.close(PeerLost("this end's transport is closed"))
        else:
            thread.queue(lambda: thread.dial(end, connection, key))
        return end

    def invite(self, descriptor: bytes) -> None:
        """There is nothing to dial: agents reach each other by what their descriptors hold."""

    def stats(self) -> tuple[LinkStats, ...]:
        with self._changed:
            ends = [end for end in self._ends if isinstance(end, SendEnd) and end.theirs is not None]
        return tuple(sorted((end.stats() for end in ends), key=lambda stats: stats.peer.worker_id))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            ends = list(self._ends)
        for end in ends:
            end.close(PeerLost("this end's transport was closed"))
        with self._changed:
            self._changed.wait_for(lambda: not self._ends)
        if self._thread is not None:
            self._thread.stop()

    # ---- for the carrier's thread ----

    @property
    def config(self) -> KvTransferConfig:
        return self._config

    @property
    def clock(self) -> Clock:
        return self._clock

    @property
    def fingerprint(self) -> CacheFingerprint:
        return self._fingerprint

    @property
    def identity(self) -> PeerIdentity:
        return self._identity

    @property
    def key(self) -> bytes:
        return self._key

    @property
    def events(self) -> ReceiveEvents | None:
        """Whom to ask about what peers write; None: this end takes no links (any more)."""
        return None if self._closed else self._events

    def add(self, end: LinkEnd) -> bool:
        """True: the transport is closed, and the end must be too."""
        with self._changed:
            self._ends.add(end)
            return self._closed

    def forget(self, end: LinkEnd) -> None:
        """The end's last event was called."""
        with self._changed:
            self._ends.discard(end)
            self._changed.notify_all()

    def count(self, **more: int) -> None:
        with self._changed:
            now = self._counters
            self._counters = replace(now, **{name: getattr(now, name) + count for name, count in more.items()})


def _require_nixl() -> None:
    try:
        with ucx_log().settings():
            import nixl._api  # noqa: F401
    except ImportError as error:
        how = "pip install 'prfaas[nixl]' (on GPU hosts: prfaas[gpu])"
        raise InvalidConfig("kv_transfer.transport", f"nixl is not installed ({error}): {how}") from error


@dataclass(eq=False, slots=True)
class _Transfer:
    """A write that NIXL was told of: to whom, from where, to where. It may be posted again once it is done."""

    key: tuple[str, Place, Place]
    handle: Any
    done: bool = False


class _Agent:
    """NIXL's agent as nixl_carrier.py wants it.

    Slots are written again and again, so what NIXL made of a write is kept: to post it anew takes one call and not
    four, and at each of them another thread may take the interpreter.
    """

    def __init__(self, config: KvTransferConfig) -> None:
        from nixl import _bindings
        from nixl._api import nixl_agent, nixl_agent_config

        logging.getLogger("nixl").setLevel(logging.WARNING)  # it tells of every agent, on stdout
        self.name = f"kv-{secrets.token_hex(6)}"
        self.errors = tuple(
            kind for kind in vars(_bindings).values() if isinstance(kind, type) and issubclass(kind, Exception)
        )
        here = {"UCX_NET_DEVICES": "lo"} if _is_loopback(config.host) else {}
        with ucx_log().settings(), environment(here):
            # Our one thread calls it, and calls it often: no progress thread, no locks.
            self._nixl = nixl_agent(self.name, nixl_agent_config(enable_prog_thread=False, backends=[]))
            self._nixl.create_backend(_BACKEND, {"ucx_error_handling_mode": "peer"})
        self._kept: dict[tuple[str, Place, Place], _Transfer] = {}  # done
        nothing = _bindings.nixlRegDList(_bindings.DRAM_SEG)
        self.connection: bytes = self._nixl.get_partial_agent_metadata(nothing, True, [_BACKEND])

    def register(self, ring: Ring) -> Any:
        place = (ring.address, ring.num_slots * ring.slot_bytes, ring.device or 0, "")
        return self._nixl.register_memory([place], _segment(ring.device), [_BACKEND])

    def deregister(self, registration: Any) -> None:
        self._forget(list(self._kept))
        self._nixl.deregister_memory(registration, [_BACKEND])

    def metadata(self, registration: Any) -> bytes:
        data: bytes = self._nixl.get_partial_agent_metadata(registration, False, [_BACKEND])
        return data

    def load(self, metadata: bytes) -> str:
        try:
            name: str | bytes = self._nixl.add_remote_agent(metadata)
        except self.errors as error:
            raise PeerLost(f"NIXL cannot reach the peer: {error}") from error
        return name.decode() if isinstance(name, bytes) else name

    def unload(self, name: str) -> None:
        self._forget([key for key in self._kept if key[0] == name])
        with suppress(*self.errors):  # it knew nothing of that peer
            self._nixl.remove_remote_agent(name)

    def send(self, name: str, note: bytes) -> None:
        try:
            self._nixl.send_notif(name, note)  # naming the backend is broken in 1.5.1; there is one
        except self.errors as error:
            raise PeerLost(f"NIXL cannot reach {name}: {error}") from error

    def received(self) -> dict[str, list[bytes]]:
        notes: dict[str, list[bytes]] = self._nixl.get_new_notifs([_BACKEND])
        return notes

    def write(self, name: str, ours: Place, theirs: Place, note: bytes) -> _Transfer:
        key = (name, ours, theirs)
        transfer = self._kept.pop(key, None)
        try:
            if transfer is None:
                source = self._nixl.get_xfer_descs([_descriptor(ours)], _segment(ours.device))
                target = self._nixl.get_xfer_descs([_descriptor(theirs)], _segment(theirs.device))
                handle = self._nixl.initialize_xfer("WRITE", source, target, name, note, [_BACKEND])
                transfer = _Transfer(key, handle)
            transfer.done = False
            self._nixl.transfer(transfer.handle, note)
        except self.errors as error:
            raise PeerLost(f"NIXL cannot write to {name}: {error}") from error
        return transfer

    def is_done(self, transfer: _Transfer) -> bool:
        try:
            state = self._nixl.check_xfer_state(transfer.handle)
        except self.errors as error:
            raise PeerLost(f"a write failed: {error}") from error
        if state == "ERR":
            raise PeerLost("a write failed")
        transfer.done = state == "DONE"
        return transfer.done

    def release(self, transfer: _Transfer) -> None:
        if transfer.done and transfer.key not in self._kept:
            if len(self._kept) == _MAX_KEPT:
                self._forget(list(self._kept))
            self._kept[transfer.key] = transfer
        else:
            self._give_up(transfer)

    def _forget(self, keys: Iterable[tuple[str, Place, Place]]) -> None:
        for key in keys:
            self._give_up(self._kept.pop(key))

    def _give_up(self, transfer: _Transfer) -> None:
        with suppress(*self.errors):  # still under way: NIXL keeps it until the agent goes
            self._nixl.release_xfer_handle(transfer.handle)


def _descriptor(place: Place) -> tuple[int, int, int]:
    return place.address, place.num_bytes, place.device or 0


def _segment(device: int | None) -> str:
    return "DRAM" if device is None else "VRAM"


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
