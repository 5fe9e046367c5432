"""A peer in another process that is killed, or stopped without a word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Condition
from typing import Any

import pytest

from core.clock import WallClock
from core.errors import PeerLost
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from kv_transfer.config import KvTransferConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.session import Grant
from kv_transfer.transport import LayerPages, PageGeometry, Region, Transport, create_transport

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
A = SessionId("a")
PAGES = tuple(range(8))
LEASE_S = 1.0
PATIENCE_S = 30.0


@pytest.fixture
def peer() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "peer_process.py"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def transport() -> Iterator[Transport]:
    config = KvTransferConfig(transport="tcp", host="127.0.0.1", lease_s=LEASE_S)
    fingerprint = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
    transport = create_transport(config, fingerprint, WallClock())
    geometry = PageGeometry((LayerPages(4096), LayerPages(4096)), num_pages=8)
    transport.register(Region(geometry, tuple(memoryview(bytearray(8 * 4096)) for _ in geometry.layers)))
    yield transport
    transport.close()


class Told(Condition):
    """Waits for a callback, calling ``expire`` meanwhile as a worker would."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Any] = []

    def tell(self, error: Any) -> None:
        with self:
            self.errors.append(error)
            self.notify_all()

    def until_told(self, expire: Callable[[float], None]) -> Any:
        clock = WallClock()
        for _ in range(int(PATIENCE_S / 0.05)):
            expire(clock.now())
            with self:
                if self.wait_for(lambda: self.errors, 0.05):
                    return self.errors[0]
        raise AssertionError("nothing was told")


def read_grant(process: subprocess.Popen[str]) -> Grant:
    assert process.stdout is not None
    session_id, token, first_page, pages, descriptor = json.loads(process.stdout.readline())
    return Grant(session_id, bytes.fromhex(token), first_page, tuple(pages), bytes.fromhex(descriptor), LEASE_S)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_decode_worker_that_dies_or_falls_silent_costs_the_sender_its_session(
    transport: Transport, peer: Callable[..., subprocess.Popen[str]], how: signal.Signals
) -> None:
    told = Told()
    process = peer("receive", A)
    grant = read_grant(process)
    sender = KvSender(transport, WallClock(), lambda session_id, report: told.tell(report.error))
    sender.open(A, len(PAGES))
    sender.granted(A, grant)
    sender.pages_stored(A, 0, 0, PAGES)
    process.send_signal(how)
    assert isinstance(told.until_told(sender.expire), PeerLost)
    assert sender.num_sessions == 0
    sender.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_prefill_worker_that_dies_or_falls_silent_gives_the_receiver_its_pages_back(
    transport: Transport, peer: Callable[..., subprocess.Popen[str]], how: signal.Signals
) -> None:
    told = Told()
    receiver = KvReceiver(
        transport, WallClock(), lambda s, p: told.tell("committed"), lambda s, e: told.tell(e), LEASE_S * 30
    )
    grant = receiver.issue(A, 0, PAGES)
    process = peer("send")
    assert process.stdin is not None
    line = json.dumps([grant.session_id, grant.token.hex(), grant.first_page, grant.pages, grant.descriptor.hex()])
    process.stdin.write(line + "\n")
    process.stdin.flush()
    waiting = Condition()
    with waiting:
        assert any(waiting.wait_for(lambda: receiver.bytes_received == 8 * 4096, 0.05) for _ in range(600))
    process.send_signal(how)
    receiver.expire(WallClock().now())
    assert told.errors == [] or how is signal.SIGKILL
    # The lease is long so that the process may take its time to start; a stopped peer's is run out by hand.
    assert isinstance(told.until_told(lambda now: receiver.expire(now + LEASE_S * 30)), PeerLost)
    assert (receiver.num_sessions, receiver.num_quarantined) == (0, 0)
    receiver.close()
