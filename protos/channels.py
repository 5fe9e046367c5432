"""How does one process of the service reach another's gRPC port? Channels and ports are made here, and only here.

With credentials both ends show a certificate of the service's authority (core/credentials.py); a peer without one
reaches no method, not even to be told that there is none. Without them every call is in the clear. The doors for
clients of the service are not made here.

Invariants:
- A port follows changed certificate files: it asks for them at each handshake. A channel keeps the ones it was made
  with, also when it reconnects: whoever keeps a channel for long makes it anew when it breaks.
- gRPC compares a name and cannot be told not to: it is ``INTERNAL_NAME``, in every certificate, wherever a worker runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from core.credentials import INTERNAL_NAME, Credentials, Reloaded

_Options = Sequence[tuple[str, int | str]]

# A process that restarts may get its predecessor's port: channels must not share a broken connection's back-off.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


def open_channel(address: str, credentials: Credentials | None, options: _Options = ()) -> grpc.aio.Channel:
    """A channel to a process of the service at host:port. Raises ``InvalidConfig`` for files that cannot be used."""
    options = (*_OWN_CONNECTION, *options)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    pem = credentials.pem()
    secrets = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
    name = (("grpc.ssl_target_name_override", INTERNAL_NAME), ("grpc.default_authority", INTERNAL_NAME))
    return grpc.aio.secure_channel(address, secrets, options=(*options, *name))


def open_port(server: grpc.aio.Server, address: str, credentials: Credentials | None) -> int:
    """Let ``server`` listen at host:port (port 0: any free one); returns the port.

    Raises ``InvalidConfig`` for files that cannot be used, ``RuntimeError`` if the port cannot be had.
    """
    if credentials is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _port_credentials(credentials))


def _port_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    files = Reloaded(credentials, _configuration)
    return grpc.dynamic_ssl_server_credentials(files.current(), files.current, require_client_authentication=True)


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    pem = credentials.pem()
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)
