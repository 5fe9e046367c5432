"""How do bytes of a pool in device memory get to a wire and back, while the model computes on the same device?

    to a socket   pool --gather kernel--> device buffer --copy--> pinned host buffer   (``outgoing``, ``incoming``)
    to NIXL       pool --gather kernel--> slot of a ring in device memory              (``DeviceRing``)

Each thread that sends to sockets or receives from them has a stream and buffers of its own, each ring a stream, so what
different connections move overlaps with each other and with the model's kernels. Invariants:

- ``layer_stored`` comes when a layer's kernels were launched, not when they have run. So KvSender marks the layer then
  (``mark``), which records an event on the stream that is current there, and whoever gathers that layer waits for the
  newest mark of it, on the device. Kernels of later layers are not waited for; a chunk that is gathered late may wait
  for the next chunk's kernels of the same layer, which costs time and never bytes.
- When ``outgoing`` yields, ``incoming`` returns, or the ``Copy`` that a ring's ``gather`` or ``scatter`` began says so,
  their kernels have run.

It works on CPU tensors too, without streams and pinned memory: so it is tested byte for byte where there is no GPU.
The one module of kv_transfer that imports torch; who hands it tensors has loaded that already.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray

from kv_transfer.spans import Spans, num_bytes_of, spans_of
from kv_transfer.staging import COPIED, Copy, Ring, StagedRegion
from kv_transfer.transport import HOST_PIECES, PageGeometry, PieceLimits, Span, Strips, Write

MIN_ROW_BYTES = 64  # below it an index entry costs as much as what it moves: copy strip by strip
DEVICE_PIECES = PieceLimits(4 << 20, 4096)  # kernels, copies and their launches cost as much for a few KiB
MAX_REMEMBERED = 64  # tables of rows, of each stream
_ELEMENTS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


@dataclass(eq=False, slots=True)
class _Stage:
    """A stream, and buffers for those who go by way of the host, which grow to the largest payload that they moved."""

    stream: torch.cuda.Stream | None  # None: the pool is in host memory
    host: torch.Tensor
    device: _Buffer
    # id of a table of runs |-> the table, which keeps the id its own, and its rows: layers share tables
    rows: dict[int, tuple[Strips | Spans, _Rows]] = field(default_factory=dict)

    def launched(self) -> Copy:
        """All that was launched on the stream by now."""
        if self.stream is None:
            return COPIED
        event = torch.cuda.Event()
        event.record(self.stream)
        return event


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
        self._buffers = tuple(_Buffer(layer.view(-1).view(torch.uint8)) for layer in layers)
        self._alignment = gcd(*(layer.nbytes for layer in layers))
        self._stored: list[torch.cuda.Event | None] = [None] * len(layers)  # newest mark of each layer
        self._marking = threading.Lock()  # marks replace each other in the order in which they were recorded
        self._stages = threading.local()

    @property
    def is_host(self) -> bool:
        """Is the memory the host's?"""
        return self.device.type == "cpu"

    @property
    def pieces(self) -> PieceLimits:
        return HOST_PIECES if self.is_host else DEVICE_PIECES

    def layer_bytes(self, layer: int) -> int:
        return self._buffers[layer].bytes.nbytes

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
        stage = self._stage_of_thread(write.num_bytes)
        host = stage.host[: write.num_bytes]
        with self.launches(stage, write.layers):
            self.gather(stage, (write,), stage.device, 0)
            if not self.is_host:
                host.copy_(stage.device.bytes[: write.num_bytes], non_blocking=True)
        stage.launched().synchronize()
        yield [host.numpy().data]

    @contextmanager
    def incoming(self, layers: range, spans: Sequence[Span]) -> Iterator[list[memoryview]]:
        num_bytes = len(layers) * num_bytes_of(spans)
        stage = self._stage_of_thread(num_bytes)
        host = stage.host[:num_bytes]
        yield [host.numpy().data]
        with self.launches(stage):
            if not self.is_host:
                stage.device.bytes[:num_bytes].copy_(host, non_blocking=True)
            self.scatter(stage, stage.device, 0, layers, spans)
        stage.launched().synchronize()

    @property
    def device_bytes(self) -> int:
        return 0 if self.is_host else int(torch.cuda.get_device_properties(self.device).total_memory)

    def make_ring(self, num_slots: int, slot_bytes: int) -> Ring:
        return DeviceRing(self, num_slots, slot_bytes)

    def bind_thread(self) -> None:
        if not self.is_host:
            torch.cuda.set_device(self.device)
            torch.cuda.synchronize()  # makes the device's context, which UCX looks for

    def new_stage(self) -> _Stage:
        """A stream, and what is kept for those who launch on it; for one thread at a time."""
        nothing = torch.empty(0, dtype=torch.uint8)
        return _Stage(None if self.is_host else torch.cuda.Stream(self.device), nothing, _Buffer(nothing))

    @contextmanager
    def launches(self, stage: _Stage, layers: Iterable[int] = ()) -> Iterator[None]:
        """What is launched within runs on the stage's stream, behind the marks of ``layers``."""
        if stage.stream is None:
            yield
            return
        with torch.cuda.stream(stage.stream):
            for layer in layers:
                event = self._stored[layer]
                if event is not None:
                    stage.stream.wait_event(event)
            yield

    def gather(self, stage: _Stage, writes: Sequence[Write], out: _Buffer, at: int) -> None:
        """Copy the writes' source bytes into ``out`` from ``at`` on, one payload behind the other. Only launches
        kernels."""
        for write in writes:
            rows = self._rows(stage, write.table, at)
            for layer in write.layers:
                rows.gather(self._buffers[layer], out, at)
                at += rows.num_bytes

    def scatter(self, stage: _Stage, payload: _Buffer, at: int, layers: range, spans: Sequence[Span]) -> None:
        """Copy what lies in ``payload`` from ``at`` on into the pool. Only launches kernels."""
        rows = self._rows(stage, spans_of(spans), at)
        for layer in layers:
            rows.scatter(payload, at, self._buffers[layer])
            at += rows.num_bytes

    def _rows(self, stage: _Stage, table: Strips | Spans, at: int) -> _Rows:
        """``at``: where the payload begins in its buffer: rows are aligned there too."""
        alignment = gcd(at, self._alignment)
        remembered = stage.rows.get(id(table))
        if remembered is not None and alignment % remembered[1].row_bytes == 0:
            return remembered[1]
        offsets, sizes = table.rows[:, 0], table.rows[:, -1]
        row_bytes = gcd(alignment, int(np.gcd.reduce(offsets)), int(np.gcd.reduce(sizes)))
        rows = _Rows(offsets, sizes, row_bytes, self.device)
        if len(stage.rows) == MAX_REMEMBERED:
            stage.rows.clear()
        stage.rows[id(table)] = (table, rows)
        return rows

    def _stage_of_thread(self, num_bytes: int) -> _Stage:
        """The calling thread's, with buffers of at least ``num_bytes``."""
        stage: _Stage | None = getattr(self._stages, "stage", None)
        if stage is None:
            stage = self._stages.stage = self.new_stage()
        if stage.host.nbytes < num_bytes:
            stage.host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=not self.is_host)
            on_device = (
                torch.empty(num_bytes, dtype=torch.uint8, device=self.device) if not self.is_host else stage.host
            )
            stage.device = _Buffer(on_device)
        return stage


class _Buffer:
    """A run of bytes, and its views as rows: every call of torch lets other threads run first, so views are kept."""

    def __init__(self, data: torch.Tensor) -> None:
        self.bytes = data  # uint8
        self._views: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}

    def rows(self, at: int, num_bytes: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """``num_bytes`` bytes from ``at`` on as [rows, width] of ``dtype``."""
        key = (at, num_bytes, width, dtype)
        view = self._views.get(key)
        if view is None:
            view = self.bytes[at : at + num_bytes].view(dtype).view(-1, width)
            if len(self._views) >= MAX_REMEMBERED:
                self._views = {}
            self._views[key] = view
        return view


class _Rows:
    """Runs of a layer's bytes as rows of one size: the largest that divides every offset and every length."""

    def __init__(
        self, offsets: NDArray[np.int64], sizes: NDArray[np.int64], row_bytes: int, device: torch.device
    ) -> None:
        """``offsets`` and ``sizes`` of the runs, in bytes."""
        self.num_bytes = int(sizes.sum())
        self.row_bytes = row_bytes
        self._runs = (offsets, sizes)
        self._width, self._dtype = next((row_bytes // size, kind) for size, kind in _ELEMENTS if row_bytes % size == 0)
        self._index: torch.Tensor | None = None
        if len(sizes) > 1 and row_bytes >= MIN_ROW_BYTES:
            index = offsets // row_bytes
            if self.num_bytes != len(sizes) * row_bytes:  # runs of several rows
                counts = sizes // row_bytes
                ends = np.cumsum(counts)
                index = np.repeat(index - ends + counts, counts) + np.arange(ends[-1])
            self._index = torch.from_numpy(index).to(device, non_blocking=True)

    def gather(self, layer: _Buffer, out: _Buffer, at: int) -> None:
        if self._index is not None:
            torch.index_select(self._all_of(layer), 0, self._index, out=self._payload(out, at))
            return
        for offset, num_bytes in self._one_by_one():
            out.bytes[at : at + num_bytes].copy_(layer.bytes[offset : offset + num_bytes])
            at += num_bytes

    def scatter(self, payload: _Buffer, at: int, layer: _Buffer) -> None:
        if self._index is not None:
            self._all_of(layer).index_copy_(0, self._index, self._payload(payload, at))
            return
        for offset, num_bytes in self._one_by_one():
            layer.bytes[offset : offset + num_bytes].copy_(payload.bytes[at : at + num_bytes])
            at += num_bytes

    def _one_by_one(self) -> Iterator[tuple[int, int]]:
        offsets, sizes = self._runs
        return zip(offsets.tolist(), sizes.tolist(), strict=True)

    def _all_of(self, layer: _Buffer) -> torch.Tensor:
        return layer.rows(0, layer.bytes.nbytes, self._width, self._dtype)

    def _payload(self, buffer: _Buffer, at: int) -> torch.Tensor:
        return buffer.rows(at, self.num_bytes, self._width, self._dtype)


class DeviceRing:
    """A ring in the memory of a ``DeviceRegion``'s device."""

    def __init__(self, region: DeviceRegion, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._region = region
        self._stage = region.new_stage()
        self._buffer = _Buffer(torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=region.device))
        self.address = self._buffer.bytes.data_ptr()
        self.device = None if region.is_host else self._buffer.bytes.get_device()

    def gather(self, slot: int, writes: Sequence[Write]) -> Copy:
        with self._region.launches(self._stage, {layer for write in writes for layer in write.layers}):
            self._region.gather(self._stage, writes, self._buffer, slot * self.slot_bytes)
        return self._stage.launched()

    def scatter(self, slot: int, parts: Sequence[tuple[int, range, Sequence[Span]]]) -> Copy:
        with self._region.launches(self._stage):
            for offset, layers, spans in parts:
                self._region.scatter(self._stage, self._buffer, slot * self.slot_bytes + offset, layers, spans)
        return self._stage.launched()

    def payload(self, slot: int, offset: int, num_bytes: int) -> memoryview | None:
        if self.device is not None:
            return None
        start = slot * self.slot_bytes + offset
        return self._buffer.bytes[start : start + num_bytes].numpy().data
