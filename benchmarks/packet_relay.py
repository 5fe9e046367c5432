"""How is a long path made on a machine whose kernel has no ``netem``? A process that holds every packet for a while.

    python -m benchmarks.packet_relay SOURCE_FD TARGET_FD DELAY_S LOSS

Reads packets from one file descriptor and writes each to the other ``DELAY_S`` later, in order, until its standard
input ends. network_lab.py runs one for each direction between two TUN devices; a packet is what one ``read`` gives, up
to 64 KiB where the devices take segmentation offload: TCP sees the delay as round-trip time, and its congestion
control works as on a real path, at a few tens of thousands of packets a second. ``LOSS`` is the share thrown away.
"""

from __future__ import annotations

import os
import random
import select
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MAX_PACKET_BYTES = 65536 + 64  # the largest IP packet behind a virtio_net header
MAX_HELD = 4096  # beyond it packets are dropped, as by any router
READS_PER_TURN = 32


@dataclass(slots=True)
class _Held:
    due_at: float
    buffer: bytearray
    num_bytes: int


class PacketRelay:
    """One direction."""

    def __init__(self, source: int, target: int, delay_s: float, loss: float = 0.0, seed: int = 0) -> None:
        """``source`` and ``target`` are descriptors that keep packet borders; both are made non-blocking."""
        self._source = source
        self._target = target
        self._delay_s = delay_s
        self._loss = loss
        self._random = random.Random(seed)
        self._held: deque[_Held] = deque()
        self._spare: list[bytearray] = []
        self.num_dropped = 0
        os.set_blocking(source, False)
        os.set_blocking(target, False)

    def run(self, stop: int) -> None:
        """Relay until the descriptor ``stop`` is readable, or at its end."""
        while True:
            wait_s = self._forward_due(time.perf_counter())
            readable, _, _ = select.select([self._source, stop], [], [], wait_s)
            if stop in readable:
                return
            if readable:
                self._take()

    def _forward_due(self, now: float) -> float | None:
        """Write what is due; seconds until the next one is, None when nothing is held."""
        held = self._held
        while held:
            if held[0].due_at > now:
                return held[0].due_at - now
            packet = held.popleft()
            try:
                os.write(self._target, memoryview(packet.buffer)[: packet.num_bytes])
            except OSError:  # the device is full, or down: a router drops here
                self.num_dropped += 1
            self._spare.append(packet.buffer)
        return None

    def _take(self) -> None:
        """Read a handful of packets; few enough that what is due need not wait for them."""
        for _ in range(READS_PER_TURN):
            buffer = self._spare.pop() if self._spare else bytearray(MAX_PACKET_BYTES)
            try:
                num_bytes = os.readv(self._source, [buffer])
            except OSError:  # nothing more to read, or the device is down
                self._spare.append(buffer)
                return
            if len(self._held) >= MAX_HELD or (self._loss and self._random.random() < self._loss):
                self.num_dropped += 1
                self._spare.append(buffer)
            else:
                self._held.append(_Held(time.perf_counter() + self._delay_s, buffer, num_bytes))


def main(arguments: Sequence[str]) -> int:
    source, target, delay_s, loss = arguments
    PacketRelay(int(source), int(target), float(delay_s), float(loss)).run(sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
