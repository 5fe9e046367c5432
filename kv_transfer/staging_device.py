"""How do bytes of a pool in device memory get to a wire and back, while the model computes on the same device?

    to a socket   pool --gather kernel--> device buffer --copy--> pinned host buffer   (``outgoing``, ``incoming``)
    to NIXL       pool --gather kernel--> slot of a ring in device memory              (``DeviceRing``)

Each thread that sends or receives has a stream and buffers of its own, so the stages of different connections overlap
with each other and with the model's kernels. Invariants:

- ``layer_stored`` comes when a layer's kernels were launched, not when they have run. So KvSender marks the layer then
  (``mark``), which records an event on the stream that is current there, and whoever gathers that layer waits for the
  newest mark of it, on the device. Kernels of later layers are not waited for; a chunk that is gathered late may wait
  for the next chunk's kernels of the same layer, which costs time and never bytes.
- When ``outgoing`` yields, and ``incoming`` or a ring's ``gather`` or ``scatter`` returns, their kernels have run.

It works on CPU tensors too, without streams and pinned memory: so it is tested byte for byte where there is no GPU.
The one module of kv_transfer that imports torch; who hands it tensors has loaded that already.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch

from kv_transfer.staging import Ring, StagedRegion
from kv_transfer.transport import PageGeometry, Span, Write

MIN_ROW_BYTES = 64  # below it an index entry costs as much as what it moves: copy strip by strip
_ELEMENTS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


@dataclass(eq=False, slots=True)
class _Stage:
    """One thread's stream and buffers, which grow to the largest payload that it moved."""

    stream: torch.cuda.Stream | None  # None: the pool is in host memory
    host: torch.Tensor
    device: torch.Tensor


class DeviceRegion(StagedRegion):
    """The memory of one page pool as tensors, one for each layer."""

    def __init__(self, geometry: PageGeometry, layers: Sequence[torch.Tensor]) -> None:
        """``layers[i]``: contiguous, of any dtype, ``num_pages * page_bytes`` bytes; all on one device."""
        assert len(layers) == geometry.num_layers, "one tensor for each layer"
        for layer, pages in zip(layers, geometry.layers, strict=True):
            assert layer.is_contiguous(), "a layer's memory is one run of bytes"
            assert layer.nbytes == geometry.num_pages * pages.page_bytes, "a layer's tensor is not the geometry's size"
            assert layer.device == layers[0].device, "a pool is on one device"
        self.geometry = geometry
        self.device = layers[0].device
        self._tensors = tuple(layer.view(-1).view(torch.uint8) for layer in layers)
        self._stored: list[torch.cuda.Event | None] = [None] * len(layers)  # newest mark of each layer
        self._marking = threading.Lock()  # marks replace each other in the order in which they were recorded
        self._stages = threading.local()

    @property
    def is_host(self) -> bool:
        return self.device.type == "cpu"

    def layer_bytes(self, layer: int) -> int:
        return self._tensors[layer].nbytes

    def bytes_at(self, layer: int, offset: int, num_bytes: int) -> memoryview:
        raise AssertionError("device memory has no host view: outgoing and incoming lend copies")

    def mark(self, layer: int) -> None:
        if not self.is_host:
            event = torch.cuda.Event()
            with self._marking:
                event.record(torch.cuda.current_stream(self.device))
                self._stored[layer] = event

    @contextmanager
    def outgoing(self, write: Write) -> Iterator[list[memoryview]]:
        stage = self._stage(write.num_bytes)
        host = stage.host[: write.num_bytes]
        with self.kernels(write.layers):
            device = stage.device[: write.num_bytes]
            self.gather((write,), device)
            if not self.is_host:
                host.copy_(device, non_blocking=True)
        yield [host.numpy().data]

    @contextmanager
    def incoming(self, layers: range, spans: Sequence[Span]) -> Iterator[list[memoryview]]:
        num_bytes = len(layers) * sum(span.num_bytes for span in spans)
        stage = self._stage(num_bytes)
        host, device = stage.host[:num_bytes], stage.device[:num_bytes]
        yield [host.numpy().data]
        with self.kernels():
            if not self.is_host:
                device.copy_(host, non_blocking=True)
            self.scatter(device, layers, spans)

    def make_ring(self, num_slots: int, slot_bytes: int) -> Ring:
        return DeviceRing(self, num_slots, slot_bytes)

    def bind_thread(self) -> None:
        if not self.is_host:
            torch.cuda.set_device(self.device)
            torch.cuda.synchronize()  # makes the device's context, which UCX looks for

    @contextmanager
    def kernels(self, layers: Iterable[int] = ()) -> Iterator[None]:
        """What is launched within runs on the thread's stream, behind the marks of ``layers``, and has run at last."""
        stream = self._stage(0).stream
        if stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            for layer in layers:
                event = self._stored[layer]
                if event is not None:
                    stream.wait_event(event)
            yield
        stream.synchronize()

    def gather(self, writes: Sequence[Write], out: torch.Tensor) -> None:
        """Copy the writes' source bytes into ``out`` (uint8), one payload behind the other. Only launches kernels."""
        base, at = int(out.storage_offset()), 0
        for write in writes:
            rows = self._rows(write.layers, [(strip.src, strip.num_bytes) for strip in write.strips], base + at)
            for layer in write.layers:
                rows.gather(self._tensors[layer], out[at : at + rows.num_bytes])
                at += rows.num_bytes

    def scatter(self, payload: torch.Tensor, layers: range, spans: Sequence[Span]) -> None:
        """Copy ``payload`` (uint8) into the pool. Only launches kernels."""
        rows = self._rows(layers, [(span.offset, span.num_bytes) for span in spans], int(payload.storage_offset()))
        for i, layer in enumerate(layers):
            rows.scatter(payload[i * rows.num_bytes : (i + 1) * rows.num_bytes], self._tensors[layer])

    def _rows(self, layers: range, runs: list[tuple[int, int]], at: int) -> _Rows:
        """``at``: where the payload begins in its buffer: rows are aligned there too."""
        row_bytes = gcd(at, *(self.layer_bytes(layer) for layer in layers), *(number for run in runs for number in run))
        return _Rows(runs, row_bytes, self.device)

    def _stage(self, num_bytes: int) -> _Stage:
        """The calling thread's, with buffers of at least ``num_bytes``."""
        stage: _Stage | None = getattr(self._stages, "stage", None)
        if stage is None:
            stream = None if self.is_host else torch.cuda.Stream(self.device)
            nothing = torch.empty(0, dtype=torch.uint8)
            stage = self._stages.stage = _Stage(stream, nothing, nothing)
        if stage.host.nbytes < num_bytes:
            stage.host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=not self.is_host)
            stage.device = stage.host if self.is_host else torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return stage


class _Rows:
    """Runs of a layer's bytes as rows of one size: the largest that divides every offset and every length."""

    def __init__(self, runs: list[tuple[int, int]], row_bytes: int, device: torch.device) -> None:
        """``runs``: (offset, bytes)."""
        self.num_bytes = sum(num_bytes for _, num_bytes in runs)
        self._runs = runs
        self._width, self._dtype = next((row_bytes // size, kind) for size, kind in _ELEMENTS if row_bytes % size == 0)
        self._index: torch.Tensor | None = None
        if len(runs) > 1 and row_bytes >= MIN_ROW_BYTES:
            firsts, counts = (np.array(column, dtype=np.int64) // row_bytes for column in zip(*runs, strict=True))
            ends = np.cumsum(counts)
            index = np.repeat(firsts - ends + counts, counts) + np.arange(ends[-1])
            self._index = torch.from_numpy(index).to(device, non_blocking=True)

    def gather(self, layer: torch.Tensor, out: torch.Tensor) -> None:
        if self._index is not None:
            torch.index_select(self._as_rows(layer), 0, self._index, out=self._as_rows(out))
            return
        at = 0
        for offset, num_bytes in self._runs:
            out[at : at + num_bytes].copy_(layer[offset : offset + num_bytes])
            at += num_bytes

    def scatter(self, payload: torch.Tensor, layer: torch.Tensor) -> None:
        if self._index is not None:
            self._as_rows(layer).index_copy_(0, self._index, self._as_rows(payload))
            return
        at = 0
        for offset, num_bytes in self._runs:
            layer[offset : offset + num_bytes].copy_(payload[at : at + num_bytes])
            at += num_bytes

    def _as_rows(self, data: torch.Tensor) -> torch.Tensor:
        return data.view(self._dtype).view(-1, self._width)


class DeviceRing:
    """A ring in the memory of a ``DeviceRegion``'s device."""

    def __init__(self, region: DeviceRegion, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._region = region
        self._bytes = torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=region.device)
        self.address = self._bytes.data_ptr()
        self.device = None if region.is_host else self._bytes.get_device()

    def gather(self, slot: int, writes: Sequence[Write]) -> None:
        with self._region.kernels({layer for write in writes for layer in write.layers}):
            self._region.gather(writes, self._slot(slot))

    def scatter(self, slot: int, parts: Sequence[tuple[int, range, Sequence[Span]]]) -> None:
        with self._region.kernels():
            for offset, layers, spans in parts:
                num_bytes = len(layers) * sum(span.num_bytes for span in spans)
                self._region.scatter(self._slot(slot)[offset : offset + num_bytes], layers, spans)

    def payload(self, slot: int, offset: int, num_bytes: int) -> memoryview | None:
        if self.device is not None:
            return None
        return self._slot(slot)[offset : offset + num_bytes].numpy().data

    def _slot(self, slot: int) -> torch.Tensor:
        return self._bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]
