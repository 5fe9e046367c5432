"""Pages of device memory out and in again: the bytes of host memory, behind the right kernels, over tcp.

Skipped without a GPU; tests/unit/kv_transfer/test_staging_device.py asks the same of CPU tensors.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_peer import GpuPeer
from core.request import SamplingParams, SessionId
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig
from kv_transfer.staging_device import DeviceRegion, DeviceRing
from kv_transfer.transport import LayerPages, PageGeometry, Span, Strip, Write
from tests.cluster.live_cluster import live_cluster
from tests.cluster.reference import ReferenceModel, make_prompts
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

PAGE_BYTES, NUM_PAGES, NUM_LAYERS = 65536, 64, 4
GEOMETRY = PageGeometry((LayerPages(PAGE_BYTES),) * NUM_LAYERS, NUM_PAGES)
LONG_KERNEL_CYCLES = 2_000_000_000  # about a second


def make_pool(seed: int | None) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(seed or 0)
    shape = (NUM_PAGES, PAGE_BYTES // 2)
    pool = [torch.randint(0, 2**15, shape, dtype=torch.int16, generator=dice) for _ in range(NUM_LAYERS)]
    return [(torch.zeros_like(layer) if seed is None else layer).cuda() for layer in pool]


def random_write(seed: int, num_pages: int = 16, unit: int = PAGE_BYTES) -> Write:
    dice = random.Random(seed)
    num_units = NUM_PAGES * PAGE_BYTES // unit
    src, dst = (dice.sample(range(num_units), num_pages) for _ in range(2))
    strips = tuple(Strip(s * unit, d * unit, unit) for s, d in zip(src, dst, strict=True))
    return Write(SessionId("a"), bytes(16), 0, NUM_LAYERS, strips)


def spans_of(write: Write) -> tuple[Span, ...]:
    return tuple(Span(strip.dst, strip.num_bytes) for strip in write.strips)


def payload_of(pool: list[torch.Tensor], write: Write) -> bytes:
    layers = [layer.cpu().numpy().tobytes() for layer in pool]
    return b"".join(layers[i][s.src : s.src + s.num_bytes] for i in write.layers for s in write.strips)


@pytest.mark.parametrize("unit", [PAGE_BYTES, PAGE_BYTES // 16, 128, 2])
def test_what_goes_out_and_comes_in_is_byte_for_byte(unit: int) -> None:
    pool, empty = make_pool(1), make_pool(None)
    write = random_write(2, unit=unit)
    with DeviceRegion(GEOMETRY, pool).outgoing(write) as views:
        payload = b"".join(views)
    assert payload == payload_of(pool, write)
    with DeviceRegion(GEOMETRY, empty).incoming(write.layers, spans_of(write)) as (view,):
        view[:] = payload
    moved = Write(write.session_id, write.token, 0, NUM_LAYERS, tuple(Strip(s.dst, s.dst, unit) for s in write.strips))
    assert payload_of(empty, moved) == payload


def test_a_ring_of_device_memory_holds_and_scatters_the_same_bytes() -> None:
    pool, empty = make_pool(1), make_pool(None)
    writes = [random_write(2), random_write(3, num_pages=5)]
    ring = DeviceRing(DeviceRegion(GEOMETRY, pool), 2, 64 << 20)
    ring.gather(1, writes).synchronize()
    assert ring.payload(1, 0, 4) is None
    start = 64 << 20
    held = ring._buffer.bytes[start : start + sum(write.num_bytes for write in writes)]
    assert held.cpu().numpy().tobytes() == b"".join(payload_of(pool, write) for write in writes)

    there = DeviceRing(DeviceRegion(GEOMETRY, empty), 2, 64 << 20)
    there._buffer.bytes.copy_(ring._buffer.bytes)
    there.scatter(1, [(0, writes[0].layers, spans_of(writes[0]))]).synchronize()
    moved = tuple(Strip(strip.dst, strip.dst, PAGE_BYTES) for strip in writes[0].strips)
    assert payload_of(empty, Write(SessionId("a"), bytes(16), 0, NUM_LAYERS, moved)) == payload_of(pool, writes[0])


def test_a_layer_goes_out_as_the_kernels_that_were_launched_before_its_mark_leave_it() -> None:
    pool = make_pool(None)
    region = DeviceRegion(GEOMETRY, pool)
    write = Write(SessionId("a"), bytes(16), 1, 1, (Strip(0, 0, PAGE_BYTES),))
    with region.outgoing(write):
        pass  # whatever is made on first use is made
    torch.cuda._sleep(LONG_KERNEL_CYCLES)
    pool[1].fill_(7)
    region.mark(1)
    with region.outgoing(write) as (view,):
        assert bytes(view) == b"\x07\x00" * (PAGE_BYTES // 2)


def test_a_layer_does_not_wait_for_kernels_of_later_layers() -> None:
    pool = make_pool(1)
    region = DeviceRegion(GEOMETRY, pool)
    write = Write(SessionId("a"), bytes(16), 0, 1, (Strip(0, 0, PAGE_BYTES), Strip(PAGE_BYTES * 3, 0, PAGE_BYTES)))
    with region.outgoing(write):
        pass
    region.mark(0)
    torch.cuda._sleep(LONG_KERNEL_CYCLES)
    later = torch.cuda.Event()
    later.record()
    region.mark(1)
    with region.outgoing(write) as views:
        assert not later.query()
        assert b"".join(views) == payload_of(pool, write)


def test_tcp_carries_pages_from_pool_to_pool() -> None:
    sender, receiver = GpuPeer(torch.device("cuda:0"), 40), GpuPeer(torch.device("cuda:0"), 40)
    try:
        sender.fill()
        for peer in (sender, receiver):
            peer.open("tcp", 4)
        dice = random.Random(1)
        src, dst = (tuple(dice.sample(range(40), 33)) for _ in range(2))
        sender.move("a", src, receiver.expect("a", dst), 0.0)
        assert receiver.count_wrong(src, dst) == 0
    finally:
        sender.close()
        receiver.close()


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
async def test_workers_on_the_gpu_give_the_models_own_tokens(transport: str, tmp_path: Path) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl", reason="pip install 'prfaas[gpu]'")
    model = ReferenceModel(save_tiny_model("llama", tmp_path), make_prompts(VOCAB_SIZE))
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine = EngineConfig(
        device="cuda", dtype="float32", page_size=16, num_pages=256, max_prefill_chunk=5, max_batch_tokens=64
    )
    kv_transfer = KvTransferConfig(transport=transport)
    async with live_cluster(str(model.folder), engine=engine, kv_transfer=kv_transfer) as cluster:
        for prompt in model.prompts:
            answer = await cluster.generate(prompt, greedy)
            assert answer.tokens == model.expected(prompt, 12)
            assert answer.timing.decode_worker == "decode-0"
        await cluster.check_integrity()
