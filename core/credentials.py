"""How does a process prove to its peers that it belongs to the service? The files of mutual TLS, and their contexts.

One private certificate authority is the border of the service: whoever holds a certificate that it signed is one of us,
at either end of every KV link and of every internal gRPC call. Host names are not compared: workers move between hosts.

Invariants:
- TLS 1.3 only; both ends show a certificate on every connection (nothing is resumed), and both check it.
- A connection keeps what it was made with; the next one is made with what the files hold by then (``Reloaded``).
- Files that cannot be used never replace ones that could: a rotation that is under way, or wrong, stops nothing.

A refusal reaches the two ends differently: in TLS 1.3 a client has finished its handshake before the server looks at
its certificate, so a refused client learns it from its first read, as an ``ssl.SSLError`` or an end of the stream.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from core.errors import InvalidConfig

logger = logging.getLogger(__name__)

# The DNS name in every certificate of a service. gRPC insists on comparing one: internal calls expect this one.
INTERNAL_NAME = "prfaas.internal"

T = TypeVar("T")

# (modified at in ns, size, inode) of each file; None: it cannot be looked at
Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Pem:
    """The files' contents, for a library that wants bytes (gRPC)."""

    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM files of one process: whom it trusts, its certificate, the certificate's key (not encrypted).

    Every method reads the files; ``Reloaded`` keeps what was made of them until they change. All raise
    ``InvalidConfig`` naming the key of the configuration (``tls.cert_file``) and the file.
    """

    ca_file: Path
    cert_file: Path
    key_file: Path

    def server_context(self) -> ssl.SSLContext:
        """For the end that accepts: lets in only peers with a certificate of the authority."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # a resumed session would not show a certificate again
        return context

    def client_context(self) -> ssl.SSLContext:
        """For the end that connects: goes on only with a peer that has a certificate of the authority."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def pem(self) -> Pem:
        """What the files hold, after the checks that loading them makes."""
        pem = Pem(
            ca=_read("tls.ca_file", self.ca_file),
            cert=_read("tls.cert_file", self.cert_file),
            key=_read("tls.key_file", self.key_file),
        )
        self.client_context()
        return pem

    def check(self) -> None:
        """Raise ``InvalidConfig`` unless two processes with these files would accept each other now, over gRPC too."""
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client_context = self.client_context()
        client_context.check_hostname = True  # as gRPC does
        ends = (
            client_context.wrap_bio(to_client, to_server, server_hostname=INTERNAL_NAME),
            self.server_context().wrap_bio(to_server, to_client, server_side=True),
        )
        try:
            for end in (*ends, *ends):  # hello, answer, client's certificate, server's check of it
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        except ssl.SSLCertVerificationError as error:
            said = f"{self.cert_file} is not accepted by {self.ca_file}: {error.verify_message}"
            raise InvalidConfig("tls.cert_file", said) from error
        except ssl.SSLError as error:
            raise InvalidConfig("tls.cert_file", f"{self.cert_file} cannot be used: {error}") from error

    def _context(self, protocol: int) -> ssl.SSLContext:
        for key, path in (("ca_file", self.ca_file), ("cert_file", self.cert_file), ("key_file", self.key_file)):
            _read(f"tls.{key}", path)
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cafile=self.ca_file)
        except ssl.SSLError as error:
            raise InvalidConfig("tls.ca_file", f"{self.ca_file} holds no PEM certificates: {error}") from error
        try:
            context.load_cert_chain(self.cert_file, self.key_file, password="")  # never ask at the terminal
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                message = f"{self.key_file} is not the key of {self.cert_file}"
                raise InvalidConfig("tls.key_file", message) from error
            message = f"{self.cert_file} and {self.key_file} must hold a PEM certificate and its plain key: {error}"
            raise InvalidConfig("tls.cert_file", message) from error
        return context

    def stamp(self) -> Stamp:
        """Differs from an earlier one if a file was changed or replaced since."""
        return tuple(_stamp(path) for path in (self.ca_file, self.cert_file, self.key_file))


class Reloaded(Generic[T]):
    """What ``make`` makes of credentials, made again whenever a file has changed. Thread-safe.

    ``Reloaded(credentials, Credentials.server_context).current()`` is the context for the next connection. The first
    is made at once, so that files that cannot be used are an error at the start.
    """

    def __init__(self, credentials: Credentials, make: Callable[[Credentials], T]) -> None:
        self._credentials = credentials
        self._make = make
        self._lock = threading.Lock()
        self._stamp = credentials.stamp()  # before reading: what changes meanwhile is read again
        self._current = make(credentials)

    def current(self) -> T:
        """Made of the files as they are, or, while those cannot be used, of the last ones that could."""
        with self._lock:
            stamp = self._credentials.stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
            return self._current

    def _reload(self) -> None:
        try:
            self._credentials.check()
            self._current = self._make(self._credentials)
        except InvalidConfig as error:
            logger.warning("changed certificates cannot be used, the ones before stay in use: %s", error)
        else:
            logger.info("certificates reloaded from %s", self._credentials.cert_file)


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(key, f"{path} cannot be read: {error.strerror}") from error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
