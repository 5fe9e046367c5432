"""On CPU tensors; tests/gpu/test_staging_on_gpu.py asks the same of device memory, and what streams add."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.request import SessionId
from kv_transfer.staging import HostRing, Ring
from kv_transfer.staging_device import DeviceRegion, DeviceRing
from kv_transfer.transport import LayerPages, PageGeometry, Region, Span, Strip, Write

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
        ring.gather(slot, them)
        payloads.append(bytes(ring.payload(slot, 0, num_bytes) or b""))
    assert payloads[0] == payloads[1]

    device, host, tensors, layers = twins(seed=None)
    for ring in (DeviceRing(device, 3, num_bytes + 7), HostRing(host, 3, num_bytes + 7)):
        view = ring.payload(slot, 0, num_bytes)
        assert view is not None
        view[:] = payloads[0]
        starts = [sum(write.num_bytes for write in them[:i]) for i in range(len(them))]
        ring.scatter(slot, [(at, write.layers, spans_of(write)) for at, write in zip(starts, them, strict=True)])
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
