"""On CPU tensors; tests/gpu/test_staging_on_gpu.py asks the same of device memory, and what streams add."""

from __future__ import annotations

import random
from collections.abc import Sequence
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.clock import WallClock
from core.errors import TransferError
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from kv_transfer.config import KvTransferConfig, LinkConfig
from kv_transfer.probe_pattern import digest_of, digest_there
from kv_transfer.staging import HostRing, Ring, ring_shape
from kv_transfer.staging_device import DeviceRegion, DeviceRing
from kv_transfer.transfer_plan import layout_of_pages
from kv_transfer.transport import LayerPages, PageGeometry, Region, Span, Strip, Write, create_transport

NUM_LAYERS, PAGE_BYTES, NUM_PAGES = 3, 192, 16
LAYER_BYTES = PAGE_BYTES * NUM_PAGES
GEOMETRY = PageGeometry((LayerPages(PAGE_BYTES),) * NUM_LAYERS, NUM_PAGES)


def make_tensors(seed: int | None) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(seed or 0)
    shape = (NUM_PAGES, PAGE_BYTES // 2)
    numbers = [torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=dice) for _ in range(NUM_LAYERS)]
    return [(torch.zeros_like(one) if seed is None else one).view(torch.bfloat16) for one in numbers]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


class BigDevice(DeviceRegion):
    """Says that it lies on a device of so much memory."""

    gib = 0

    @property
    def device_bytes(self) -> int:
        return self.gib << 30


def test_a_self_test_finds_the_same_bytes_in_device_and_host_memory() -> None:
    device, host, _, _ = twins(1)
    pages, layout = (5, 2, 3), layout_of_pages(GEOMETRY)
    assert digest_of(device, pages) == digest_of(host, pages)
    for region in (device, host):
        assert digest_there(region, layout, pages, layout, len(pages), len(pages)) == digest_of(host, pages)


@pytest.mark.parametrize(("gib", "mib"), [(0, 64), (24, 256), (63, 256), (64, 512), (141, 512)])
def test_a_ring_is_as_large_as_its_device_allows(gib: int, mib: int) -> None:
    region = BigDevice(GEOMETRY, make_tensors(None))
    region.gib = gib
    shape = ring_shape(region, None)
    assert shape.num_slots * shape.slot_bytes == mib << 20
    asked = ring_shape(region, 100)
    assert asked.num_slots * asked.slot_bytes == 100 << 20


def twins(seed: int | None) -> tuple[DeviceRegion, Region, list[torch.Tensor], list[bytearray]]:
    """The same pool as tensors, through the device's code, and as host memory, through the reference's."""
    tensors = make_tensors(seed)
    layers = [bytearray(bytes_of(tensor)) for tensor in tensors]
    host = Region(GEOMETRY, tuple(memoryview(layer) for layer in layers))
    return DeviceRegion(GEOMETRY, tensors), host, tensors, layers


@st.composite
def writes(draw: st.DrawFn) -> Write:
    """Whole pages, equal parts of pages (heads), or strips of any size; from and to places that do not overlap."""
    unit = draw(st.sampled_from([PAGE_BYTES, PAGE_BYTES // 2, 64, 8, 5, 1]))
    num_units = LAYER_BYTES // unit
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    places = [
        draw(st.permutations(range(0, num_units - 3, 3)).map(lambda starts: starts[: len(sizes)])) for _ in range(2)
    ]
    sources, targets = places
    strips = tuple(Strip(s * unit, t * unit, n * unit) for s, t, n in zip(sources, targets, sizes, strict=False))
    first = draw(st.integers(0, NUM_LAYERS - 1))
    return Write(SessionId("a"), bytes(16), first, draw(st.integers(1, NUM_LAYERS - first)), strips)


def spans_of(write: Write) -> tuple[Span, ...]:
    return tuple(Span(strip.dst, strip.num_bytes) for strip in write.strips)


@given(writes())
def test_what_goes_out_and_comes_in_is_what_host_memory_gives(write: Write) -> None:
    device, host, _, _ = twins(seed=1)
    with device.outgoing(write) as views, host.outgoing(write) as expected:
        payload = b"".join(views)
        assert payload == b"".join(expected)

    device, host, tensors, layers = twins(seed=None)
    for region in (device, host):
        with region.incoming(write.layers, spans_of(write)) as views:
            at = 0
            for view in views:
                view[:] = payload[at : at + view.nbytes]
                at += view.nbytes
    assert [bytes_of(tensor) for tensor in tensors] == layers


@given(st.lists(writes(), min_size=1, max_size=4), st.integers(0, 2))
def test_rings_hold_the_same_bytes_as_in_host_memory(them: list[Write], slot: int) -> None:
    device, host, _, _ = twins(seed=1)
    num_bytes = sum(write.num_bytes for write in them)
    rings: tuple[Ring, ...] = (DeviceRing(device, 3, num_bytes + 7), HostRing(host, 3, num_bytes + 7))
    payloads = []
    for ring in rings:
        ring.gather(slot, them).synchronize()
        payloads.append(bytes(ring.payload(slot, 0, num_bytes) or b""))
    assert payloads[0] == payloads[1]

    device, host, tensors, layers = twins(seed=None)
    for ring in (DeviceRing(device, 3, num_bytes + 7), HostRing(host, 3, num_bytes + 7)):
        view = ring.payload(slot, 0, num_bytes)
        assert view is not None
        view[:] = payloads[0]
        starts = [sum(write.num_bytes for write in them[:i]) for i in range(len(them))]
        ring.scatter(
            slot, [(at, write.layers, spans_of(write)) for at, write in zip(starts, them, strict=True)]
        ).synchronize()
    assert [bytes_of(tensor) for tensor in tensors] == layers


def test_raising_out_of_incoming_scatters_nothing() -> None:
    device, _, tensors, _ = twins(seed=None)

    def receive() -> None:
        with device.incoming(range(1), (Span(0, 4),)) as (view,):
            view[:] = b"half"
            raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        receive()
    assert not any(bytes_of(tensors[0]))


def test_pages_have_no_host_view() -> None:
    device, _, _, _ = twins(seed=1)
    assert device.layer_bytes(0) == LAYER_BYTES
    with pytest.raises(AssertionError, match="no host view"):
        device.pages(0, 0, 1)


def test_marks_of_host_memory_change_nothing() -> None:
    device, host, _, _ = twins(seed=1)
    device.mark(0)
    host.mark(0)


class Listener:
    """Both ends' events: admits everything, and sets ``arrived`` at a message."""

    def __init__(self) -> None:
        self.arrived = Event()

    def admit(self, link: Any, token: bytes, layers: range, spans: Sequence[Span]) -> SessionId:
        return SessionId("a")

    def landed(self, *what: Any) -> None:
        pass

    damaged = written = drained = landed

    def notified(self, link: Any, message: bytes) -> None:
        self.arrived.set()

    def lost(self, link: Any, error: TransferError) -> None:
        self.arrived.set()


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
def test_pools_of_tensors_travel_byte_for_byte_over(transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl", reason="pip install 'prfaas[nixl]'")
    fingerprint = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
    links = (LinkConfig(connections=3),)
    config = KvTransferConfig(transport=transport, host="127.0.0.1", staging_mib=1, links=links)
    pools = [make_tensors(1), make_tensors(None)]
    ends = [create_transport(config, fingerprint, WallClock()) for _ in pools]
    receiving = Listener()
    dice = random.Random(1)
    src, dst = (dice.sample(range(NUM_PAGES), NUM_PAGES) for _ in range(2))
    pairs = list(zip(src, dst, strict=True))
    try:
        for end, pool in zip(ends, pools, strict=True):
            end.register(DeviceRegion(GEOMETRY, pool))
            end.serve(receiving)
        link = ends[0].connect(ends[1].describe(), Listener())
        for i in range(0, NUM_PAGES, 3):
            strips = tuple(Strip(s * PAGE_BYTES, d * PAGE_BYTES, PAGE_BYTES) for s, d in pairs[i : i + 3])
            link.write(Write(SessionId("a"), bytes(16), 0, NUM_LAYERS, strips))
        link.notify(SessionId("a"), b"all")
        assert receiving.arrived.wait(30)
    finally:
        for end in ends:
            end.close()
    for ours, theirs in zip(*pools, strict=True):
        assert torch.equal(theirs[dst].view(torch.int16), ours[src].view(torch.int16))
