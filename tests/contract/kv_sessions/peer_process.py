"""A decode or prefill worker's KV half in a process of its own, which a test stops or kills.

peer_process.py receive SESSION   issues a grant of pages 0..7 over tcp, prints it, and goes on
peer_process.py send              reads a grant, writes one layer of it, prints "written", and goes on
"""

from __future__ import annotations

import json
import sys
from threading import Event

from core.clock import WallClock
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from kv_transfer.config import KvTransferConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.session import Grant
from kv_transfer.transport import LayerPages, PageGeometry, Region, Transport, create_transport

LEASE_S = 1.0
PAGES = tuple(range(8))
GEOMETRY = PageGeometry((LayerPages(4096), LayerPages(4096)), num_pages=8)
FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")


def make_transport() -> Transport:
    config = KvTransferConfig(transport="tcp", host="127.0.0.1", lease_s=LEASE_S)
    transport = create_transport(config, FINGERPRINT, WallClock())
    transport.register(Region(GEOMETRY, tuple(memoryview(bytearray(8 * 4096)) for _ in GEOMETRY.layers)))
    return transport


def dump_grant(grant: Grant) -> str:
    return json.dumps([grant.session_id, grant.token.hex(), grant.first_page, grant.pages, grant.descriptor.hex()])


def load_grant(line: str) -> Grant:
    session_id, token, first_page, pages, descriptor = json.loads(line)
    return Grant(session_id, bytes.fromhex(token), first_page, tuple(pages), bytes.fromhex(descriptor), LEASE_S)


def receive(session_id: SessionId) -> None:
    receiver = KvReceiver(make_transport(), WallClock(), lambda s, p: None, lambda s, e: None, LEASE_S)
    print(dump_grant(receiver.issue(session_id, 0, PAGES)), flush=True)


def send() -> None:
    grant = load_grant(sys.stdin.readline())
    transport = make_transport()
    sender = KvSender(transport, WallClock(), lambda s, report: None, link_speed=lambda peer: 1.0)  # layer by layer
    sender.open(grant.session_id, len(PAGES))
    sender.granted(grant.session_id, grant)
    sender.pages_stored(grant.session_id, 0, 0, PAGES)
    print("queued", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(SessionId(sys.argv[2]))
    else:
        send()
    Event().wait(60)
