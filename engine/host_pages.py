"""Where do the pages of the host tier lie, and how are they copied from and to the device's? One run of bytes a page.

    one slot   every layer's bytes of a page, in the layers' order: a file holds the same

On a GPU the memory is pinned, and copies run on streams of their own beside the model's kernels:

    down   layers --gather--> rows of a device buffer --copy--> slots      up   slots --copy--> rows --scatter--> layers

Layers are gathered into whole pages first, because a copy of a page's few KiB of one layer costs more than it moves; of
slots that are neighbours one copy is made. Two buffers take turns, so that kernels hide behind copies.

Invariants: a copy begins after whatever the engine had launched when it was asked for (``mark``), on the device; when
``save`` or ``load`` returns, the copies have been made. Both are called by one thread, the mover's.
On a CPU everything is a plain copy by numpy: torch would start a second pool of OpenMP threads for the mover's thread,
which slows down the engine's steps (engine_thread.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray

from core.clock import WallClock
from engine.page_pool import PagePool

logger = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20  # of each of the two buffers on the device
_ELEMENTS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class HostPages:
    """``num_slots`` pages of host memory beside a pool."""

    def __init__(self, pool: PagePool, num_slots: int) -> None:
        layout = pool.layout
        sizes = [layout.page_bytes(index) for index in range(layout.num_layers)]
        self.page_bytes = sum(sizes)
        self.num_slots = num_slots
        self.pinned = False
        self._device = pool.pages(0).device  # with its number
        self._memory = torch.empty(num_slots, self.page_bytes, dtype=torch.uint8)
        self._bytes: NDArray[np.uint8] = self._memory.numpy()
        ends = np.cumsum(sizes).tolist()
        self._spans = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]  # of a layer within a slot
        layers = [pool.pages(index).view(torch.uint8) for index in range(layout.num_layers)]
        if self._device.type == "cpu":
            self._host_layers: list[NDArray[np.uint8]] = [layer.numpy() for layer in layers]
        else:
            self._gpu = _GpuCopies(self._device, layers, self._spans, self._memory)
            self._pin()

    def slot(self, index: int) -> NDArray[np.uint8]:
        """One slot's bytes."""
        row: NDArray[np.uint8] = self._bytes[index]
        return row

    def mark(self) -> torch.cuda.Event | None:
        """A moment on the calling thread's stream, after all that it has launched."""
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def bind_thread(self) -> None:
        """To be called first by the thread that copies."""
        if self._device.type != "cpu":
            torch.cuda.set_device(self._device)

    def save(self, page_ids: Sequence[int], slots: Sequence[int], after: torch.cuda.Event | None) -> None:
        """Copy pages of the device into slots."""
        if self._device.type != "cpu":
            self._gpu.save(page_ids, slots, after)
            return
        pages, rows = np.array(page_ids), np.array(slots)
        for layer, (start, end) in zip(self._host_layers, self._spans, strict=True):
            self._bytes[rows, start:end] = layer[pages]

    def load(self, slots: Sequence[int], page_ids: Sequence[int], after: torch.cuda.Event | None) -> None:
        """Copy slots into pages of the device."""
        if self._device.type != "cpu":
            self._gpu.load(slots, page_ids, after)
            return
        pages, rows = np.array(page_ids), np.array(slots)
        for layer, (start, end) in zip(self._host_layers, self._spans, strict=True):
            layer[pages] = self._bytes[rows, start:end]

    def measure(self, num_pages: int) -> float:
        """Bytes/s of loading so many pages, which come back as they were; before anything is stored."""
        clock = WallClock()
        self.save(range(num_pages), range(num_pages), self.mark())
        best = float("inf")
        for _ in range(2):
            began_at = clock.now()
            self.load(range(num_pages), range(num_pages), self.mark())
            best = min(best, clock.now() - began_at)
        return num_pages * self.page_bytes / max(best, 1e-9)

    def close(self) -> None:
        """Unpin; nothing is copied any more."""
        if self.pinned:
            self.pinned = False
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())

    def _pin(self) -> None:
        clock = WallClock()
        began_at = clock.now()
        # Not pin_memory: torch's allocator of pinned memory takes the next power of two, up to twice what was asked.
        error = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0))
        self.pinned = error == 0
        if self.pinned:
            logger.info("host cache: %d bytes pinned in %.1f s", self._memory.nbytes, clock.now() - began_at)
        else:
            logger.warning("host cache: %d bytes are not pinned (CUDA error %d): slower", self._memory.nbytes, error)


class _GpuCopies:
    """The streams and buffers of one device. One thread."""

    def __init__(
        self,
        device: torch.device,
        layers: Sequence[torch.Tensor],
        spans: Sequence[tuple[int, int]],
        memory: torch.Tensor,
    ) -> None:
        """``layers``: [num_pages, bytes of the layer's page]; ``spans``: where those are in a slot."""
        page_bytes = memory.shape[1]
        size, dtype = next(e for e in _ELEMENTS if gcd(*(end for _, end in spans)) % e[0] == 0)
        self._device = device
        self._layers = [layer.view(dtype) for layer in layers]
        self._spans = [(start // size, end // size) for start, end in spans]
        self._memory = memory
        self._num_rows = max(1, min(STAGING_BYTES // page_bytes, memory.shape[0]))
        self._bytes = [torch.empty(self._num_rows, page_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._rows = [buffer.view(dtype) for buffer in self._bytes]
        self._copying, self._kernels = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def save(self, page_ids: Sequence[int], slots: Sequence[int], after: torch.cuda.Event | None) -> None:
        _wait(self._kernels, after)
        free: list[torch.cuda.Event | None] = [None, None]  # when a buffer's rows were copied out
        for turn, (pages, rows) in enumerate(self._parts(page_ids, slots)):
            buffer, out = self._rows[turn % 2], self._bytes[turn % 2]
            with torch.cuda.stream(self._kernels):
                _wait(self._kernels, free[turn % 2])
                index = self._index(pages)
                for layer, (start, end) in zip(self._layers, self._spans, strict=True):
                    buffer[: len(pages), start:end] = layer[index]
                gathered = _event(self._kernels)
            with torch.cuda.stream(self._copying):
                self._copying.wait_event(gathered)
                for first, slot, count in _runs(rows):
                    self._memory[slot : slot + count].copy_(out[first : first + count], non_blocking=True)
                free[turn % 2] = _event(self._copying)
        self._copying.synchronize()

    def load(self, slots: Sequence[int], page_ids: Sequence[int], after: torch.cuda.Event | None) -> None:
        _wait(self._copying, after)
        _wait(self._kernels, after)
        free: list[torch.cuda.Event | None] = [None, None]  # when a buffer's rows were scattered
        for turn, (pages, rows) in enumerate(self._parts(page_ids, slots)):
            buffer, into = self._rows[turn % 2], self._bytes[turn % 2]
            with torch.cuda.stream(self._copying):
                _wait(self._copying, free[turn % 2])
                for first, slot, count in _runs(rows):
                    into[first : first + count].copy_(self._memory[slot : slot + count], non_blocking=True)
                copied = _event(self._copying)
            with torch.cuda.stream(self._kernels):
                index = self._index(pages)
                self._kernels.wait_event(copied)
                for layer, (start, end) in zip(self._layers, self._spans, strict=True):
                    layer.index_copy_(0, index, buffer[: len(pages), start:end])
                free[turn % 2] = _event(self._kernels)
        self._kernels.synchronize()

    def _parts(self, page_ids: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """As many as a buffer holds, in the order of the slots: neighbours are copied at once."""
        pairs = sorted(zip(slots, page_ids, strict=True))
        for start in range(0, len(pairs), self._num_rows):
            part = pairs[start : start + self._num_rows]
            yield [page for _, page in part], [slot for slot, _ in part]

    def _index(self, pages: Sequence[int]) -> torch.Tensor:
        return torch.tensor(pages, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position, slot, how many slots follow each other) of ascending slots."""
    start = 0
    for position in range(1, len(slots) + 1):
        if position == len(slots) or slots[position] != slots[position - 1] + 1:
            yield start, slots[start], position - start
            start = position


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _wait(stream: torch.cuda.Stream, event: torch.cuda.Event | None) -> None:
    if event is not None:
        stream.wait_event(event)
