"""Which slot of a staging ring is whose, and how do a pool's scattered bytes get into one and out of it?

Hardware moves a few large pieces well and many small ones badly: a write of 256 MiB between two GPUs reached 196 GB/s
in 16 descriptors, 7.5 GB/s in 4,096. So a transport that writes into a peer's memory gathers many strips into one slot
of a ring, sends the slot as one piece, and the peer scatters it. Nothing remote ever writes into pages.

    sending end    pool --gather--> slot i ==one write==> slot i --scatter--> pool    receiving end
                                      ^______________ credit i ________________|

Invariants: a slot has one holder at a time, and who finds none free waits: so slots bound both the memory and what is
on the way. Bytes of a slot are a payload as transport.py defines it: layer after layer, strips in order.

The ring of a pool in host memory is here; staging_device.py has the one for device memory.
"""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from kv_transfer.transport import Region, Span, Strip, Write

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


NUM_SLOTS = 4
HOST_MIB, SMALL_DEVICE_MIB, LARGE_DEVICE_MIB = 64, 256, 512  # of a whole ring
LARGE_DEVICE_BYTES = 64 << 30  # a device with so much memory has 512 MiB to spare for each peer


class Slots:
    """Which of ``num_slots`` slots are free. For one thread."""

    def __init__(self, num_slots: int) -> None:
        self._free = deque(range(num_slots))
        self._held: set[int] = set()

    @property
    def num_held(self) -> int:
        return len(self._held)

    def take(self) -> int | None:
        """The slot that was free longest; None: there is none."""
        if not self._free:
            return None
        slot = self._free.popleft()
        self._held.add(slot)
        return slot

    def give_back(self, slot: int) -> bool:
        """The holder needs the slot no more. False, changing nothing: nobody holds it."""
        if slot not in self._held:
            return False
        self._held.discard(slot)
        self._free.append(slot)
        return True


def pieces_of(write: Write, max_bytes: int) -> Iterator[Write]:
    """``write`` in pieces of at most ``max_bytes`` payload bytes each, which together put the same bytes there."""
    if write.layer_bytes <= max_bytes:
        layers_each = max_bytes // write.layer_bytes
        for first in range(write.first_layer, write.layers.stop, layers_each):
            yield replace(write, first_layer=first, num_layers=min(layers_each, write.layers.stop - first))
        return
    for layer in write.layers:
        for strips in _shares_of(write.strips, max_bytes):
            yield replace(write, first_layer=layer, num_layers=1, strips=strips)


def _shares_of(strips: Sequence[Strip], max_bytes: int) -> Iterator[tuple[Strip, ...]]:
    share: list[Strip] = []
    room = max_bytes
    for strip in strips:
        done = 0
        while done < strip.num_bytes:
            count = min(room, strip.num_bytes - done)
            share.append(Strip(strip.src + done, strip.dst + done, count))
            done += count
            room -= count
            if room == 0:
                yield tuple(share)
                share, room = [], max_bytes
    if share:
        yield tuple(share)


class Copy(Protocol):
    """A copy that was begun, as a CUDA event tells of it."""

    def query(self) -> bool:
        """Are all bytes there?"""
        ...

    def synchronize(self) -> None:
        """Return when they are."""
        ...


class _Copied:
    """What was done at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


COPIED: Copy = _Copied()


class Ring(Protocol):
    """``num_slots`` slots of ``slot_bytes`` bytes, one behind the other. ``slot`` is held by the caller throughout."""

    num_slots: int
    slot_bytes: int
    address: int
    device: int | None  # ordinal of the device that holds it; None: host memory

    def gather(self, slot: int, writes: Sequence[Write]) -> Copy:
        """Begin to copy the writes' source bytes into the slot, one payload behind the other."""
        ...

    def scatter(self, slot: int, parts: Sequence[tuple[int, range, Sequence[Span]]]) -> Copy:
        """Begin to copy each (offset of a payload in the slot, layers, spans) into the pool."""
        ...

    def payload(self, slot: int, offset: int, num_bytes: int) -> memoryview | None:
        """Bytes of the slot, uncopied; None where the host cannot read them."""
        ...


class StagedRegion(Region):
    """A pool in memory that needs kernels of its own to be gathered and scattered."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """Memory of the device, bytes; 0: it is the host's after all (tests)."""

    @abstractmethod
    def make_ring(self, num_slots: int, slot_bytes: int) -> Ring:
        """A new ring in the pool's own memory."""

    @abstractmethod
    def bind_thread(self) -> None:
        """Make the calling thread one that works on this memory's device."""


class HostRing:
    """A ring in host memory, for a pool in host memory."""

    device: int | None = None

    def __init__(self, region: Region, num_slots: int, slot_bytes: int) -> None:
        import numpy as np

        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._region = region
        # Page-aligned, and the kernel's pages only once they are used.
        self._bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, num_slots * slot_bytes), dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def gather(self, slot: int, writes: Sequence[Write]) -> Copy:
        import numpy as np

        at = slot * self.slot_bytes
        for write in writes:
            with self._region.outgoing(write) as views:
                for view in views:
                    self._bytes[at : at + view.nbytes] = np.frombuffer(view, dtype=np.uint8)
                    at += view.nbytes
        assert at <= (slot + 1) * self.slot_bytes, "the writes are more than a slot holds"
        return COPIED

    def scatter(self, slot: int, parts: Sequence[tuple[int, range, Sequence[Span]]]) -> Copy:
        import numpy as np

        for offset, layers, spans in parts:
            at = slot * self.slot_bytes + offset
            with self._region.incoming(layers, spans) as views:
                for view in views:
                    np.frombuffer(view, dtype=np.uint8)[:] = self._bytes[at : at + view.nbytes]
                    at += view.nbytes
        return COPIED

    def payload(self, slot: int, offset: int, num_bytes: int) -> memoryview | None:
        start = slot * self.slot_bytes + offset
        return self._bytes.data[start : start + num_bytes]


@dataclass(frozen=True, slots=True)
class RingShape:
    """Slots of a ring, and bytes of each."""

    num_slots: int
    slot_bytes: int


def ring_shape(region: Region, staging_mib: int | None) -> RingShape:
    """Of a ring of ``staging_mib`` MiB for the region's pool; None: what suits the memory.

    While one slot is gathered another is on its way and a third is scattered. On a device that takes about as long as
    the threads of both processes need to tell each other, so slots are large there (over NVLink 64 MiB take 170 us,
    and twice as much was faster in every run: docs/adr/0009-staging-rings.md).
    """
    mib = staging_mib or _mib_for(region.device_bytes if isinstance(region, StagedRegion) else 0)
    return RingShape(NUM_SLOTS, (mib << 20) // NUM_SLOTS)


def _mib_for(device_bytes: int) -> int:
    if not device_bytes:
        return HOST_MIB
    return LARGE_DEVICE_MIB if device_bytes >= LARGE_DEVICE_BYTES else SMALL_DEVICE_MIB


def make_ring(region: Region, num_slots: int, slot_bytes: int) -> Ring:
    """A ring in the memory in which the region's pool lies."""
    if isinstance(region, StagedRegion):
        return region.make_ring(num_slots, slot_bytes)
    return HostRing(region, num_slots, slot_bytes)
