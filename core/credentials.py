"""How does a process prove to its peers that it belongs to the service? The files of mutual TLS.

One private certificate authority is the border of the service: whoever holds a certificate that it signed is one of us,
at either end of every KV link and of every internal gRPC call. Host names are not compared: workers move between hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM files, read again whenever they change."""

    ca_file: Path
    cert_file: Path
    key_file: Path
