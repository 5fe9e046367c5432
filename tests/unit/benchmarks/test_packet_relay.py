"""The relay holds each packet, keeps their order and drops what it is told to; over socket pairs, without a device."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from benchmarks.packet_relay import MAX_PACKET_BYTES, PacketRelay


@contextmanager
def relaying(delay_s: float, loss: float = 0.0) -> Iterator[tuple[socket.socket, socket.socket, PacketRelay]]:
    """A socket to put packets in, one that they come out of, and the relay between them."""
    inlet, source = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    target, outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stop, stopper = os.pipe()
    relay = PacketRelay(source.fileno(), target.fileno(), delay_s, loss)
    thread = Thread(target=relay.run, args=(stop,))
    with inlet, source, target, outlet:
        outlet.settimeout(20)
        thread.start()
        try:
            yield inlet, outlet, relay
        finally:
            os.close(stopper)
            thread.join()
            os.close(stop)


def test_packets_come_out_whole_in_order_and_late() -> None:
    packets = [os.urandom(num_bytes) for num_bytes in (1, 1500, 65536, 40)]
    with relaying(delay_s=0.05) as (inlet, outlet, _):
        began_at = time.perf_counter()
        for packet in packets:
            inlet.send(packet)
        arrived = [outlet.recv(MAX_PACKET_BYTES)]
        first_s = time.perf_counter() - began_at
        arrived += [outlet.recv(MAX_PACKET_BYTES) for _ in packets[1:]]

    assert arrived == packets
    assert first_s >= 0.05


def test_a_share_of_the_packets_is_lost() -> None:
    with relaying(delay_s=0.0, loss=0.5) as (inlet, outlet, relay):
        for number in range(200):
            inlet.send(bytes([number]))
        arrived = [outlet.recv(1)[0]]
        while len(arrived) + relay.num_dropped < 200:
            arrived.append(outlet.recv(1)[0])

    assert 50 < relay.num_dropped < 150
    assert arrived == sorted(arrived)
