from __future__ import annotations

import socket
import struct

from kv_transfer.tcp_info import parse_tcp_info, read_tcp_info


def test_fields_are_read_from_their_places() -> None:
    data = bytearray(200)
    struct.pack_into("=I", data, 52, 1500)
    struct.pack_into("=I", data, 68, 30_000)
    struct.pack_into("=I", data, 100, 7)
    struct.pack_into("=I", data, 148, 25_000)
    struct.pack_into("=Q", data, 160, 123_456_789)
    info = parse_tcp_info(bytes(data))
    assert (info.silent_s, info.rtt_s, info.retransmits) == (1.5, 0.03, 7)
    assert (info.min_rtt_s, info.delivery_rate) == (0.025, 123_456_789.0)


def test_a_connection_that_had_no_acknowledgement_has_no_smallest_round_trip() -> None:
    data = bytearray(168)
    struct.pack_into("=I", data, 148, 0xFFFFFFFF)
    assert parse_tcp_info(bytes(data)).min_rtt_s is None


def test_the_kernel_of_this_machine_gives_what_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as here, server.accept()[0] as there:
            for _ in range(3):
                here.sendall(b"ping")
                there.recv(4, socket.MSG_WAITALL)
                there.sendall(b"pong")
                here.recv(4, socket.MSG_WAITALL)
            info = read_tcp_info(here)
    assert 0 < info.rtt_s < 1
    assert info.min_rtt_s is not None
    assert info.min_rtt_s <= info.rtt_s * 10
    assert info.silent_s < 10
    assert info.retransmits == 0
