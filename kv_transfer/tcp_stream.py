"""How do bytes get through one socket without being copied on the way? Plain TCP, or TLS 1.3 over it.

One thread sends and another one receives, at the same time; ``shut_down`` and ``info`` may be called from any thread.

- Plain: one gathered ``sendmsg`` straight out of the pool, one ``recvmsg_into`` with MSG_WAITALL straight into it: a
  system call, and a turn of the interpreter's lock, for a megabyte and not for a page.
- TLS: OpenSSL takes and gives one record of at most 16 KiB a call, view by view; it encrypts out of and decrypts into
  the pool's memory, outside the interpreter's lock. An OpenSSL connection must not be used by two threads at once, and
  a call that blocks would keep the other direction out: so the socket never blocks, a lock is held for each record,
  and who has to wait waits in ``poll``, without it.

Linux only: MSG_WAITALL over several buffers, TCP_INFO, SO_MAX_PACING_RATE and TCP_NOTSENT_LOWAT are used as it has
them.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Lock
from typing import TypeVar

from core.clock import Clock
from core.errors import PeerLost, TransferError, Unauthenticated
from kv_transfer.tcp_info import TcpInfo, read_tcp_info

T = TypeVar("T")

_IOV_MAX = 1024  # of a system call, linux/uio.h
_SO_MAX_PACING_RATE = 47  # asm-generic/socket.h; the module socket does not name it
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
# What the kernel holds of a connection beyond what is on its way can no longer be overtaken by what is more urgent.
# It is refilled at half of this: 0.4 ms of 10 Gbit/s, in which a thread has to be woken. On loopback with the default
# of four connections it cost nothing against no limit (2.9 to 3.2 GB/s against 2.0 to 3.4, two shared cores); with two
# connections no limit may be a little faster, within that noise.
_NOTSENT_BYTES = 1 << 20


class Stream:
    """A TCP connection. All of its methods raise OSError when it breaks, ``receive`` PeerLost when it ends."""

    def __init__(self, connection: socket.socket, clock: Clock, peer: str) -> None:
        self._socket = connection
        self._clock = clock
        self._peer = peer
        self._deadline: float | None = None

    @property
    def path(self) -> str:
        """What carries the bytes, for ``LinkStats``."""
        return "tcp"

    def tune(self, lease_s: float) -> None:
        """Set what every connection has, before anything is said."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that vanished acknowledges nothing: the kernel gives up within the lease, not after 15 minutes.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(lease_s * 1000))
        self._socket.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _NOTSENT_BYTES)
        # Buffer sizes stay the kernel's: setting them caps them at net.core.{r,w}mem_max and ends its autotuning, which
        # goes further on a long link; on loopback 4 MiB by hand made no difference.

    def pace(self, bytes_per_s: float) -> None:
        """Send no faster than this, from now on."""
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("=Q", max(1, int(bytes_per_s))))

    def hurry(self, deadline: float | None) -> None:
        """Break with TimeoutError at ``deadline`` on the clock, whatever is under way; None: never."""
        self._deadline = deadline
        if deadline is None:
            self._socket.settimeout(None)

    def connect(self, address: tuple[object, ...]) -> None:
        self._limit()
        self._socket.connect(address)

    def secured(self, context: ssl.SSLContext, *, accepted: bool) -> TlsStream:
        """The same connection as TLS, not shaken hands yet; this object is of no more use."""
        context.sslsocket_class = _ClosedOnReset
        tls = context.wrap_socket(self._socket, server_side=accepted, do_handshake_on_connect=False)
        stream = TlsStream(tls, self._clock, self._peer)
        stream.hurry(self._deadline)
        return stream

    def handshake(self) -> None:
        """Raises Unauthenticated when one end does not take the other's certificate."""

    def say(self, data: bytes) -> None:
        """Send a frame that is all head."""
        self.send([memoryview(data)])

    def send(self, views: Sequence[memoryview]) -> None:
        """All of ``views``, one after the other."""
        while views:
            self._limit()
            views = after(views, self._socket.sendmsg(views[:_IOV_MAX]))

    def receive(self, views: Sequence[memoryview], *, at_border: bool = False) -> None:
        """Fill ``views``. Raises PeerLost when the stream ends first; ``at_border``: between frames it may."""
        views = [view for view in views if view.nbytes]
        filled = 0
        while views:
            count = self._receive_some(views)
            if count == 0:
                where = "" if at_border and filled == 0 else " in the middle of a frame"
                raise PeerLost(f"{self._peer} closed the connection{where}")
            filled += count
            views = after(views, count)

    def info(self) -> TcpInfo:
        return read_tcp_info(self._socket)

    def shut_down(self) -> None:
        """End both directions and wake whoever waits on them."""
        with suppress(OSError):  # not connected (any more): nobody waits on it
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody uses it any more."""
        self._socket.close()

    def _receive_some(self, views: Sequence[memoryview]) -> int:
        self._limit()
        count: int = self._socket.recvmsg_into(views[:_IOV_MAX], 0, socket.MSG_WAITALL)[0]
        return count

    def _limit(self) -> None:
        if self._deadline is not None:
            self._socket.settimeout(self._seconds_left(self._deadline))

    def _seconds_left(self, deadline: float) -> float:
        left = deadline - self._clock.now()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


class _ClosedOnReset(ssl.SSLSocket):
    """If the peer resets the connection before the handshake, ``wrap_socket`` raises out of its first ``recv`` and
    leaves the socket that it has made, which nobody else knows, open."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except OSError:
            self.close()
            raise


class TlsStream(Stream):
    """The same over TLS, both ends with a certificate."""

    def __init__(self, connection: ssl.SSLSocket, clock: Clock, peer: str) -> None:
        super().__init__(connection, clock, peer)
        self._tls = connection
        self._tls.settimeout(0)
        self._lock = Lock()

    @property
    def path(self) -> str:
        version = self._tls.version()
        return f"tcp+{version.replace('v', '').lower()}" if version else "tcp+tls"

    def hurry(self, deadline: float | None) -> None:
        self._deadline = deadline

    def handshake(self) -> None:
        self._attempt(self._tls.do_handshake)

    def send(self, views: Sequence[memoryview]) -> None:
        for view in views:
            left = view
            while left.nbytes:
                left = left[self._attempt(self._tls.send, left) :]

    def shut_down(self) -> None:
        # SSLSocket.shutdown would forget its TLS state under the thread that uses it, which would then see plain bytes;
        # the descriptor alone is shut down.
        with suppress(OSError), socket.socket(fileno=os.dup(self._tls.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)

    def _receive_some(self, views: Sequence[memoryview]) -> int:
        view, filled = views[0], 0
        while filled < view.nbytes:
            count = self._attempt(self._tls.recv_into, view[filled:])
            if count == 0:
                break
            filled += count
        return filled

    def _attempt(self, operation: Callable[..., T], *arguments: object) -> T:
        while True:
            try:
                with self._lock:
                    return operation(*arguments)
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
                raise PeerLost(f"{self._peer} closed the connection") from error
            except ssl.SSLError as error:
                raise self._explain(error) from error
            self._wait(events)

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._tls.fileno(), events)
        timeout_ms = None if self._deadline is None else self._seconds_left(self._deadline) * 1000
        poll.poll(timeout_ms)

    def _explain(self, error: ssl.SSLError) -> TransferError:
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        if self._deadline is None:  # long after both ends took each other's certificate: a damaged record
            return PeerLost(f"TLS with {self._peer} broke: {reason}")
        return Unauthenticated(f"no TLS with {self._peer}: {reason}")


def after(views: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """What of ``views`` is left when their first ``count`` bytes are done."""
    for i, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[i + 1 :]]
        count -= view.nbytes
    return []


def pieces(views: Sequence[memoryview], max_bytes: int) -> Iterator[list[memoryview]]:
    """``views`` cut and gathered into runs of at most ``max_bytes`` bytes each, in order."""
    piece: list[memoryview] = []
    room = max_bytes
    for view in views:
        while view.nbytes:
            part, view = view[:room], view[room:]
            piece.append(part)
            room -= part.nbytes
            if room == 0:
                yield piece
                piece, room = [], max_bytes
    if piece:
        yield piece
