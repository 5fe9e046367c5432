"""How does one process of the service reach another's gRPC port? Channels and ports are made here, and only here.

With credentials both ends show a certificate of the service's authority (core/credentials.py); a peer without one
reaches no method, not even to be told that there is none. Without them every call is in the clear. The doors for
clients of the service are not made here.

Invariants:
- Changed certificate files are taken up at the next handshake of a port and by the next channel. A channel keeps the
  ones that it was made with, also when it reconnects: whoever keeps one for long makes it anew when it breaks.
- gRPC compares a name and cannot be told not to: it is ``INTERNAL_NAME``, in every certificate, wherever a worker runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from core.credentials import INTERNAL_NAME, Credentials, Pem, Reloaded

_Options = Sequence[tuple[str, int | str]]

# A process that restarts may get its predecessor's port: channels must not share a broken connection's back-off.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


class InternalGrpc:
    """How one process of the service reaches the others and is reached: in the clear, or with its credentials."""

    def __init__(self, credentials: Credentials | None) -> None:
        """Raises ``InvalidConfig`` for files that cannot be used."""
        self._pem = None if credentials is None else Reloaded(credentials, Credentials.pem)

    def channel(self, address: str, options: _Options = ()) -> grpc.aio.Channel:
        """A new channel to a process of the service at host:port."""
        options = (*_OWN_CONNECTION, *options)
        if self._pem is None:
            return grpc.aio.insecure_channel(address, options=options)
        pem = self._pem.current()
        name = (("grpc.ssl_target_name_override", INTERNAL_NAME), ("grpc.default_authority", INTERNAL_NAME))
        secrets = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
        return grpc.aio.secure_channel(address, secrets, options=(*options, *name))

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """Let ``server`` listen at host:port (port 0: any free one); returns the port.

        Raises ``RuntimeError`` if it cannot be had.
        """
        if self._pem is None:
            return server.add_insecure_port(address)
        pem = self._pem

        def current() -> grpc.ServerCertificateConfiguration:
            return _configuration(pem.current())

        secrets = grpc.dynamic_ssl_server_credentials(current(), current, require_client_authentication=True)
        return server.add_secure_port(address, secrets)

    def listen_on_first(self, server: grpc.aio.Server, host: str, ports: Sequence[int]) -> int:
        """``listen`` on the first of ``ports`` that is free; ``server`` must not share ports (``so_reuseport`` 0)."""
        for port in ports:
            try:
                return self.listen(server, f"{host}:{port}")
            except RuntimeError:
                if port == ports[-1]:
                    raise
        raise AssertionError("there is a port to try")


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)
