"""What does Linux know of a TCP connection? ``struct tcp_info``, parsed.

Offsets are those of include/uapi/linux/tcp.h: the struct only ever grows at its end. A kernel that gives less than is
read here is too old (``delivery_rate`` came with 4.9).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_LAST_DATA_RECV, _RTT, _TOTAL_RETRANS, _MIN_RTT = 52, 68, 100, 148  # u32 each
_DELIVERY_RATE = 160  # u64
_SIZE = 168


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """One connection, now."""

    rtt_s: float  # smoothed
    min_rtt_s: float | None  # None: nothing was acknowledged yet
    delivery_rate: float  # bytes/s, the kernel's newest estimate; 0: none yet
    retransmits: int  # segments sent again since the connection was made
    silent_s: float  # since the last byte of the peer came


def parse_tcp_info(data: bytes) -> TcpInfo:
    """``data``: what getsockopt(TCP_INFO) gave, at least 168 bytes."""
    assert len(data) >= _SIZE, "Linux 4.9 or later"

    def number(offset: int) -> int:
        value: int = struct.unpack_from("=I", data, offset)[0]
        return value

    min_rtt_us = number(_MIN_RTT)
    return TcpInfo(
        rtt_s=number(_RTT) / 1e6,
        min_rtt_s=None if min_rtt_us == 0xFFFFFFFF else min_rtt_us / 1e6,
        delivery_rate=float(struct.unpack_from("=Q", data, _DELIVERY_RATE)[0]),
        retransmits=number(_TOTAL_RETRANS),
        silent_s=number(_LAST_DATA_RECV) / 1e3,
    )


def read_tcp_info(connection: socket.socket) -> TcpInfo:
    """Raises OSError when the socket is closed."""
    return parse_tcp_info(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
