"""What runs in each of the two processes between which the GPU benchmark moves pages?

    python -m benchmarks.gpu_peer CONTROL_FD DEVICE POOL_PAGES

A ``GpuPeer`` has a pool of tensors on its device and answers the benchmark's calls (child_process.py): one end of a
link over the transport that is asked for, and hand-overs timed at the sending end. Content is a function of layer and
page, so each end knows by itself what must have arrived.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.child_process import answer_calls
from benchmarks.gpu_end import GpuEnd, HandOver
from benchmarks.kv_prompt import NUM_LAYERS, PAGE_BYTES, geometry
from core.request import SessionId
from kv_transfer.session import Grant
from kv_transfer.staging_device import DeviceRegion

_COPY_ROUNDS = 10
_WORDS = PAGE_BYTES // 4
_MIX = 2_654_435_761  # Knuth's multiplier: neighbours' content differs in every byte


class GpuPeer:
    """The process: its pool, and one end of the link that is measured."""

    def __init__(self, device: torch.device, pool_pages: int) -> None:
        self._device = device
        self._pool_pages = pool_pages
        self._layers = [torch.zeros(pool_pages, _WORDS, dtype=torch.int32, device=device) for _ in range(NUM_LAYERS)]
        self._end: GpuEnd | None = None

    def fill(self) -> None:
        """Give every page of every layer content of its own."""
        pages = torch.arange(self._pool_pages, device=self._device)
        for layer, pool in enumerate(self._layers):
            pool.copy_(_content(layer, pages))

    def open(self, transport: str, connections: int, staging_mib: int | None = None) -> None:
        """Make an end over ``transport`` with rings of that size; the one before it is closed."""
        self.close()
        region = DeviceRegion(geometry(self._pool_pages), self._layers)
        self._end = GpuEnd(region, transport, connections, staging_mib)

    def expect(self, session: str, pages: tuple[int, ...]) -> Grant:
        return self._opened.receiver.issue(SessionId(session), 0, pages)

    def move(self, session: str, pages: tuple[int, ...], grant: Grant, prefill_s: float) -> HandOver:
        """Hand ``pages`` over, a layer every ``prefill_s / NUM_LAYERS`` seconds, as a model would store them."""
        return self._opened.move(SessionId(session), pages, grant, prefill_s)

    def count_wrong(self, src_pages: tuple[int, ...], dst_pages: tuple[int, ...]) -> int:
        """How many pages do not hold here, at ``dst_pages``, what ``src_pages`` hold at the other end."""
        here, there = (torch.tensor(pages, device=self._device) for pages in (dst_pages, src_pages))
        return sum(
            int((pool[here] != _content(layer, there)).any(dim=1).sum()) for layer, pool in enumerate(self._layers)
        )

    def wipe(self) -> None:
        for pool in self._layers:
            pool.zero_()
        _wait_for(self._device)

    def copy_to(self, device: str, num_bytes: int) -> float:
        """Seconds of one plain copy of ``num_bytes`` bytes to ``device``, of the fastest of several."""
        source = torch.ones(num_bytes, dtype=torch.uint8, device=self._device)
        target = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        times = []
        for _ in range(_COPY_ROUNDS):
            _wait_for(self._device, target.device)
            began = time.perf_counter()
            target.copy_(source)
            _wait_for(self._device, target.device)
            times.append(time.perf_counter() - began)
        return min(times)

    def close(self) -> None:
        if self._end is not None:
            self._end.close()
            self._end = None

    @property
    def _opened(self) -> GpuEnd:
        assert self._end is not None, "open comes first"
        return self._end


def _content(layer: int, pages: torch.Tensor) -> torch.Tensor:
    """What the pages of a layer hold, int32 [len(pages), words of a page]."""
    words = torch.arange(_WORDS, device=pages.device)
    numbers = (pages[:, None] * NUM_LAYERS + layer) * _WORDS + words[None, :]
    return ((numbers * _MIX) & 0x7FFF_FFFF).to(torch.int32)


def _wait_for(*devices: torch.device) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def main(arguments: Sequence[str]) -> int:
    control_fd, device, pool_pages = arguments
    peer = GpuPeer(torch.device(device), int(pool_pages))
    answer_calls(int(control_fd), peer)
    peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
